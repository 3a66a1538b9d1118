"""DPA: directional preference alignment (Wang et al., 2024, arXiv 2402.18571).

A user is a direction in the space of several rewards, written into the prompt as numbers. One model learns all of them:
for each prompt and direction it keeps, of many answers, the one that goes furthest that way, and is fine-tuned on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.experience.datasets import Data, batch_count
from guerdon.experience.directions import (
    SYSTEM,
    DirectionalPrompt,
    DirectionSampler,
    answer_prompts,
    objective_weights,
    reprompted,
)
from guerdon.experience.prompts import Prompted
from guerdon.objectives.judges import AttributeRegression
from guerdon.objectives.likelihood import WeightedLikelihood
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class DPA:
    """Rejection sampling with the direction in the prompt. Answers a prompt, learning rates and the range of angles are
    the paper's; other values are ours."""

    headline: ClassVar[str] = "best"
    home: ClassVar[str] = "topics"  # the task when none is named

    iterations: int = 2  # rounds of sampling and fine-tuning; each samples from the policy as it then is
    prompts_per_iteration: int = 20_000  # prompts answered an iteration
    directions: int = 4  # directions each of these prompts is asked with
    candidates: int = 80  # answers to a prompt and a direction, of which the best is kept
    spread: float = 45.0  # degrees that directions lie apart from the centre at most
    centre: float = 0.0  # degrees from the first objective towards the second
    objectives: str = "helpfulness,verbosity"  # their names in the prompt, as many as a direction has numbers
    outputs: str = (
        ""  # outputs of the reward model that make up each, as in "0,1,5;4" (averaged); "" takes one each
    )
    system: str = SYSTEM  # how the prompt says it; the weighted sum replaces {rating}
    normalise: bool = (
        False  # divide objectives by their deviation over the candidates, where they share no scale
    )
    epochs: int = 2  # passes over the kept answers of an iteration
    batch_size: int = 32  # answers an optimiser step
    lr: float = 1e-5  # of AdamW
    reward_epochs: int = 1  # passes over the rated answers that teach the reward model; 0 takes it as it is
    reward_batch: int = 64  # rated answers an optimiser step
    reward_lr: float = 1e-5  # of AdamW
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # answers a forward and backward pass
    sample_batch: int | None = 1024  # answers drawn or judged at a time

    def __post_init__(self) -> None:
        for name in ("candidates", "directions", "prompts_per_iteration"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self.renderer = DirectionalPrompt(tuple(n.strip() for n in self.objectives.split(",")), self.system)
        self.sampler = DirectionSampler(len(self.renderer.names), self.spread, self.centre)

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor and the reward model are held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        size = {"micro_batch": self.micro_batch, "sample_batch": self.sample_batch}
        return {
            "actor": RoleSettings(AdamW(self.lr, "cosine", total=None), self.max_grad_norm, lora, **size),
            "reward": RoleSettings(AdamW(self.reward_lr, "cosine", total=None), self.max_grad_norm, **size),
        }

    def train(
        self, run: Run, actor: Role, reward: Role, experience: Prompted, rated: Data | None = None
    ) -> None:
        """Fit the reward model to ratings (``inputs["rating"] [B, k]``); then answer, keep the best, learn it; repeat."""
        if rated is not None and self.reward_epochs:
            reward.expect(batch_count(len(rated), self.reward_batch, self.reward_epochs))
            for batch in run.batches(rated, self.reward_batch, self.reward_epochs):
                figures = reward.update(batch, AttributeRegression())
                run.step({f"reward_{name}": value for name, value in figures.items()})
        kept = self.prompts_per_iteration * self.directions
        actor.expect(self.iterations * batch_count(kept, self.batch_size, self.epochs))
        for number in run.steps(self.iterations, "iteration"):
            best, figures = self.kept(run, number, actor, reward, experience)
            learned = actor.fit(best, WeightedLikelihood(), self.epochs, self.batch_size, run.generator)
            run.log(**figures, **learned)

    def kept(
        self, run: Run, number: int, actor: Role, reward: Role, experience: Prompted
    ) -> tuple[Trajectories, dict[str, Tensor]]:
        """The best answer for each prompt and direction, ``[P D]`` behind the prompt that names this direction; and
        figures of all candidates."""
        P, D, n = self.prompts_per_iteration, self.directions, self.candidates
        direction = self.sampler.draw(P, D, torch.Generator().manual_seed(mix(run.seed, 0xD9A, number)))
        places = experience.prompts.draw(P)
        bare = [self.renderer.plain(experience.prompts.texts[place]) for place in places]
        written = self.written(places, direction, experience)
        # before it has learned anything the policy does not heed directions: they share a prompt's candidates
        asked = bare if number == 0 else written
        repeated = [text for text in asked for _ in range(n)]
        owners = [place for place in places for _ in range(len(repeated) // P)]
        traj = answer_prompts(experience, actor, repeated, owners)
        shown = [text for text in bare for _ in range(len(repeated) // P)]
        value = self.objective_values(actor, reward, traj, shown).view(P, -1, n, len(self.renderer.names))
        score = torch.einsum("pdk,pdnk->pdn", direction, value.expand(P, D, n, -1))
        first = torch.arange(0, len(repeated), n).view(P, -1).expand(P, D)
        rows = (first + score.argmax(-1)).flatten()
        best = actor.evaluate(partial(reprompted, prompts=written), traj[rows.to(traj.mask.device)])
        means = value.mean((0, 1, 2))
        figures = {
            "reward": score.mean(),
            "best": score.amax(-1).mean(),
            "length": traj.lengths.float().mean(),
            "length_best": best.lengths.float().mean(),
            **dict(zip(self.renderer.names, means, strict=True)),
        }
        return best, figures

    def written(self, places: list[int], direction: Tensor, experience: Prompted) -> list[str]:
        """The prompts ``[P D]`` with their directions ``[P, D, k]`` in them: exact ones rank, rounded ones are read."""
        texts = experience.prompts.texts
        pairs = ((texts[place], v) for place, row in zip(places, direction, strict=True) for v in row)
        return [self.renderer.write(text, v) for text, v in pairs]

    def objective_values(self, actor: Role, reward: Role, traj: Trajectories, prompts: list[str]) -> Tensor:
        """``[B, k]``: what the reward model says of the answers, behind prompts without a direction."""
        traj = actor.evaluate(partial(reprompted, prompts=prompts), traj)
        score: Any = lambda model, batch: model.scores(batch)
        size = self.sample_batch or len(traj)
        found = [reward.evaluate(score, part).cpu() for part in traj.minibatches(size)]
        value = torch.cat(found)
        value = value @ objective_weights(self.outputs, len(self.renderer.names), value.shape[1])
        return value / value.std(0).clamp(min=1e-6) if self.normalise else value
