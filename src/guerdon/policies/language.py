"""Language models: a step is a token.

Any transformers causal language model with its tokenizer. Log-probabilities are those of the distribution
that was sampled from (temperature included) and do not depend on padding or on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories, encode_text
from guerdon.errors import UsageError
from guerdon.policies.base import Policy, masked
from guerdon.randomness import uniform


class LanguagePolicy(Policy):
    """A transformers causal language model that answers prompts.

    Args:
        model: called as ``model(input_ids=, attention_mask=, position_ids=, past_key_values=, use_cache=)``.
        tokenizer: a transformers tokenizer with an end-of-text token.
        max_new_tokens: default length limit of an answer.
        temperature: default sampling temperature, above 0.
    """

    kind: ClassVar[str] = "language"
    markov: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, tokenizer: Any, max_new_tokens: int = 64, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token (eos_token), so answers could not end")
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> LanguagePolicy:
        """Load model and tokenizer by path or hub name. Raises `UsageError` when there is none."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no language model at '{name_or_path}': {str(error).splitlines()[0]}"
            ) from error
        return cls(model, tokenizer, **options)

    @property
    def core(self) -> nn.Module:
        """The transformer."""
        return self.model

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _prompt_tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ``[B, P]`` tokens and their mask."""
        rows = [self.tokenizer(p, add_special_tokens=True)["input_ids"] for p in prompts]
        width = max(1, max(len(r) for r in rows))
        tokens = torch.full((len(rows), width), int(self.tokenizer.eos_token_id), dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            if not row:
                raise UsageError(f"prompt {prompts[i]!r} has no tokens; give the model at least one")
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = True
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
            log_p = (out.logits[:, -1].float() / heat).log_softmax(-1)
            token = (log_p.exp().cumsum(-1) < draws[:, t : t + 1]).sum(-1).clamp(max=log_p.shape[-1] - 1)
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

    def hidden_inputs(self, traj: Trajectories) -> dict[str, Tensor]:
        """Model inputs of prompt and answer joined: ``input_ids``, ``attention_mask``, ``position_ids`` ``[B, P+T]``.

        Position ``P - 1 + t`` is the state before token ``t``."""
        inputs = traj.inputs
        token = inputs["step", "token"]
        attention = torch.cat([inputs["prompt_mask"], traj.mask], dim=1).long()
        return {
            "input_ids": torch.cat([inputs["prompt_token"], token], dim=1),
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        }

    def distribution(self, traj: Trajectories) -> TensorDict:
        """``logits [B, T, V]`` at the sampling temperature, float32."""
        prompt_width = traj.inputs["prompt_token"].shape[1]
        out = self.model(**self.hidden_inputs(traj), use_cache=False)
        logits = out.logits[:, prompt_width - 1 : -1].float() / traj.inputs["temperature"][:, None, None]
        return TensorDict({"logits": logits}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        """``[B, T]``."""
        logits = (self.distribution(traj) if distribution is None else distribution)["logits"]
        chosen = logits.gather(-1, traj.inputs["step", "token"].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(
            -1
        )
        return masked(chosen, traj.mask)

    def save_pretrained(self, folder: str | Path) -> None:
        """Model and tokenizer in transformers' format."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
