"""What a causal model says along given answers, without work that nobody reads.

A chosen and a rejected answer have the same prompt, and so have the answers of a group. A causal model's states
on a prompt do not depend on what follows, so the prompt is read once; its keys and values, gradients and all,
serve every answer to it. A pair of 64 tokens of prompt and 64 of answer costs 192 tokens instead of 256, a group
of 8 answers of 64 tokens to a prompt of 16 costs 528 instead of 640. (Prompt and answers as one long row, each
answer blind to the others, would cost as many tokens, but every token would be compared with all answers.)

Rows begin at the left, whatever side they were padded on: behind its end a causal model sees nothing, so that most
passes need no attention mask. The last token of an answer is not read where nothing is asked after it, and columns
that no row uses are left out.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from guerdon.errors import ShapeError
from guerdon.policies import lora
from guerdon.policies.base import masked
from guerdon.policies.matmul import token_log_probs

_SAVING = 0.1  # share of the tokens that has to be saved: a second pass starts every operation twice
# weights times tokens that have to be saved for each layer, against the fixed cost of a second pass
_WORK = {"cpu": 4e7, "cuda": 1e10}


def same_prompts(
    prompt_token: Int[Tensor, "rows width"], prompt_mask: Bool[Tensor, "rows width"]
) -> tuple[Int[Tensor, " prompts"], Int[Tensor, " rows"]]:
    """Which rows have the same prompt: a row of each prompt, and the number of the prompt of each row.

    ``prompt_token[rows[number]]`` are the prompts again, wherever in the batch equal ones lie."""
    real = torch.where(prompt_mask, prompt_token, -1)
    prompts, number = torch.unique(real, dim=0, return_inverse=True)
    rows = number.new_full((prompts.shape[0],), number.shape[0])
    everyone = torch.arange(number.shape[0], device=number.device)
    return rows.scatter_reduce(0, number, everyone, "amin"), number


def answer_logits(
    model: nn.Module,
    prompt_token: Int[Tensor, "rows width"],
    prompt_mask: Bool[Tensor, "rows width"],
    token: Int[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    share: bool | None = None,
) -> Float[Tensor, "rows steps vocabulary"]:
    """The logits that each answer token was drawn from, as the model gives them, differentiable.

    Args:
        model: a transformers causal language model.
        prompt_token, prompt_mask: prompts, padded on the left.
        token, mask: answers, padded on the right.
        share: read each prompt once (True), once a row (False), or whichever is faster (None), which is once
            a row for a model in which sharing was not found to give the same (`can_share`).

    Where ``mask`` is false the logits mean nothing; columns that no row uses are zeros.
    Raises `ShapeError` where masks and tokens do not fit.
    """
    rows = _Rows(model, prompt_token, prompt_mask, token, mask, share)
    keeps = "logits_to_keep" in inspect.signature(_bare(model).forward).parameters

    def call(keep: int, **inputs: Any) -> tuple[Tensor, Any]:
        out = model(**inputs, **({"logits_to_keep": keep} if keeps else {}))
        return out.logits[:, -keep:], out

    return rows.padded(rows.before(call))


def answer_states(
    model: nn.Module,
    prompt_token: Int[Tensor, "rows width"],
    prompt_mask: Bool[Tensor, "rows width"],
    token: Int[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    after: bool = False,
    share: bool | None = None,
) -> Float[Tensor, "rows steps size"]:
    """The transformer's last hidden states along the answers, differentiable.

    Args:
        model: a transformers model; the part below its head is used.
        prompt_token, prompt_mask, token, mask, share: as for `answer_logits`.
        after: the states after each token was read (what a reward model looks at), instead of those before it
            (what its logits are made from).
    """
    rows = _Rows(model, prompt_token, prompt_mask, token, mask, share)
    call = _backbone(model)
    return rows.padded(rows.after(call) if after else rows.before(call))


def answer_log_probs(
    model: nn.Module,
    prompt_token: Int[Tensor, "rows width"],
    prompt_mask: Bool[Tensor, "rows width"],
    token: Int[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    temperature: Float[Tensor, " rows"] | None = None,
    share: bool | None = None,
) -> Float[Tensor, "rows steps"]:
    """Log-probability of each answer token, float32, differentiable, zero where ``mask`` is false.

    Args:
        model, prompt_token, prompt_mask, token, mask, share: as for `answer_logits`.
        temperature: of each row; None is 1 for all.

    Where the model's logits are nothing but a matrix times its states (`output_weight`), logits are computed for
    the answers' own tokens alone and never held all at once (`token_log_probs`).
    """
    # a compiled model is compiled as a whole: its parts are not called
    weight = None if _compiled(_bare(model)) else output_weight(model)
    if weight is None:
        logits = answer_logits(model, prompt_token, prompt_mask, token, mask, share).float()
        if temperature is not None:
            logits = logits / temperature[:, None, None]
        chosen = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        return masked(chosen - logits.logsumexp(-1), mask)
    rows = _Rows(model, prompt_token, prompt_mask, token, mask, share)
    states = rows.before(_backbone(model))
    heat: Tensor | float = 1.0
    if temperature is not None and not bool((temperature == 1).all()):
        heat = temperature[:, None].expand(rows.mask.shape)
    if bool(rows.mask.all()):
        return rows.padded(token_log_probs(states, weight, rows.token, heat))
    place = rows.mask.reshape(-1).nonzero().squeeze(1)
    found = token_log_probs(
        states.reshape(-1, states.shape[-1]).index_select(0, place),
        weight,
        rows.token.reshape(-1)[place],
        heat if isinstance(heat, float) else heat.reshape(-1)[place],
    )
    values = found.new_zeros(rows.mask.numel()).index_copy(0, place, found)
    return rows.padded(values.view(rows.mask.shape))


_Call = Callable[..., tuple[Tensor, Any]]


def _bare(model: nn.Module) -> Any:
    """The transformers model itself, of one whose adapter is off."""
    return model.inner if isinstance(model, lora._Without) else model


def _backbone(model: nn.Module) -> _Call:
    bare = _bare(model)
    core = getattr(bare, "base_model", bare)

    def call(keep: int, **inputs: Any) -> tuple[Tensor, Any]:
        with contextlib.nullcontext() if bare is model else lora.disabled(bare):
            out = core(**inputs)
        return out.last_hidden_state[:, -keep:], out

    return call


class _Rows:
    """One batch, cut to the columns that any row uses, and how it goes through a model.

    A call ``(keep, **inputs) -> (values, out)`` gives what the model says after the last ``keep`` tokens of its inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_token: Tensor,
        prompt_mask: Tensor,
        token: Tensor,
        mask: Tensor,
        share: bool | None,
    ) -> None:
        if prompt_token.shape != prompt_mask.shape or token.shape != mask.shape:
            raise ShapeError(
                f"prompts {list(prompt_token.shape)} with mask {list(prompt_mask.shape)} and answers "
                f"{list(token.shape)} with mask {list(mask.shape)}: each mask must have the shape of its tokens"
            )
        self.steps = token.shape[1]
        self.width = max(1, int(prompt_mask.any(0).sum()))  # real tokens end at the right edge
        used = max(1, int(mask.any(0).sum()))  # and begin at the left one
        self.prompt, self.prompt_mask = prompt_token[:, -self.width :], prompt_mask[:, -self.width :]
        self.token, self.mask = token[:, :used], mask[:, :used]
        self.length = self.prompt_mask.sum(1)
        self.ragged = bool((self.length < self.width).any())
        # a row of each prompt, and the number of each row's prompt; None where prompts are not shared
        self.rows: Tensor | None = None
        self.number: Tensor | None = None
        bare = _bare(model)
        if share is False or (share is None and (token.shape[0] < 2 or _occupied(bare))):
            return
        rows, number = same_prompts(self.prompt, self.prompt_mask)
        if share or self._pays(bare, rows.shape[0]):
            self.rows, self.number = rows, number

    def _pays(self, model: nn.Module, prompts: int) -> bool:
        rows, longest = self.prompt.shape[0], self.width + self.token.shape[1]
        saved = (rows - prompts) * self.width
        if saved < _SAVING * rows * longest:
            return False
        config = _config(model)
        weights = sum(p.numel() for p in model.parameters())
        layers = max(1, int(getattr(config, "num_hidden_layers", 1)))
        if saved * weights / layers < _WORK.get(self.prompt.device.type, _WORK["cuda"]):
            return False
        window = getattr(config, "sliding_window", None)  # a cache may drop what has left it
        return (window is None or longest <= window) and can_share(model)

    def before(self, call: _Call) -> Tensor:
        """``[B, T', ...]``: what the model says before each answer token."""
        token = self.token[:, :-1]  # nothing is asked after the last one
        if self.rows is None or self.number is None:
            return self._whole(call, token, self.length - 1)
        first, cache = self._prompts(call)
        parts = [first.index_select(0, self.number)]
        if token.shape[1]:
            parts.append(self._answers(call, token, cache))
        return torch.cat(parts, dim=1)

    def after(self, call: _Call) -> Tensor:
        """``[B, T', ...]``: what the model says after each answer token."""
        if self.rows is None or self.number is None:
            return self._whole(call, self.token, self.length)
        return self._answers(call, self.token, self._prompts(call)[1])

    def padded(self, values: Tensor) -> Tensor:
        """``[B, T, ...]`` again, of ``[B, T', ...]``."""
        missing = self.steps - values.shape[1]
        if not missing:
            return values
        return torch.cat([values, values.new_zeros(values.shape[0], missing, *values.shape[2:])], dim=1)

    def _whole(self, call: _Call, token: Tensor, start: Tensor) -> Tensor:
        """Every row with its prompt, in one pass; read from ``start [B]`` on."""
        tokens = torch.cat([self.prompt, token], dim=1)
        if not self.ragged:
            return call(self.token.shape[1], input_ids=tokens, use_cache=False)[0]
        tokens = _to_left(tokens, self.length + token.shape[1])
        first = int(start.min())
        said, _ = call(tokens.shape[1] - first, input_ids=tokens, use_cache=False)
        return _read(said, start - first, self.token.shape[1])

    def _prompts(self, call: _Call) -> tuple[Tensor, Any]:
        """Each prompt once: what is said after its last token, ``[prompts, 1, ...]``, and what a cache holds of the
        prompt of every row."""
        prompt, length = self.prompt[self.rows], self.length[self.rows]
        if not self.ragged:
            said, out = call(1, input_ids=prompt, use_cache=True)
        else:
            first = int(length.min()) - 1
            said, out = call(self.width - first, input_ids=_to_left(prompt, length), use_cache=True)
            said = _read(said, length - 1 - first, 1)
        out.past_key_values.reorder_cache(self.number)
        return said, out.past_key_values

    def _answers(self, call: _Call, token: Tensor, cache: Any) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": token, "past_key_values": cache, "use_cache": True}
        if self.ragged:  # between the end of a short prompt and the answer lies what must not be seen
            real = torch.arange(self.width, device=token.device) < self.length[:, None]
            inputs["attention_mask"] = torch.cat(
                [real, torch.ones_like(token, dtype=torch.bool)], dim=1
            ).long()
            inputs["position_ids"] = self.length[:, None] + torch.arange(token.shape[1], device=token.device)
        return call(token.shape[1], **inputs)[0]


def _occupied(model: nn.Module) -> bool:
    """Whether a model is used in a way in which two passes are no gain, or not the same: with dropout (two answers would
    share its noise), recomputing activations (which keeps no cache), or compiled (for one pass)."""
    return model.training or _recomputes(model) or _compiled(model)


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _compiled(model: nn.Module) -> bool:
    return getattr(model, "_compiled_call_impl", None) is not None


def _to_left(tokens: Tensor, length: Tensor) -> Tensor:
    """Rows whose last ``length [B]`` tokens are real, with those at the left; what follows them is of no account."""
    place = tokens.shape[1] - length[:, None] + torch.arange(int(length.max()), device=tokens.device)
    return tokens.gather(1, place.clamp(max=tokens.shape[1] - 1))


def _read(values: Tensor, start: Tensor, steps: int) -> Tensor:
    """``[B, steps, ...]`` of ``values [B, L, ...]``, from ``start [B]`` on."""
    place = start[:, None] + torch.arange(steps, device=start.device)
    place = place.clamp(max=values.shape[1] - 1)
    return values.gather(1, place[..., None].expand(*place.shape, values.shape[-1]))


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if text is not None else config


# --- what a model allows ----------------------------------------------------------------------------------

_shares: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_plain_head: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_share(model: nn.Module) -> bool:
    """Whether ``model`` gives the same states when prompts are shared; tried once a model, on a few tokens.

    Models whose cache holds something other than keys and values of single positions (recurrent ones), or that
    read an answer otherwise than one token after the other, do not.
    """
    model = _bare(model)
    found = _shares.get(model)
    if found is None:
        found = _shares[model] = _try(_compare_sharing, model)
    return found


def output_weight(model: nn.Module) -> Tensor | None:
    """``[V, H]``, where the model's logits are ``states weight^T`` and nothing else, tried once a model; None for models
    that scale, bias or cap them, or whose output layer carries an adapter."""
    model = _bare(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return None
    found = _plain_head.get(model)
    if found is None:
        found = _plain_head[model] = _try(_compare_head, model)
    return head.weight if found else None


@torch.no_grad()
def _try(compare: Callable[..., bool], model: nn.Module) -> bool:
    """``compare`` on a few tokens: two prompts of different length, four answers."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        vocabulary = int(_config(model).vocab_size)
        prompt = (torch.arange(10, device=device).view(2, 5) * 7 % vocabulary)[[0, 1, 0, 1]]
        prompt_mask = torch.ones(4, 5, dtype=torch.bool, device=device)
        prompt_mask[[0, 2], :2] = False
        token = (torch.arange(16, device=device).view(4, 4) * 5 + 3) % vocabulary
        with torch.autocast(device.type, enabled=False):
            return compare(model, prompt, prompt_mask, token, torch.ones_like(token, dtype=torch.bool))
    except (
        Exception
    ):  # whatever an architecture says to a cache, to positions or to padding that it does not know
        return False
    finally:
        for module, mode in modes:
            module.training = mode


def _compare_sharing(model: nn.Module, prompt: Tensor, prompt_mask: Tensor, *answers: Tensor) -> bool:
    def states(prompt: Tensor, prompt_mask: Tensor, share: bool) -> Tensor:
        token, mask = answers
        return answer_states(model, prompt, prompt_mask, token, mask, share=share).float()

    plain, shared = states(prompt, prompt_mask, False), states(prompt, prompt_mask, True)
    bound = 1e-4 * plain.abs().max()
    if next(model.parameters()).dtype != torch.float32:
        # half precision is too coarse for that: sharing must change far less than another prompt does
        apart = states(prompt.flip(0), prompt_mask.flip(0), False)
        bound = torch.maximum(bound, 0.05 * (apart - plain).abs().max())
    return bool((shared - plain).abs().max() <= bound)


def _compare_head(model: Any, prompt: Tensor, prompt_mask: Tensor, *answers: Tensor) -> bool:
    token, mask = answers
    weight = model.get_output_embeddings().weight
    logits = answer_logits(model, prompt, prompt_mask, token, mask, share=False).float()
    states = answer_states(model, prompt, prompt_mask, token, mask, share=False)
    exact = weight.dtype == torch.float32
    difference = (logits - (states @ weight.t()).float()).abs().max()
    return bool(difference <= (1e-4 if exact else 2e-2) * logits.abs().max())
