"""DNO: direct Nash optimisation (Rosset et al., 2024, arXiv 2404.03715).

A policy improves on itself by contrast: each iteration regresses its log-ratio against the iteration before it onto how
often its answers are preferred to that iteration's. The judge may prefer in circles, which no reward can express.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from guerdon.batch import Trajectories
from guerdon.errors import FeedbackError, UsageError
from guerdon.experience.datasets import Data
from guerdon.experience.pairs import PairReplay, beside_teacher, pooled, soft_pairs, teacher_wins, win_rates
from guerdon.experience.views import split_rows
from guerdon.feedback.base import Feedback, compare
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.sides import with_reference
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.sampling import Pairs, margin_pairs, repeated_ngram_defect


@dataclass
class DNO:
    """Direct Nash optimisation, in its practical form or as the regression on win rates. Defaults are the paper's (a
    7-billion-weight model; its judge's 6 points stand for a win rate of 0 to 1).

    Of its ablations ``iterations=1`` is offline DPO on the untrained policy's answers, ``pairs``, ``reference`` and
    ``lookahead`` are the others.
    """

    headline: ClassVar[str] = "win_rate"
    judged: ClassVar[bool] = True

    iterations: int = 3  # rounds of answering and learning, each on prompts of its own
    samples: int = 5  # answers of the policy to each prompt, beside the teacher's
    temperature: float = 0.7  # of these answers
    top_p: float = 0.95  # they are drawn from the likeliest tokens that have this probability together
    mode: Literal["pairs", "soft"] = "pairs"  # large-margin pairs (algorithm 2), or regression (algorithm 1)
    pairs: Literal["all", "restrictive", "spin"] = "all"  # judged; those that the teacher won; teacher wins
    rank: Literal["win_rate", "score"] = "win_rate"  # rank answers by comparing them, or by scores
    min_positive: float = 0.5  # the better answer of a pair has at least this win rate (or score)
    margin: float = 1 / 3  # the worse one has at least so much less where the better one is the teacher's
    student_margin: float = 1 / 6  # the same where it is the policy's own
    ngram: int = 3  # answers that repeat n-grams of this size lose unjudged; 0 judges all
    ngram_limit: float = 0.5  # share of an answer's n-grams that may be repetitions
    eta: float = 0.1  # scale of the log-ratios (the beta of DPO)
    nll: float = 0.0  # weight of the better answers' negative log-likelihood
    replay: float = 0.3  # largest share of pairs from the iteration before; half of it from the next older
    reference: Literal["previous", "initial"] = "previous"  # the policy that log-ratios are against
    lookahead: bool = False  # in the end train the untrained policy once on the pairs of all iterations
    returns: Literal["best", "last"] = "best"  # the iteration that beats the teacher most often, held out
    validation: int = 256  # prompts that are held out
    save_iterations: bool = False  # write the model of each iteration into the run's folder
    parts: int = 20  # steps of answering, and of learning, in an iteration; between them a run can be stopped
    batch_size: int = 64  # pairs an optimiser step
    lr: float = 5e-5  # of AdamW
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs a forward and backward pass

    def __post_init__(self) -> None:
        if self.samples < (2 if self.mode == "soft" else 1):
            raise UsageError(f"samples is {self.samples}; there is nothing to compare them with")

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        return {"actor": RoleSettings(AdamW(self.lr), self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, demonstrations: Data, feedback: Feedback) -> None:
        """Answer, judge, pair; learn the pairs in one pass; the next iteration starts from there."""
        frozen = not self.lora_rank  # of an adapted actor a frozen copy is its reference, which cannot move
        initial = actor.copy(frozen=True)
        previous = run.adopt("previous", actor.copy(frozen, "previous"))
        best = run.adopt("best", actor.copy(frozen, "best"))
        fresh = run.adopt("fresh", actor.copy(False, "fresh")) if self.lookahead else actor
        replay = run.track("pairs", PairReplay(soft=self.mode == "soft"))
        objective = PairwiseObjective(beta=self.eta, nll=self.nll)
        splits = split_rows(len(demonstrations), self.iterations, self.validation, mix(run.seed, 12))
        plan = [(t, verb) for t in range(self.iterations) for verb in ("answer", "learn")]
        plan += [(self.iterations, "look ahead")] if self.lookahead else []
        total = len(plan) * self.parts
        for step in run.steps(total, "part"):
            (t, verb), part = plan[step // self.parts], step % self.parts
            order = torch.Generator().manual_seed(mix(run.seed, t))
            if verb == "answer":
                if part == 0 and self.reference == "previous":
                    previous.follow(actor, 1.0)
                for rows in splits[t].tensor_split(self.parts)[part].split(self.batch_size):
                    if len(rows):
                        teacher, seed = demonstrations.take(rows), mix(run.seed, 1, int(rows[0]))
                        traj, pairs = self.answered(actor, teacher, feedback, seed)
                        replay.add(t, traj, pairs)
                        run.log(pairs=len(pairs) / len(rows), length=traj.lengths.float().mean())
                continue
            if verb == "learn":  # this iteration's pairs and some of older ones
                student, reference, numbers = actor, previous, replay.mixed(t, self.replay, order)
            else:  # the untrained policy, on the pairs of all iterations
                student, reference, numbers = fresh, initial, torch.randperm(len(replay), generator=order)
            if not len(numbers):
                raise FeedbackError(f"no two answers of iteration {t + 1} differ by the margins; lower them")
            for batch in numbers.split(self.batch_size)[part :: self.parts]:
                run.log(**student.update(with_reference(replay.take(batch), reference), objective))
            if part + 1 == self.parts:
                held_out = demonstrations.take(splits[-1])
                figures = self.measure(run.seed, student, previous, held_out, feedback)
                run.log(**figures)
                if self.save_iterations:
                    student.save(run.folder / "iterations" / str(t + 1))
                if figures["win_rate"] > run.state.get("best", 0.0) or student is not actor:
                    run.state["best"] = figures["win_rate"]
                    best.follow(student, 1.0)
            if step + 1 == total and self.returns == "best":
                actor.follow(best, 1.0)

    def sampled(self, role: Role, prompts: list[str], seed: int) -> Trajectories:
        """Answers to these prompts."""
        seeds = row_seeds(seed, 0, len(prompts))
        return role.sample(prompts, seeds, temperature=self.temperature, top_p=self.top_p)

    def answered(
        self, actor: Role, teacher: Trajectories, feedback: Feedback, seed: int
    ) -> tuple[Trajectories, Pairs]:
        """The policy's answers to the teacher's prompts, the teacher's, and the pairs that the judge makes of them."""
        student = self.sampled(actor, [p for p in teacher.prompts for _ in range(self.samples)], seed)
        traj, group, own = beside_teacher(student, teacher)
        if self.pairs == "spin":  # not judged: the teacher is right
            return traj, teacher_wins(group, own)
        prefer = lambda a, b: compare(feedback, traj[a], traj[b])
        if self.mode == "soft":
            return traj, soft_pairs(win_rates(group, prefer, opponents=own), group)
        defect = None
        if self.ngram and "token" in traj.inputs["step"]:
            token = traj.inputs["step", "token"]
            defect = own & repeated_ngram_defect(token, traj.mask, self.ngram, self.ngram_limit).cpu()
        if self.rank == "score":
            score = feedback.score(traj).cpu()
        else:
            generator = torch.Generator().manual_seed(mix(seed, 1))
            score = win_rates(group, prefer, defect=defect, generator=generator)
        pairs = margin_pairs(score, group, self.margin, self.min_positive, own, self.student_margin, defect)
        return traj, pairs.where(~own[pairs.chosen]) if self.pairs == "restrictive" else pairs

    def measure(
        self, seed: int, actor: Role, previous: Role, teacher: Trajectories, feedback: Feedback
    ) -> dict[str, float]:
        """On the prompts held out: the win rates over the teacher and over the iteration before, and the length."""
        own = pooled(self.sampled(actor, teacher.prompts, mix(seed, 13)))
        before = pooled(self.sampled(previous, teacher.prompts, mix(seed, 14)))
        return {
            "win_rate": float(compare(feedback, own, pooled(teacher)).mean()),
            "win_rate_previous": float(compare(feedback, own, before).mean()),
            "length_held_out": float(own.lengths.float().mean()),
        }
