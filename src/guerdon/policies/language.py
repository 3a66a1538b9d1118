"""Language models: a step is a token.

Any transformers causal language model with its tokenizer. Log-probabilities are those of the distribution
that was sampled from (temperature included) and do not depend on padding or on the other rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories, encode_text
from guerdon.errors import UsageError
from guerdon.policies import lora
from guerdon.policies.base import Policy, masked
from guerdon.policies.saving import read_json
from guerdon.randomness import uniform

Message = dict[str, Any]
Prompt = str | Sequence[Message]  # a text, or the messages of a conversation so far


class LanguagePolicy(Policy):
    """A transformers causal language model that answers prompts.

    Args:
        model: called as ``model(input_ids=, attention_mask=, position_ids=, past_key_values=, use_cache=)``.
        tokenizer: a transformers tokenizer with an end-of-text token.
        max_new_tokens: default length limit of an answer.
        temperature: default sampling temperature, above 0.
        allowed: ``[V]`` bool, tokens that an answer may hold; None allows all. The others have probability 0,
            in sampling as in every log-probability.
    """

    kind: ClassVar[str] = "language"
    markov: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        allowed: Tensor | None = None,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token (eos_token), so answers could not end")
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.allowed: Tensor | None
        self.register_buffer("allowed", allowed, persistent=False)
        # a model that can leave out logits is asked for those of the answer alone
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> LanguagePolicy:
        """Load model and tokenizer by path or hub name, in float32. A folder with a peft adapter is read too (its
        base is loaded and the adapter folded into the weights). Raises `UsageError` when there is none."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except Exception as error:  # a missing file, a config of another kind, a damaged safetensors file, ...
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(f"no language model at '{name_or_path}': {reason}") from error
        if lora.has_lora(model):
            lora.fold(model)
        return cls(model, tokenizer, **options)

    @property
    def core(self) -> nn.Module:
        """The transformer."""
        return self.model

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Every linear layer but the output's, as peft's "all-linear"."""
        return linear_names(self.model)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- texts and tokens ------------------------------------------------------------------------------------

    def render(self, prompt: Prompt) -> str:
        """A prompt as one text: messages go through the tokenizer's chat template, up to where the answer begins.

        Raises `UsageError` for messages when the tokenizer has no chat template."""
        if isinstance(prompt, str):
            return prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                "this model's tokenizer has no chat template, so it cannot read messages; give prompts as plain "
                "texts, or set tokenizer.chat_template"
            )
        return self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. A text that already begins with the beginning-of-text token (a rendered
        conversation) gets no second one. Raises `UsageError` for a prompt without tokens."""
        text = self.render(prompt)
        begin = getattr(self.tokenizer, "bos_token", None)
        special = not (begin and text.startswith(begin))
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if ids and special and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        if not ids:
            raise UsageError(f"prompt {text!r} has no tokens; give the model at least one")
        return list(ids)

    def answer_tokens(self, text: str, end: bool = True) -> list[int]:
        """Token ids of an answer, tokenised apart from its prompt (together, tokens could merge across the
        boundary); ``end`` appends the end-of-text token."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, int(self.tokenizer.eos_token_id)] if end else ids

    def collate(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        texts: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> Trajectories:
        """Token ids as a batch of recorded trajectories, whose behaviour log-probabilities are unknown (zero).

        Args:
            prompts, answers: ``B`` rows of token ids each.
            texts: prompts and answers as texts, for judges that read them.
        """
        prompt, prompt_mask = _padded(prompts, int(self.tokenizer.eos_token_id), left=True)
        token, mask = _padded(answers, int(self.tokenizer.eos_token_id), left=False)
        inputs = {
            "prompt_token": prompt,
            "prompt_mask": prompt_mask,
            "temperature": torch.ones(len(prompts)),
            "step": TensorDict({"token": token}, batch_size=token.shape),
        }
        outputs = None
        if texts is not None:
            outputs = TensorDict(
                {"prompt": encode_text(texts[0]), "text": encode_text(texts[1])}, batch_size=[len(prompts)]
            )
        return Trajectories(
            inputs=TensorDict(inputs, batch_size=[len(prompts)]),
            log_prob=torch.zeros(token.shape),
            mask=mask,
            outputs=outputs,
        ).to(self._device)

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str], end: bool = True) -> Trajectories:
        """Prompts and answers as recorded trajectories; see `tokens`, `answer_tokens` and `collate`."""
        rendered = [self.render(prompt) for prompt in prompts]
        return self.collate(
            [self.tokens(prompt) for prompt in rendered],
            [self.answer_tokens(text, end) for text in texts],
            (rendered, texts),
        )

    def _prompt_tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ``[B, P]`` tokens and their mask."""
        known: dict[str, list[int]] = {}  # prompts of a group are tokenised once
        rows = [known[p] if p in known else known.setdefault(p, self.tokens(p)) for p in prompts]
        tokens, mask = _padded(rows, int(self.tokenizer.eos_token_id), left=True)
        return tokens.to(self._device), mask.to(self._device)

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        group: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        **options: object,
    ) -> Trajectories:
        """Sample an answer a prompt, token by token with cached keys and values.

        ``T`` is the longest answer, its end-of-text token included. Randomness: one uniform number a token
        from the row's seed, turned into a token by the inverse of the cumulative distribution.
        """
        limit = max_new_tokens or self.max_new_tokens
        heat = temperature or self.temperature
        prompt, prompt_mask = self._prompt_tokens(prompts)
        rows, eos = len(prompts), int(self.tokenizer.eos_token_id)
        draws = uniform(seeds, (limit,), prompt.device)
        attention = prompt_mask.long()
        tokens, log_probs, alive = [], [], torch.ones(rows, dtype=torch.bool, device=prompt.device)
        real, cache, step_input = [], None, prompt
        position = (attention.cumsum(1) - 1).clamp(min=0)
        for t in range(limit):
            out = self.model(
                input_ids=step_input,
                attention_mask=attention,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            log_p = self.restrict(out.logits[:, -1].float() / heat).log_softmax(-1)
            token = (log_p.exp().cumsum(-1) <= draws[:, t : t + 1]).sum(-1).clamp(max=log_p.shape[-1] - 1)
            real.append(alive)
            tokens.append(torch.where(alive, token, eos))
            log_probs.append(masked(log_p.gather(1, token[:, None]).squeeze(1), alive))
            alive = alive & (token != eos)
            if not bool(alive.any()):
                break
            step_input = tokens[-1][:, None]
            attention = torch.cat([attention, attention.new_ones(rows, 1)], dim=1)
            position = position[:, -1:] + 1
        token, mask = torch.stack(tokens, 1), torch.stack(real, 1)
        texts = [
            self.tokenizer.decode(row[m & (row != eos)].tolist(), skip_special_tokens=True)
            for row, m in zip(token.cpu(), mask.cpu(), strict=True)
        ]
        inputs = {
            "prompt_token": prompt,
            "prompt_mask": prompt_mask,
            "temperature": torch.full((rows,), heat, device=prompt.device),
            "step": TensorDict({"token": token}, batch_size=token.shape),
        }
        outputs = {"prompt": encode_text(prompts), "text": encode_text(texts)}
        return Trajectories(
            inputs=TensorDict(inputs, batch_size=[rows]),
            log_prob=torch.stack(log_probs, 1),
            mask=mask,
            outputs=TensorDict(outputs, batch_size=[rows]).to(prompt.device),
            group=group,
        )

    # -- probabilities ---------------------------------------------------------------------------------------

    def restrict(self, logits: Tensor) -> Tensor:
        """``logits [..., V]`` with minus infinity at tokens that are not `allowed`."""
        return logits if self.allowed is None else logits.masked_fill(~self.allowed, -torch.inf)

    def distribution(self, traj: Trajectories) -> TensorDict:
        """``logits [B, T, V]`` at the sampling temperature, float32."""
        tokens, start = joined(traj)
        steps, longest = traj.mask.shape[1], tokens.shape[1]
        first = int(start.min()) if start.numel() else 0
        if self._keeps:
            out = self.model(input_ids=tokens, use_cache=False, logits_to_keep=longest - first)
        else:
            out = self.model(input_ids=tokens, use_cache=False)
            first = 0
        logits = states_before(out.logits, start - first, steps)
        logits = logits.float() / traj.inputs["temperature"][:, None, None]
        return TensorDict({"logits": self.restrict(logits)}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        """``[B, T]``."""
        logits = (self.distribution(traj) if distribution is None else distribution)["logits"]
        token = traj.inputs["step", "token"].unsqueeze(-1)
        return masked(logits.gather(-1, token).squeeze(-1) - logits.logsumexp(-1), traj.mask)

    # -- files -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Model and tokenizer in transformers' format: ``AutoModelForCausalLM.from_pretrained(folder)`` reads them.

        Of a model with an adapter on top of a base that has a name, only the adapter is written, in peft's format
        (``PeftModel.from_pretrained(base, folder)`` reads it too); without a name to refer to, the adapter is folded
        into the weights that are written."""
        save_transformer(self.model, folder, "CAUSAL_LM")
        self.tokenizer.save_pretrained(folder)


# --- shared by whatever reads language trajectories ---------------------------------------------------------


def joined(traj: Trajectories) -> tuple[Tensor, Tensor]:
    """Prompt and answer of each row as one sequence, padded at its end: ``(tokens [B, L], start [B])``.

    ``start`` is the place of the prompt's last token, the state before the answer's first. Behind the end a causal
    model sees nothing, so no attention mask is needed, and a batch costs as many tokens as its longest row."""
    inputs, mask = traj.inputs, traj.mask
    prompt, prompt_mask, token = inputs["prompt_token"], inputs["prompt_mask"], inputs["step", "token"]
    tokens = torch.cat([prompt, token], dim=1)
    padding = prompt.shape[1] - prompt_mask.sum(1)
    start = prompt.shape[1] - 1 - padding
    if bool((padding > 0).any()):
        length = int((prompt_mask.sum(1) + mask.sum(1)).max())
        place = padding[:, None] + torch.arange(length, device=tokens.device)
        tokens = tokens.gather(1, place.clamp(max=tokens.shape[1] - 1))
    return tokens, start


def states_before(states: Tensor, start: Tensor, steps: int) -> Tensor:
    """``[B, T, ...]``, the states from which each of ``steps`` answer tokens was predicted, of ``[B, L, ...]``."""
    place = (start[:, None] + torch.arange(steps, device=start.device)).clamp(max=states.shape[1] - 1)
    if place.shape[0] and bool((start == start[0]).all()) and int(start[0]) + steps <= states.shape[1]:
        return states[:, int(start[0]) : int(start[0]) + steps]
    return states.gather(1, place[..., None].expand(*place.shape, states.shape[-1]))


def linear_names(model: nn.Module) -> tuple[str, ...]:
    """Last parts of the names of a transformer's linear layers, the output layer's left out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    return tuple(sorted(names))


def save_transformer(model: nn.Module, folder: str | Path, task_type: str) -> None:
    """A transformers model into ``folder``; with an adapter, as `LanguagePolicy.save_pretrained` says.

    Args:
        task_type: peft's name of what the model does ("CAUSAL_LM", "SEQ_CLS").
    """
    core = cast(Any, model)
    folder = Path(folder)
    if not lora.has_lora(model):
        core.save_pretrained(folder)
        return
    base = str(getattr(core.config, "_name_or_path", "") or "")
    if not base:
        flag, core._hf_peft_config_loaded = core._hf_peft_config_loaded, False  # else it writes the adapter alone
        try:
            core.save_pretrained(folder, state_dict=lora.merged_state_dict(model))
        finally:
            core._hf_peft_config_loaded = flag
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = core.peft_config[lora.ADAPTER]
    config.task_type, config.base_model_name_or_path = task_type, base
    config.save_pretrained(str(folder))
    weights = {f"base_model.model.{k}": v.contiguous() for k, v in lora.adapter_state_dict(model).items()}
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def is_language_model(name_or_path: str) -> bool:
    """Whether a folder holds a transformers causal language model or a peft adapter of one (a hub name: unknown, so
    no)."""
    folder = Path(name_or_path)
    architectures = read_json(folder / "config.json").get("architectures") or ()
    adapter = read_json(folder / "adapter_config.json").get("task_type") == "CAUSAL_LM"
    return adapter or any("CausalLM" in name or "LMHead" in name for name in architectures)


def _padded(rows: Sequence[Sequence[int]], filler: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``[B, L]`` tokens and mask, padded on one side."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(1, int(lengths.max())) if len(rows) else 1
    place = torch.arange(width)
    mask = place >= width - lengths[:, None] if left else place < lengths[:, None]
    tokens = torch.full((len(rows), width), filler, dtype=torch.int64)
    # a masked assignment fills row by row, in order, which is the order of the ids laid end to end
    parts = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    tokens[mask] = torch.cat(parts) if parts else tokens.new_zeros(0)
    return tokens, mask
