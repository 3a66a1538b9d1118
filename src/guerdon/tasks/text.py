"""A user's own language model, data, prompts and judge.

guerdon train dpo --model M --data pairs.jsonl
guerdon train sft --model M --data conversations.jsonl
guerdon train grpo --task text --model M --prompts prompts.txt --reward judge.py:score
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from guerdon.batch import Preferences, Trajectories
from guerdon.critics.state import LanguageCritic
from guerdon.errors import UsageError
from guerdon.experience.completions import Completions
from guerdon.experience.datasets import Data, load_demonstrations, load_preferences, load_prompts, load_rated
from guerdon.experience.prompts import Prompts
from guerdon.experience.rows import read_rows
from guerdon.experience.views import train_test_split
from guerdon.feedback.base import Feedback
from guerdon.feedback.functions import parse_reward
from guerdon.feedback.reward_model import RewardModel
from guerdon.policies.base import Policy
from guerdon.policies.language import LanguagePolicy
from guerdon.randomness import row_seeds
from guerdon.roles import Role
from guerdon.tasks.base import Measured, Pieces, Task

HELD_OUT, MOST = 0.05, 256  # share of recorded rows that are kept to measure on, and how many at most
SHOWN = 4  # answers in the report


class NoJudge:
    """Stands where no reward was named."""

    name = "none"

    def score(self, traj: Trajectories) -> torch.Tensor:
        raise UsageError(
            "nothing judges the answers: name a reward with --reward (file.py:function(prompts, texts), or "
            "model=PATH of a reward model)"
        )


class Text(Task):
    """See the module."""

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "your own language model: --model M with --data, or with --prompts and --reward"
    kinds: ClassVar[tuple[str, ...]] = ("language",)
    supplies: ClassVar[tuple[str, ...]] = (
        "preferences",
        "demonstrations",
        "rated",
        "experience",
        "feedback",
    )

    def __init__(self, pieces: Pieces | None = None, method: Any = None) -> None:
        super().__init__(pieces, method)
        self._policy: LanguagePolicy | None = None
        self._held_out: Data | None = None

    def offers(self, what: str) -> bool:
        piece = {"experience": self.pieces.prompts, "feedback": self.pieces.reward}.get(
            what, self.pieces.data
        )
        return piece is not None

    def policy(self, kind: str) -> LanguagePolicy:
        if self.pieces.model is None:
            raise UsageError("task 'text' trains a model of yours: name it with --model PATH_OR_HUB_NAME")
        limit = self.pieces.max_new_tokens or 64
        self._policy = LanguagePolicy.from_pretrained(self.pieces.model, max_new_tokens=limit)
        return self._policy

    def critic(self, policy: Policy) -> nn.Module:
        assert isinstance(policy, LanguagePolicy)
        return LanguageCritic(policy)

    def reward_model(self, policy: Policy) -> nn.Module:
        assert isinstance(policy, LanguagePolicy)
        return RewardModel.from_policy(policy)

    # -- recorded data -------------------------------------------------------------------------------------

    def _source(self) -> str:
        if self.pieces.data is None:
            raise UsageError("this method learns from recorded data: name a file with --data")
        return self.pieces.data

    def hold_out(self, policy: Policy) -> None:
        """Keep all recorded rows to measure on, whatever they are: pairs or demonstrations."""
        first = next(iter(read_rows(self._source(), limit=1)))
        load = load_preferences if "chosen" in first and "rejected" in first else load_demonstrations
        self._held_out = load(
            self._source(),
            policy,  # type: ignore[arg-type]
            max_prompt=self.pieces.max_prompt,
            max_length=self.pieces.max_length,
        )

    def _split(self, kind: str, policy: Policy) -> Data:
        """The rows to train on; some others are kept to measure on."""
        load: Any = {
            "preferences": load_preferences,
            "demonstrations": load_demonstrations,
            "rated": load_rated,
        }[kind]
        limits = {"max_prompt": self.pieces.max_prompt, "max_length": self.pieces.max_length}
        data: Data = load(self._source(), policy, **limits)
        held_out = min(MOST, int(HELD_OUT * len(data)))
        if held_out == 0:
            self._held_out = data
            return data
        train, self._held_out = train_test_split(data, held_out, seed=0)
        return train

    def preferences(self, policy: Policy, seed: int) -> Data:
        return self._split("preferences", policy)

    def demonstrations(self, policy: Policy, seed: int) -> Data:
        return self._split("demonstrations", policy)

    def rated(self, policy: Policy, seed: int) -> Data:
        return self._split("rated", policy)

    # -- prompts and the judge -----------------------------------------------------------------------------

    def experience(self, seed: int) -> Completions:
        if self.pieces.prompts is None:
            raise UsageError("this method answers prompts: name a file of them with --prompts")
        return Completions(Prompts(load_prompts(self.pieces.prompts, self._policy), seed=seed), seed=seed)

    def feedback(self) -> Feedback:
        if self.pieces.reward is None:
            return NoJudge()
        known = {"model": lambda path=None: self._judge(path)}
        return parse_reward(self.pieces.reward, known)

    def cost(self) -> Feedback:
        if self.pieces.cost is None:
            return super().cost()
        return parse_reward(self.pieces.cost, {"model": lambda path=None: self._judge(path)}, "--cost")

    @staticmethod
    def _judge(path: str | None) -> Feedback:
        if not path:
            raise UsageError("model=PATH: the path or hub name of a reward model is missing")
        return RewardModel.from_pretrained(path).eval().requires_grad_(False)  # type: ignore[return-value]

    # -- figures -------------------------------------------------------------------------------------------

    def measure(self, actor: Role, feedback: Feedback, **sampling: Any) -> Measured:
        """The mean reward of sampled answers where there are prompts and a judge; on held-out recorded rows the mean
        log-likelihood of a token (``log_prob_chosen``, ``log_prob_rejected`` of pairs) and how often the chosen answer
        is the likelier."""
        figures: dict[str, float] = {}
        samples = None
        if self._held_out is not None:
            rows = torch.arange(min(MOST, len(self._held_out)))
            figures |= _likelihood(actor, self._held_out, rows)
        if feedback.name != "none" and self.pieces.prompts is not None:
            prompts = self.experience(0).prompts.texts[:64]
            samples = actor.sample(prompts, row_seeds(7, 0, len(prompts)), **sampling)
            samples = samples.judged(feedback.score(samples))
            figures["reward"] = samples.score().mean().item()
        return Measured(figures, samples)

    def measure_judge(self, judge: Role) -> Measured:
        """How often the judge prefers the chosen answer of a held-out pair, and by how much (of a reward model the
        difference of its scores, of a model of pairs the log-odds)."""
        assert self._held_out is not None
        return Measured(judge_figures(judge, self._held_out, MOST), None)


def judge_figures(judge: Role, data: Data, most: int) -> dict[str, float]:
    """``accuracy`` and ``margin`` of a judge on the first ``most`` pairs."""
    margins = []
    for rows in torch.arange(min(most, len(data))).split(16):
        pairs: Any = data.take(rows)
        if hasattr(judge.model, "score"):
            margins.append(judge.score(pairs.chosen) - judge.score(pairs.rejected))
        else:
            margins.append(torch.logit(judge.compare(pairs.chosen, pairs.rejected), 1e-6))
    margin = torch.cat(margins)
    return {"accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item()}


def _likelihood(actor: Role, data: Data, rows: torch.Tensor) -> dict[str, float]:
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    right = 0.0
    for part in rows.split(16):
        batch: Any = data.take(part)
        sides = (
            {"log_prob_chosen": batch.chosen, "log_prob_rejected": batch.rejected}
            if isinstance(batch, Preferences)
            else {"log_prob": batch}
        )
        totals = []
        for name, side in sides.items():
            total = actor.log_prob(side).sum(1)
            sums[name] = sums.get(name, 0.0) + float(total.sum())
            tokens[name] = tokens.get(name, 0) + int(side.mask.sum())
            totals.append(total)
        if len(totals) == 2:
            right += float((totals[0] > totals[1]).sum())
    figures = {name: value / max(1, tokens[name]) for name, value in sums.items()}
    if len(figures) == 2:
        figures["chosen_likelier"] = right / len(rows)
    return figures
