"""RSO: statistical rejection sampling optimisation (Liu et al., 2024, arXiv 2309.06657).

The losses of DPO and SLiC fit the best policy by maximum likelihood, which asks for pairs of that policy's own answers.
RSO makes some: of many answers of the untrained policy it accepts those that follow the policy tilted by a judge's
reward, has the judge rank them in pairs, and learns these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.experience.datasets import Data, batch_count
from guerdon.experience.pairs import PairReplay, pooled
from guerdon.experience.prompts import Prompted
from guerdon.feedback.base import Feedback, compare
from guerdon.feedback.preference_model import reward_against
from guerdon.objectives.preference import PairLoss, PairwiseObjective, with_reference
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.sampling import acceptance_rate, first_of_equals, first_round, rejection_sample, tournament

LOSSES: dict[str, PairLoss] = {"sigmoid_norm": "sigmoid", "hinge_norm": "hinge", "hinge": "slic"}


@dataclass
class RSO:
    """Three losses on pairs from three sources. Defaults are the paper's (there with Adafactor); DPO is ``direct`` with
    ``sigmoid_norm``, SLiC ``sft_sample_rank`` with ``hinge`` and ``tournament``."""

    headline: ClassVar[str] = "accuracy"

    source: Literal["rso_sample_rank", "sft_sample_rank", "direct"] = (
        "rso_sample_rank"  # accepted answers, any of the untrained policy, or recorded pairs
    )
    loss: Literal["sigmoid_norm", "hinge_norm", "hinge"] = (
        "sigmoid_norm"  # of log-ratios to the untrained policy, but hinge of log-probabilities
    )
    ranking: Literal["first_round", "tournament"] = (
        "first_round"  # pair every answer once, or let winners go on
    )
    beta: float = 0.5  # temperature of the reward in the policy that answers are drawn from; 0 takes the best
    gamma: float = 0.05  # scale of the log-ratios in the loss; for short answers more
    candidates: int = 64  # answers to a prompt, of which some are accepted
    num_samples: int = 8  # accepted answers to a prompt (sft_sample_rank draws no more than these)
    temperature: float = 0.7  # of the candidates
    top_k: int = 40  # candidates are drawn from so many likeliest tokens; 0 takes all
    pointwise: bool = False  # the judge's score is the reward, not the log-odds against one answer a prompt
    position_swap: bool = False  # ask the judge in both orders, if it is not indifferent to order by itself
    distinct: bool = False  # of equal candidates to a prompt keep one, which is another proposal
    rounds: int = 100  # rounds of answering, all before the first update
    prompts_per_round: int = 64  # prompts answered a round
    epochs: int = 1  # passes over the pairs
    batch_size: int = 32  # pairs an optimiser step
    lr: float = 1e-5  # of AdamW
    select_every: int = (
        0  # updates between win rates over the untrained policy, the best is kept; 0: the last
    )
    select_prompts: int = 64  # prompts of these win rates
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs a forward and backward pass

    def __post_init__(self) -> None:
        if self.beta < 0 or not 2 <= self.num_samples <= self.candidates:
            raise UsageError(
                f"beta is {self.beta}, num_samples {self.num_samples} of {self.candidates} candidates; expected beta of "
                "at least 0, and from 2 samples to as many as there are candidates"
            )

    @property
    def judged(self) -> bool:
        """Whether a judge is needed."""
        return self.source != "direct" or self.select_every > 0

    @property
    def unread(self) -> set[str]:
        """Parameters of `train` that these options make no use of."""
        return set() if self.source == "direct" else {"preferences"}

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        return {"actor": RoleSettings(AdamW(self.lr), self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(
        self,
        run: Run,
        actor: Role,
        experience: Prompted,
        feedback: Feedback,
        preferences: Data | None = None,
    ) -> None:
        """Answer, accept, rank; then fit the log-ratios to the pairs. The untrained policy answers and is the reference."""
        judge = Judge(feedback, self.position_swap)
        reference = actor.copy(frozen=True)
        best = run.adopt("best", actor.copy(not self.lora_rank, "best")) if self.select_every else actor
        data: Any = preferences
        if self.source != "direct":
            data = run.track("pairs", RankedPairs())
            for step in run.steps(self.rounds, "round"):
                generator = torch.Generator().manual_seed(mix(run.seed, 0x450, step))
                answers, group = self.answered(run, reference, experience, judge, generator)
                self.rank(run, data, step, answers, group, judge, generator)
        if data is None or not len(data):
            raise UsageError(
                "RSO has no pairs to learn from: give recorded ones (direct), or a judge that tells answers apart"
            )
        updates = batch_count(len(data), self.batch_size, self.epochs)
        objective = PairwiseObjective(LOSSES[self.loss], self.gamma)
        for batch in run.batches(data, self.batch_size, self.epochs):
            if objective.reads_reference:
                batch = with_reference(batch, reference)
            run.log(**actor.update(batch, objective))
            if self.select_every and (actor.updates % self.select_every == 0 or actor.updates == updates):
                rate = self.win_rate(run.seed, actor, reference, experience.prompts.texts, judge)
                run.log(win_rate=rate)
                if rate > run.state.get("win_rate", 0.0):
                    run.state["win_rate"] = rate
                    best.follow(actor, 1.0)
                if actor.updates == updates:
                    actor.follow(best, 1.0)

    def answered(
        self, run: Run, reference: Role, experience: Prompted, judge: Judge, generator: torch.Generator
    ) -> tuple[Trajectories, Tensor]:
        """Answers of one round that go into pairs, with their rewards where they have some; and which draw of a prompt
        each belongs to."""
        filtered = self.source == "rso_sample_rank"
        count = self.candidates if filtered else self.num_samples
        size = count + (filtered and not self.pointwise)  # and one whose reward is 0
        options = {"temperature": self.temperature, **({"top_k": self.top_k} if self.top_k else {})}
        drawn = experience.collect(reference, self.prompts_per_round * size, group_size=size, **options)
        rows = torch.arange(len(drawn), device=drawn.mask.device).view(-1, size)
        traj, group = drawn[rows[:, :count].flatten()], rows[:, :count].flatten() // size
        if self.pointwise:
            traj = traj.judged(judge.feedback.score(traj))
        elif filtered:
            baseline = drawn[rows[:, -1:].expand(-1, count).flatten()]
            traj = traj.judged(reward_against(judge, traj, baseline))
        if not filtered:
            return traj, group
        pool = None
        if self.distinct:
            pool = first_of_equals(group, traj.inputs["step", "token"], traj.mask).view(-1, count)
        score = traj.score().view(-1, count)
        beta = max(self.beta, 1e-12)
        accepted = rejection_sample(score, beta, self.num_samples, generator, pool)
        first = count * torch.arange(len(accepted), device=accepted.device)[:, None]
        kept = (first + accepted)[accepted >= 0]
        rate = acceptance_rate(
            score, beta
        ).mean()  # near 1 / candidates where beta is small for these rewards
        run.log(reward=score.mean(), reward_accepted=traj[kept].score().mean(), acceptance=rate)
        return traj[kept], group[kept]

    def rank(
        self,
        run: Run,
        pairs: RankedPairs,
        step: int,
        traj: Trajectories,
        group: Tensor,
        judge: Judge,
        generator: torch.Generator,
    ) -> None:
        """Let the judge rank the answers to each prompt, and keep pairs of different answers."""
        if self.pointwise:
            total = traj.score()
            prefer = lambda a, b: torch.sigmoid(total[a] - total[b])
        else:
            prefer = lambda a, b: judge.compare(traj[a], traj[b])
        found = (first_round if self.ranking == "first_round" else tournament)(group, prefer, generator)
        token = torch.where(traj.mask, traj.inputs["step", "token"], -1)
        different = (token[found.chosen] != token[found.rejected]).any(1)
        run.log(
            pairs=different.sum() / self.prompts_per_round,
            different=different.float().mean(),
            strength=found.strength.mean(),
            length=traj.lengths.float().mean(),
        )
        write_answers(run, step, traj, None if traj.reward is None else traj.score())
        plain = pooled(traj)  # the loss is of probabilities at temperature 1, whatever the candidates' was
        plain.inputs.pop("sampler", None)
        pairs.add(step, plain, found.where(different))

    def win_rate(self, seed: int, actor: Role, reference: Role, texts: list[str], judge: Judge) -> float:
        """How often the judge prefers an answer of the actor to one of the untrained policy, on the same prompts and noise
        each time."""
        asked = texts[: self.select_prompts]
        seeds = [row_seeds(mix(seed, 0x451), side * len(asked), len(asked)) for side in range(2)]
        own, other = (role.sample(asked, s) for role, s in zip((actor, reference), seeds, strict=True))
        return float((judge.compare(own, other) > 0.5).float().mean())


@dataclass
class Judge:
    """The judge of pairs, asked in both orders if ``swap`` is set: (P(a, b) + 1 - P(b, a)) / 2."""

    feedback: Feedback
    swap: bool

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``."""
        p = compare(self.feedback, a, b)
        return (p + 1 - compare(self.feedback, b, a)) / 2 if self.swap else p


class RankedPairs(PairReplay):
    """Ranked pairs as data to make batches of."""

    @property
    def lengths(self) -> Tensor:
        """int64 ``[N]``, tokens of the longer answer of each pair."""
        longest = [torch.empty(0, dtype=torch.int64)]
        for chunk in self._chunks:
            length = chunk.traj.lengths
            longest.append(torch.maximum(length[chunk.pairs.chosen], length[chunk.pairs.rejected]).cpu())
        return torch.cat(longest)


def write_answers(run: Run, step: int, traj: Trajectories, reward: Tensor | None) -> None:
    """``samples/answers_N.jsonl``: each ranked answer with its prompt, its reward, and how it was sampled."""
    if traj.outputs is None or "text" not in traj.outputs:
        return
    how = {"temperature": traj.inputs["temperature"], **dict(traj.inputs.get("sampler", {}))}
    columns = {"prompt": traj.prompts, "text": traj.texts, **{k: v.tolist() for k, v in how.items()}}
    if reward is not None:
        columns["reward"] = reward.tolist()
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    run.samples.mkdir(parents=True, exist_ok=True)
    (run.samples / f"answers_{step}.jsonl").write_text("".join(lines), encoding="utf-8")
