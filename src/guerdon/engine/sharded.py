"""A small transformer of which each rank of torch.distributed holds a part: one stage, one share of its weights.

The models are those that `guerdon.policies.transformer` knows: the Llama family and GPT-2. Tensor parallelism cuts the
projections into attention and perceptron by columns and those out of them by rows, embedding and head by tokens of the
vocabulary (Megatron-LM: Shoeybi et al., 2019, section 3); pipeline parallelism gives each stage a range of blocks.
`guerdon.engine.pipelines` runs the parts together.

What this is for: to show that layouts do not change results, with weights that are really in different places. What it is
not: a fast engine. Communication does not overlap with computation, norms are not split over the sequence, the head's
logits are gathered whole, and there is neither dropout nor activation recomputation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from guerdon.engine.shapes import ModelShape
from guerdon.engine.shards import Groups, Mesh, Parameter, Place, Share, Store, take
from guerdon.errors import UsageError, nearest
from guerdon.randomness import mix

_LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# --- the model, as its weights and their layout ----------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What a transformer is besides its weights.

    ``longest`` is the length up to which texts are served: the positions that it learned, or its attention window.
    ``embedding`` and ``head`` are names of weights, the same one where they are tied."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    size: int
    width: int
    scale: float
    eps: float
    act: Callable[[Tensor], Tensor]
    rotary: nn.Module | None
    longest: int | None
    embedding: str
    head: str


def describe(model: nn.Module) -> tuple[Architecture, list[Parameter]]:
    """A transformers causal language model: what it is, and its weights with the way in which each may be split.

    Raises `UsageError` for a model that cannot be split here.
    """
    name, parts = type(model).__name__, cast(Any, model)
    if name not in (*_LLAMAS, "GPT2LMHeadModel"):
        raise UsageError(
            f"a {name} cannot be split over ranks; {nearest(name, (*_LLAMAS, 'GPT2LMHeadModel'))}"
        )
    if model.training and any(isinstance(m, nn.Dropout) and cast(float, m.p) > 0 for m in model.modules()):
        raise UsageError(
            "a model with dropout cannot be split over ranks; set its dropout to 0 or call eval()"
        )
    config = parts.config
    gpt2 = name == "GPT2LMHeadModel"
    inner = parts.transformer if gpt2 else parts.model
    prefix = "transformer.h." if gpt2 else "model.layers."
    blocks = inner.h if gpt2 else inner.layers
    attention = blocks[0].attn if gpt2 else blocks[0].self_attn
    if not gpt2 and inner.rotary_emb.rope_type not in ("default", "linear", "llama3", "yarn"):
        raise UsageError(f"rotary positions of type '{inner.rotary_emb.rope_type}' are not known here")
    embedding = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    tied = parts.lm_head.weight is parts.get_input_embeddings().weight
    architecture = Architecture(
        family="gpt2" if gpt2 else "llama",
        layers=len(blocks),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads if gpt2 else config.num_key_value_heads,
        size=attention.head_dim,
        width=config.hidden_size,
        scale=attention.scaling,
        eps=config.layer_norm_epsilon if gpt2 else config.rms_norm_eps,
        act=copy.deepcopy(blocks[0].mlp.act if gpt2 else blocks[0].mlp.act_fn),
        rotary=None if gpt2 else copy.deepcopy(inner.rotary_emb),
        longest=config.n_positions if gpt2 else getattr(config, "sliding_window", None),
        embedding=embedding,
        head=embedding if tied else "lm_head.weight",
    )
    found = []
    for name, weight in model.named_parameters():
        if name.startswith(prefix):
            layer, local = name.removeprefix(prefix).split(".", 1)
            dim, fused, unit = _split(local, architecture)
            found.append(
                Parameter(name, tuple(weight.shape), int(layer), dim, fused, unit, dtype=weight.dtype)
            )
            continue
        place: Any = "last" if name.startswith(("lm_head", "model.norm", "transformer.ln_f")) else "first"
        if tied and name == embedding:
            place = "both"
        cut = 0 if name in (embedding, "lm_head.weight") else None
        found.append(Parameter(name, tuple(weight.shape), place, cut, dtype=weight.dtype))
    return architecture, found


def _split(local: str, a: Architecture) -> tuple[int | None, tuple[int, ...], int]:
    """Dimension, fused parts and unit of a block's weight. GPT-2 keeps its matrices as [in, out], others as [out, in]."""
    out, into = (1, 0) if a.family == "gpt2" else (0, 1)
    module, kind = local.rsplit(".", 1)
    columns = {
        "self_attn.q_proj": ((), a.size),
        "self_attn.k_proj": ((), a.size),
        "self_attn.v_proj": ((), a.size),
        "attn.c_attn": ((a.width,) * 3, a.size),
        "mlp.gate_proj": ((), 1),
        "mlp.up_proj": ((), 1),
        "mlp.c_fc": ((), 1),
    }
    rows = {"self_attn.o_proj": a.size, "attn.c_proj": a.size, "mlp.down_proj": 1, "mlp.c_proj": 1}
    if module in columns:
        parts, unit = columns[module]
        return (out if kind == "weight" else 0), parts, unit
    if module in rows and kind == "weight":
        return into, (), rows[module]
    return None, (), 1  # norms, and biases that are added once, after the sum over the ranks


@dataclass(frozen=True)
class Blueprint:
    """A model before it is split: what it is, its weights, and their numbers.

    Args:
        architecture: what it is.
        parameters: its weights and how each may be split.
        weights: from a weight to its whole tensor; asked by every rank for the weights of which it holds a share.
    """

    architecture: Architecture
    parameters: list[Parameter]
    weights: Callable[[Parameter], Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Blueprint:
        """Of a transformers model, see `describe`."""
        named = {name: weight.detach() for name, weight in model.named_parameters()}
        return cls(*describe(model), lambda parameter: named[parameter.name])

    @classmethod
    def gpt(
        cls,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int,
        longest: int,
        outputs: int | None = None,
        seed: int = 0,
        scale: float = 0.02,
    ) -> Blueprint:
        """A GPT-2 by its sizes alone, which takes neither the transformers library nor one process that holds it whole.

        Args:
            layers, width, heads, vocabulary: sizes.
            longest: positions that it knows.
            outputs: numbers that come out for a token; None for one a token of the vocabulary, 1 for a critic or a judge.
            seed: of the weights, which are normal with deviation ``scale``.
        """
        head = "lm_head.weight"
        act = partial(F.gelu, approximate="tanh")
        sizes = layers, heads, heads, width // heads, width, (width // heads) ** -0.5, 1e-5
        architecture = Architecture("gpt2", *sizes, act, None, longest, "transformer.wte.weight", head)
        found = [
            Parameter("transformer.wte.weight", (vocabulary, width), "first", 0),
            Parameter("transformer.wpe.weight", (longest, width), "first"),
        ]
        for layer in range(layers):
            for local, inner, outer in (
                ("ln_1", 0, width),
                ("attn.c_attn", width, 3 * width),
                ("attn.c_proj", width, width),
                ("ln_2", 0, width),
                ("mlp.c_fc", width, 4 * width),
                ("mlp.c_proj", 4 * width, width),
            ):
                for kind, shape in (("weight", (inner, outer) if inner else (outer,)), ("bias", (outer,))):
                    name, split = (
                        f"transformer.h.{layer}.{local}.{kind}",
                        _split(f"{local}.{kind}", architecture),
                    )
                    found.append(Parameter(name, shape, layer, *split))
        found += [Parameter(f"transformer.ln_f.{kind}", (width,), "last") for kind in ("weight", "bias")]
        found.append(Parameter(head, (outputs or vocabulary, width), "last", 0))
        number = {parameter.name: i for i, parameter in enumerate(found)}

        def weights(parameter: Parameter) -> Tensor:
            if len(parameter.shape) == 1:
                return torch.full(
                    parameter.shape, float(".ln_" in parameter.name and "weight" in parameter.name)
                )
            generator = torch.Generator().manual_seed(mix(seed, number[parameter.name]))
            return scale * torch.randn(parameter.shape, generator=generator)

        return cls(architecture, found, weights)

    def cut(self, mesh: Mesh, rank: int, device: torch.device | str = "cpu") -> Store:
        """A rank's shards."""
        held = mesh.holding(self.parameters, rank)
        store = Store.empty(held, device)
        for name, (parameter, share) in held.items():
            store.views[name].copy_(take(self.weights(parameter), parameter, share))
        return store

    def shape(self, name: str = "") -> ModelShape:
        """Its sizes, for the formulas of `guerdon.engine.cost`."""
        a, named = self.architecture, {p.name: p for p in self.parameters}
        gpt2 = a.family == "gpt2"
        at = "transformer.h.0.mlp.c_fc.weight" if gpt2 else "model.layers.0.mlp.up_proj.weight"
        inner = max(named[at].shape) if gpt2 else named[at].shape[0]
        vocabulary, outputs = named[a.embedding].shape[0], named[a.head].shape[0]
        sizes = a.width, inner, a.layers, vocabulary, a.heads, a.kv_heads, a.size
        return ModelShape(name or a.family, *sizes, not gpt2, a.embedding == a.head, outputs == 1)


# --- communication that gradients pass --------------------------------------------------------------------


class _Fan(torch.autograd.Function):
    """Into a part that each rank computes a share of: forward as it is, backward the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """Out of such a part: forward the sum over the ranks, backward as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, None


class _Join(torch.autograd.Function):
    """The ranks' columns side by side; what follows is computed by all alike, so backward each takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, widths: list[int], place: Place) -> Tensor:
        ctx.widths, ctx.index = widths, place.index
        own = F.pad(x, (0, max(widths) - x.shape[-1])).contiguous()
        rooms = [torch.empty_like(own) for _ in widths]
        dist.all_gather(rooms, own, group=group)
        by_rank = dict(zip(sorted(place.tensor), rooms, strict=True))  # as the group has them
        shards = [by_rank[rank] for rank in place.tensor]
        return torch.cat([shard[..., :width] for shard, width in zip(shards, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient.split(ctx.widths, -1)[ctx.index], None, None, None


# --- one rank's part of the model ----------------------------------------------------------------------------


class ShardedTransformer:
    """The blocks of one stage, with one share of their weights.

    Args:
        architecture: what model it is.
        parameters: its weights, all of them.
        place: which part this rank has.
        groups: process groups; those of ``place`` are among them.
        blocks: this rank's weights by name, each as the tensors that it consists of, see
            `guerdon.engine.reshard.GenerationWeights`.
        shares: which shares those tensors are, of the weights that are split.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Sequence[Parameter],
        place: Place,
        groups: Groups,
        blocks: Mapping[str, list[Tensor]],
        shares: Sequence[Share],
    ) -> None:
        self.architecture, self.place, self.groups = architecture, place, groups
        self.parameters = {p.name: p for p in parameters}
        self.blocks, self.shares = blocks, shares
        self.tensor = groups[place.tensor]
        self.layers = range(*Share(place.stage, place.stages).cut(architecture.layers))

    def __call__(
        self,
        x: Tensor,
        position: Tensor,
        allowed: Tensor,
        cache: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """One stage.

        Args:
            x: tokens ``int64 [B, T]`` at the first stage, else the hidden states ``[B, T, width]`` of the one before.
            position: ``int64 [B, T]``.
            allowed: bool ``[B, T, S]``, which of ``S`` places each of the ``T`` may look at.
            cache: keys and values of the places before, by layer; grows by ``T``.

        Returns hidden states, or at the last stage logits ``[B, T, V]``, the same on all ranks of the tensor group.
        """
        a = self.architecture
        hidden = self._embed(x, position) if self.place.first else x
        turn = None if a.rotary is None else a.rotary(hidden, position)
        bias = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        bias = bias.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[:, None]
        for layer in self.layers:
            hidden = self._block(layer, hidden, turn, bias, cache)
        if not self.place.last:
            return hidden
        gpt2 = a.family == "gpt2"
        hidden = self._fan(self._norm("transformer.ln_f" if gpt2 else "model.norm", hidden))
        logits = torch.cat([F.linear(hidden, block) for block in self.blocks[a.head]], -1)
        if self.tensor is None:
            return logits
        head, shards = self.parameters[a.head], self.place.shards
        widths = [head.widths(Share(i, shards))[0] for i in range(shards)]
        return _Join.apply(logits, self.tensor, widths, self.place)

    def _block(
        self,
        layer: int,
        hidden: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        bias: Tensor,
        cache: dict[int, tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        a = self.architecture
        if a.family == "gpt2":
            at = f"transformer.h.{layer}."
            query, key, value = self._columns(at + "attn.c_attn", self._fan(self._norm(at + "ln_1", hidden)))
        else:
            at = f"model.layers.{layer}."
            x = self._fan(self._norm(at + "input_layernorm", hidden))
            query, key, value = (self._columns(f"{at}self_attn.{n}_proj", x)[0] for n in "qkv")
        q, k, v = (x.unflatten(-1, (-1, a.size)).transpose(1, 2) for x in (query, key, value))
        if (
            at + "self_attn.q_norm.weight" in self.blocks
        ):  # each rank normalises its heads with the same weights
            q = self._rms(self._fan(self.blocks[at + "self_attn.q_norm.weight"][0]), q)
            k = self._rms(self._fan(self.blocks[at + "self_attn.k_norm.weight"][0]), k)
        if turn is not None:
            q, k = _rotate(q, turn), _rotate(k, turn)
        if cache is not None:
            if layer in cache:
                k, v = torch.cat([cache[layer][0], k], 2), torch.cat([cache[layer][1], v], 2)
            cache[layer] = k, v
        if a.heads != a.kv_heads:
            k, v = (x.repeat_interleave(a.heads // a.kv_heads, 1) for x in (k, v))
        weight = (q @ k.transpose(2, 3) * a.scale + bias).softmax(-1, dtype=torch.float32).to(q.dtype)
        context = (weight @ v).transpose(1, 2).flatten(2)
        if a.family == "gpt2":
            hidden = hidden + self._rows(at + "attn.c_proj", context)
            x = self._fan(self._norm(at + "ln_2", hidden))
            return hidden + self._rows(at + "mlp.c_proj", a.act(self._columns(at + "mlp.c_fc", x)[0]))
        hidden = hidden + self._rows(at + "self_attn.o_proj", context)
        x = self._fan(self._norm(at + "post_attention_layernorm", hidden))
        gate, up = self._columns(at + "mlp.gate_proj", x)[0], self._columns(at + "mlp.up_proj", x)[0]
        return hidden + self._rows(at + "mlp.down_proj", a.act(gate) * up)

    def _embed(self, token: Tensor, position: Tensor) -> Tensor:
        """Each rank looks up the tokens that it has; the others are zero and the sum is all of them."""
        name, hidden = self.architecture.embedding, None
        for share, block in zip(self.shares, self.blocks[name], strict=True):
            local = token - share.cut(self.parameters[name].shape[0])[0]
            here = (local >= 0) & (local < len(block))
            found = F.embedding(local.clamp(0, len(block) - 1), block) * here[..., None]
            hidden = found if hidden is None else hidden + found
        assert hidden is not None
        if self.tensor is not None:
            hidden = _Sum.apply(hidden, self.tensor)
        if self.architecture.family == "gpt2":
            hidden = hidden + F.embedding(position, self.blocks["transformer.wpe.weight"][0])
        return hidden

    def _columns(self, name: str, x: Tensor) -> list[Tensor]:
        """``x W`` for the columns that this rank has, one tensor for each projection fused into the weight."""
        parameter = self.parameters[name + ".weight"]
        biases = self.blocks.get(name + ".bias", [None] * len(self.shares))
        parts: list[tuple[Tensor, ...]] = []
        for share, weight, bias in zip(self.shares, self.blocks[parameter.name], biases, strict=True):
            parts.append(self._linear(x, weight, bias).split(parameter.widths(share), -1))
        return [torch.cat(part, -1) for part in zip(*parts, strict=True)]

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """``x W`` from the columns of ``x`` that this rank has, summed over the ranks."""
        parameter = self.parameters[name + ".weight"]
        pieces = x.split([parameter.widths(share)[0] for share in self.shares], -1)
        weights = self.blocks[parameter.name]
        total = self._linear(pieces[0], weights[0], None)
        for piece, weight in zip(pieces[1:], weights[1:], strict=True):
            total = total + self._linear(piece, weight, None)
        if self.tensor is not None:
            total = _Sum.apply(total, self.tensor)
        bias = self.blocks.get(name + ".bias")
        return total if bias is None else total + bias[0]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.architecture.family == "gpt2" else weight, bias)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.blocks[name + ".weight"][0]
        if self.architecture.family == "gpt2":
            return F.layer_norm(
                x, weight.shape, weight, self.blocks[name + ".bias"][0], self.architecture.eps
            )
        return self._rms(weight, x)

    def _rms(self, weight: Tensor, x: Tensor) -> Tensor:
        full = x.float()
        full = full * (full.pow(2).mean(-1, keepdim=True) + self.architecture.eps).rsqrt()
        return weight * full.to(x.dtype)

    def _fan(self, x: Tensor) -> Tensor:
        return x if self.tensor is None else _Fan.apply(x, self.tensor)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on ``x [B, heads, T, size]``."""
    cos, sin = (table.unsqueeze(1) for table in turn)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def look(mask: Tensor, longest: int | None, new: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions ``[B, T]`` and what may be looked at ``[B, T, S]``, of the last ``T = new`` places of texts with ``S``
    places and this mask. A place that is padding looks at itself, so that nothing is divided by zero."""
    length = mask.shape[1]
    if longest and length > longest:
        raise UsageError(f"texts of {length} tokens are longer than the {longest} that this model takes here")
    new = length if new is None else new
    position = (mask.long().cumsum(1) - 1).clamp(min=0)[:, length - new :]
    place = torch.arange(length, device=mask.device)
    row = place[length - new :, None]
    return position, ((place <= row) & mask[:, None, :]) | (place == row)
