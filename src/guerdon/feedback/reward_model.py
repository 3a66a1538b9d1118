"""Reward models of texts: a transformer with a linear head on the last token of prompt and answer.

The model is a transformers sequence classifier, so ``AutoModelForSequenceClassification.from_pretrained`` reads what
is saved here, and published reward models can be judges. One output is a scalar reward (Christiano et al., 2017;
Stiennon et al., 2020); k outputs are k attributes (Wang et al., 2024, DPA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.errors import FeedbackError, ShapeError, UsageError
from guerdon.feedback.base import checked_scores
from guerdon.policies import lora
from guerdon.policies.language import LanguagePolicy, joined, linear_names, save_transformer
from guerdon.policies.matmul import fast_linears
from guerdon.policies.shared_prompts import answer_states

Reads = Literal["tokens", "texts"]


class RewardModel(nn.Module):
    """A sequence classifier of transformers that judges answers of language models.

    Args:
        model: causal (``score`` on the last token: Llama, Qwen, GPT-2, ...) or an encoder (``classifier``: BERT,
            DeBERTa, ...), with k labels.
        tokenizer: its own.
        reads: ``"tokens"`` takes the token ids of the trajectories as they are, for a policy with the same tokenizer;
            ``"texts"`` decodes and encodes again with ``tokenizer``, for any other.
        normalised: give scores minus `mean`, divided by `std`.
        direction: ``[k]``, how `score` weighs several outputs; None where there is one.
        max_length: tokens; of longer texts the beginning is left out. None takes what the model can hold.

    The score is read at the last real token, wherever padding lies, in float32.
    """

    name = "reward_model"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        reads: Reads = "tokens",
        *,
        normalised: bool = False,
        direction: Tensor | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model = fast_linears(model)
        self.tokenizer = tokenizer
        self.reads = reads
        self.normalised = normalised
        config = self.config
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)
        self.mean: Tensor
        self.std: Tensor
        outputs = int(config.num_labels)
        for part, filler in (("mean", 0.0), ("std", 1.0)):
            saved = getattr(config, f"reward_{part}", None)
            value = torch.full((outputs,), filler) if saved is None else torch.tensor(saved)
            self.register_buffer(part, value, persistent=False)
        self.direction: Tensor | None
        self.register_buffer("direction", direction, persistent=False)
        if direction is not None and direction.shape != (outputs,):
            raise UsageError(
                f"direction has shape {list(direction.shape)}, the reward model {outputs} outputs; give one number each"
            )

    # -- making ----------------------------------------------------------------------------------------------

    @classmethod
    def from_policy(
        cls, policy: LanguagePolicy, outputs: int = 1, seed: int = 0, **options: Any
    ) -> RewardModel:
        """A new reward model on a copy of the policy's backbone (an adapter is folded in), which reads its tokens.

        The head's weights are drawn with deviation ``1 / sqrt(width + 1)`` (Stiennon et al., 2020) from ``seed``; models
        that differ in nothing else make an ensemble. Raises `UsageError` where transformers has no classifier of the
        policy's architecture.
        """
        tokenizer = _with_padding(policy.tokenizer)
        model = classifier(policy, outputs, seed, tokenizer)
        return cls(model, tokenizer, "tokens", **options).eval()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, policy: LanguagePolicy | None = None, **options: Any
    ) -> RewardModel:
        """A reward model by path or hub name, in float32.

        Args:
            policy: whose answers it will judge. Where both have the same tokenizer its tokens are read as they are;
                otherwise, and without a policy, its texts.

        Raises `UsageError` when there is no such model, or one without a head (a language model, say).
        """
        model, tokenizer = load_transformer(
            name_or_path, "AutoModelForSequenceClassification", "reward model"
        )
        if hasattr(model.config, "preference_model"):
            raise UsageError(
                f"the model at '{name_or_path}' judges pairs; load it with PreferenceModel.from_pretrained"
            )
        same = policy is not None and same_tokenizer(tokenizer, policy.tokenizer)
        return cls(model, tokenizer, "tokens" if same else "texts", **options).eval()

    @property
    def core(self) -> nn.Module:
        """The classifier, head included."""
        return self.model

    @property
    def config(self) -> Any:
        """The classifier's configuration."""
        return self.model.config

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Every linear layer, the head included: it is new and has to learn too."""
        return linear_names(self.model)

    # -- judging ---------------------------------------------------------------------------------------------

    def scores(self, traj: Trajectories) -> Float[Tensor, "batch output"]:
        """``[B, k]``, float32, differentiable. Raises `FeedbackError` when texts are to be read and there are none."""
        if self._fits(traj):  # rows with the same prompt share it
            inputs, mask = traj.inputs, traj.mask
            parts = inputs["prompt_token"], inputs["prompt_mask"], inputs["step", "token"], mask
            states = answer_states(self.model, *parts, after=True)
            state = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
            head = cast(Any, self.model).score
            with torch.autocast(state.device.type, enabled=False):
                raw = head(state.to(next(head.parameters()).dtype)).float()
            return (raw - self.mean) / self.std if self.normalised else raw
        if self.reads == "texts":
            tokens, mask = self._encode(traj)
        else:
            tokens, start = joined(traj)
            length = start + 1 + traj.mask.sum(1)
            mask = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
        tokens, mask = last_tokens(tokens, mask, self.max_length)
        raw = read_head(self.model, tokens, mask)
        return (raw - self.mean) / self.std if self.normalised else raw

    def _fits(self, traj: Trajectories) -> bool:
        """Whether the tokens are read as they are, by a causal classifier, whole, at the end of an answer."""
        if self.reads != "tokens" or not hasattr(self.model, "score") or not bool(traj.mask.any(1).all()):
            return False
        width = traj.inputs["prompt_token"].shape[1] + traj.mask.shape[1]
        return self.max_length is None or width <= self.max_length

    def score(self, traj: Trajectories) -> Float[Tensor, " batch"]:
        """``[B]``: the output, or where there are several, their sum weighed by ``direction``."""
        scores = self.scores(traj)
        if self.direction is not None:
            return scores @ self.direction
        if scores.shape[1] != 1:
            raise UsageError(
                f"this reward model has {scores.shape[1]} outputs and no direction; use scores(), or set direction [k]"
            )
        return scores[:, 0]

    def compare(self, a: Trajectories, b: Trajectories) -> Float[Tensor, " batch"]:
        """``[B]``, Bradley and Terry's ``sigmoid(score(a) - score(b))``."""
        return torch.sigmoid(self.score(a) - self.score(b))

    @torch.no_grad()
    def standardise(self, scores: Float[Tensor, "row output"]) -> None:
        """Take mean and deviation of raw ``scores [N, k]`` (of the reference's answers, say) as those that are left out
        and divided by where ``normalised`` is set, and switch it on."""
        if scores.ndim != 2 or scores.shape[1] != len(self.mean) or len(scores) < 2:
            raise ShapeError(
                f"standardise: scores have shape {list(scores.shape)}, expected [N, {len(self.mean)}] with N of at least 2"
            )
        self.mean.copy_(scores.mean(0))
        self.std.copy_(scores.std(0).clamp(min=1e-6))
        self.normalised = True

    def _encode(self, traj: Trajectories) -> tuple[Tensor, Tensor]:
        """``[B, L]`` tokens of prompts and answers, and their mask, in this model's own tokens."""
        try:
            prompts, texts = traj.prompts, traj.texts
        except KeyError:
            raise FeedbackError(
                "this reward model reads texts, but the trajectories carry none; encode them with their texts, or use a "
                "reward model with the policy's tokenizer"
            ) from None
        device = next(self.model.parameters()).device
        return tuple(part.to(device) for part in encode_pairs(self.tokenizer, prompts, texts))  # type: ignore[return-value]

    # -- files -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Model and tokenizer in transformers' format, an adapter folded in; mean and deviation lie in the config."""
        self.config.reward_mean, self.config.reward_std = self.mean.tolist(), self.std.tolist()
        save_whole(self.model, folder)
        self.tokenizer.save_pretrained(folder)


@dataclass
class RewardModelFeedback:
    """A reward or preference model as a judge: without gradient, in batches, its answers checked.

    Args:
        model: has ``score(traj) -> [B]`` or ``compare(a, b) -> [B]``.
        batch: rows a call.
    """

    model: Any
    batch: int = 64
    name: str = "reward_model"

    def score(self, traj: Trajectories) -> Tensor:
        """``[B]`` scores. Raises `FeedbackError` when the model only compares, or a score is not finite."""
        if not hasattr(self.model, "score"):
            raise FeedbackError(f"judge '{self.name}' compares two answers and gives no score; use compare")
        with torch.no_grad():
            parts = [self.model.score(part) for part in traj.minibatches(self.batch)]
        return checked_scores(torch.cat(parts), traj.prompts, self.name).to(traj.log_prob.device)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``, the probability that ``a`` is preferred."""
        with torch.no_grad():
            parts = [
                self.model.compare(x, y)
                for x, y in zip(a.minibatches(self.batch), b.minibatches(self.batch), strict=True)
            ]
        return checked_scores(torch.cat(parts), a.prompts, self.name).to(a.log_prob.device)


@dataclass(frozen=True)
class Rescale:
    """One attribute's ratings on the scale that all share: ``factor * rating + offset``.

    The defaults take HelpSteer's 0 to 4 into 0 to 100 (Wang et al., 2024, DPA). Missing ratings (NaN) stay missing.
    """

    factor: float = 20.0
    offset: float = 10.0

    def common(self, rating: Tensor) -> Tensor:
        """From the attribute's own scale."""
        return self.factor * rating + self.offset

    def own(self, score: Tensor) -> Tensor:
        """Back to it."""
        return (score - self.offset) / self.factor


# --- shared by the models that judge texts ----------------------------------------------------------------


def last_tokens(tokens: Tensor, mask: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """Of ``[B, L]`` tokens, padded at the end, the last ``limit`` real ones of each row, padded at the end again."""
    if limit is None or tokens.shape[1] <= limit:
        return tokens, mask
    length = mask.sum(1, keepdim=True)
    place = (length - limit).clamp(min=0) + torch.arange(limit, device=tokens.device)
    kept = place < length
    return tokens.gather(1, place.clamp(max=tokens.shape[1] - 1)), kept


def read_head(model: nn.Module, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch output"]:
    """``[B, k]``, float32: what a sequence classifier says of each row of ``tokens [B, L]``, which are padded at their
    end (``mask`` is true on real ones).

    A causal classifier is read at its last real token by place, not by looking for padding ids: where padding is the
    end-of-text token, a search would stop before the end that the answer itself has.
    """
    core = cast(Any, model)
    if not hasattr(core, "score"):  # an encoder pools in its own way
        return core(input_ids=tokens, attention_mask=mask.long()).logits.float()
    hidden = core.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    last = (mask.sum(1) - 1).clamp(min=0)
    state = hidden[torch.arange(len(last), device=last.device), last]
    kind = next(core.score.parameters()).dtype
    with torch.autocast(state.device.type, enabled=False):
        return core.score(state.to(kind)).float()


def encode_pairs(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """``[B, L]`` tokens and mask of prompts with their answers, padded at the end.

    A chat template, where the tokenizer has one, makes a user's and an assistant's message of them; an encoder's
    tokenizer marks the two parts in its own way; otherwise the answer's tokens and the end-of-text token follow the
    prompt's.
    """
    rows: list[list[int]] = []
    for prompt, text in zip(prompts, texts, strict=True):
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            rows.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        elif tokenizer.sep_token_id is not None and tokenizer.cls_token_id is not None:
            rows.append(tokenizer(prompt, text)["input_ids"])
        else:
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            rows.append([*tokenizer(prompt)["input_ids"], *answer, *end])
    length = torch.tensor([len(row) for row in rows])
    if not bool((length > 0).all()):
        row = int((length == 0).nonzero()[0])
        raise FeedbackError(
            f"the prompt {prompts[row]!r} and its answer have no tokens for the reward model to read"
        )
    mask = torch.arange(int(length.max())) < length[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens, mask


def classifier(policy: LanguagePolicy, outputs: int, seed: int, tokenizer: Any) -> nn.Module:
    """A sequence classifier of the policy's architecture on a copy of its backbone; see `RewardModel.from_policy`."""
    import copy

    from transformers import AutoModelForSequenceClassification

    source = cast(Any, policy.model)
    config = copy.deepcopy(source.config)
    config.num_labels = outputs
    config.pad_token_id = tokenizer.pad_token_id
    config.problem_type = "regression"
    kind = next(source.parameters()).dtype  # which need not be the one that the config names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=kind)
        except ValueError as error:
            raise UsageError(
                f"transformers has no sequence classifier for {type(source).__name__}, so no reward model can be made of it"
            ) from error
        if not hasattr(model, "score"):
            raise UsageError(f"{type(model).__name__} has no head called 'score' on its last token")
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    weights = lora.merged_state_dict(source.base_model)
    model.base_model.load_state_dict({name: value.clone() for name, value in weights.items()})
    model.config._name_or_path = ""  # it is no longer the model of that name
    return model.to(next(source.parameters()).device)


def load_transformer(name_or_path: str | Path, kind: str, what: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer by path or hub name, in float32, an adapter folded in. Raises `UsageError` when there is none,
    or when weights of the head are missing in it (transformers would fill them with noise)."""
    import transformers
    from transformers.utils import logging

    name = str(name_or_path)
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UsageError(f"no {what} at '{name}': there is no such folder")
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of becomes an error below
    try:
        loader = getattr(transformers, kind)
        model, found = loader.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a missing file, a config of another kind, a damaged safetensors file, ...
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(f"no {what} at '{name_or_path}': {reason}") from error
    finally:
        logging.set_verbosity(level)
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise UsageError(f"the model at '{name_or_path}' is no {what}: it has no weights for {missing}")
    if lora.has_lora(model):
        lora.fold(model)
    return model, tokenizer


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers give every text the same tokens, as far as vocabulary, end and a probe tell."""
    probe = "The 2 prompts, tokenised: (a+b)\n 'text'"
    return a is b or (
        a.get_vocab() == b.get_vocab()
        and a.eos_token_id == b.eos_token_id
        and a(probe)["input_ids"] == b(probe)["input_ids"]
    )


def save_whole(model: nn.Module, folder: str | Path) -> None:
    """A classifier with all its weights, an adapter folded in: the head of the base it was made from is of no use."""
    config = cast(Any, model).config
    name, config._name_or_path = config._name_or_path, ""
    try:
        save_transformer(model, folder, "SEQ_CLS")
    finally:
        config._name_or_path = name


def _with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy whose padding token is not its end-of-text token.

    transformers' own pooling takes the last token that is not padding: were padding the end-of-text token, a reload by
    other software would read a state before the end. A token that ends no answer serves; where there is none, a batch
    of several rows is refused there rather than misread.
    """
    import copy

    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    spare = [tokenizer.unk_token, tokenizer.bos_token]
    tokenizer.pad_token = next((t for t in spare if t is not None and t != tokenizer.eos_token), None)
    return tokenizer
