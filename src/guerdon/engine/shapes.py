"""What a planner has to know of a model and of an iteration: the sizes of a transformer, its possible layouts, the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from guerdon.engine.protocols import Layout
from guerdon.errors import UsageError, nearest

GiB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense transformer.

    Args:
        name: for reports.
        hidden, intermediate: width of the residual stream, and inside the feed-forward part.
        layers, vocabulary: numbers of layers and of tokens.
        heads, kv_heads: attention heads, and heads of keys and values (fewer with grouped queries).
        head_width: features a head; None: ``hidden / heads``.
        gated: whether the feed-forward part has a gate (three matrices a layer instead of two).
        tied: whether the embedding is also the output layer.
        scalar: whether one number comes out instead of a distribution over tokens (critics and reward models).
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_width: int | None = None
    gated: bool = True
    tied: bool = False
    scalar: bool = False

    @property
    def attention_width(self) -> int:
        """Features of all heads together."""
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.attention_width * self.kv_heads // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer: 4h^2 + 3hi where every head has its own keys and values."""
        h = self.hidden
        return (
            2 * h * self.attention_width
            + 2 * h * self.kv_width
            + (3 if self.gated else 2) * h * self.intermediate
        )

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer that are multiplied for a token."""
        return self.hidden if self.scalar else self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Weights altogether: layers, embedding, output layer."""
        head = 0 if self.tied and not self.scalar else self.head_parameters
        return self.layers * self.layer_parameters + self.hidden * self.vocabulary + head

    def as_scalar(self) -> ModelShape:
        """The same transformer with one number as output."""
        return replace(self, scalar=True)

    @staticmethod
    def named(name: str) -> ModelShape:
        """ "7B", "13B", "34B" or "70B": Llama 2 and Code Llama. Raises `UsageError` for another name."""
        key = name.upper().removeprefix("LLAMA").lstrip("-2 ")
        if key not in _LLAMA:
            raise UsageError(f"no model shape is called '{name}'; {nearest(name, _LLAMA)}")
        hidden, intermediate, layers, heads, kv_heads = _LLAMA[key]
        return ModelShape(key, hidden, intermediate, layers, 32000, heads, kv_heads)

    @staticmethod
    def from_config(config: Any, name: str | None = None) -> ModelShape:
        """The shape that a transformers config (an object or the dict of its config.json) describes.

        Raises `UsageError` for mixtures of experts, which the formulas do not cover, and for a config without sizes.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        values = values.get("text_config") or values
        kind = str(values.get("model_type") or name or "model")
        if any(values.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise UsageError(f"'{kind}' is a mixture of experts, which the cost model does not cover")

        def size(*keys: str) -> int:
            for key in keys:
                if values.get(key):
                    return int(values[key])
            raise UsageError(f"the config of '{kind}' has no '{keys[0]}'")

        hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head")
        inner = next(
            (values[key] for key in ("intermediate_size", "n_inner", "ffn_dim") if values.get(key)),
            4 * hidden,
        )
        return ModelShape(
            name or str(values.get("_name_or_path") or "") or kind,
            hidden,
            int(inner),
            size("num_hidden_layers", "n_layer"),
            size("vocab_size"),
            heads,
            int(values.get("num_key_value_heads") or heads),
            int(values["head_dim"]) if values.get("head_dim") else None,
            gated=kind not in _PLAIN,
            tied=bool(values.get("tie_word_embeddings", kind in ("gpt2", "opt"))),
        )


# hidden, intermediate, layers, heads, heads of keys and values: Llama 2 (Touvron et al. 2023), Code Llama (Rozière et al. 2023)
_LLAMA = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "34B": (8192, 22016, 48, 64, 8),
    "70B": (8192, 28672, 80, 64, 8),
}
_PLAIN = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2")


def brief(layout: Layout) -> str:
    """A layout in a few letters: "pp2 tp4 dp1"."""
    return f"pp{layout.pp} tp{layout.tp} dp{layout.dp}"


def layouts_of(shape: ModelShape, gpus: int, gpus_per_node: int) -> list[Layout]:
    """Every way to spread ``shape`` over ``gpus``: tp a power of two inside a node that divides the heads, pp a divisor of the
    layers, at most 16."""
    found = []
    tp = 1
    while tp <= min(8, gpus_per_node, gpus) and gpus % tp == 0 and shape.heads % tp == 0:
        rest = gpus // tp
        found += [
            Layout(rest // pp, pp, tp)
            for pp in range(1, min(16, rest) + 1)
            if rest % pp == 0 and shape.layers % pp == 0
        ]
        tp *= 2
    return found


@dataclass(frozen=True)
class Workload:
    """One iteration: ``batch`` answers of ``response`` tokens to prompts of ``prompt`` tokens; updates take ``minibatches``
    parts in turn, ``epochs`` times. Defaults: the experiments of Sheng et al. 2024, section 8.1."""

    batch: int = 1024
    prompt: int = 1024
    response: int = 1024
    minibatches: int = 8
    epochs: int = 1

    def __post_init__(self) -> None:
        for key in ("batch", "prompt", "response", "minibatches", "epochs"):
            if getattr(self, key) < 1:
                raise UsageError(f"workload: {key} is {getattr(self, key)}; it must be at least 1")
        if self.batch % self.minibatches:
            raise UsageError(
                f"workload: {self.minibatches} minibatches do not divide a batch of {self.batch}"
            )

    @property
    def length(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.prompt + self.response

    @property
    def minibatch(self) -> int:
        """Answers in one update."""
        return self.batch // self.minibatches
