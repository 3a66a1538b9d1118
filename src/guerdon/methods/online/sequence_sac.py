"""SequenceSAC: sequences of actions from one observation, by a critic and a model of single steps (Patel and
Siegelmann, 2025, arXiv 2410.08979; there called SRL). Model and critic serve training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from guerdon.critics.action import ActionCritic
from guerdon.dynamics.one_step import OneStepModel
from guerdon.errors import UsageError
from guerdon.experience.action_repeat import SequenceSteps
from guerdon.experience.replay import Replay
from guerdon.experience.rollouts import Rollouts
from guerdon.objectives.sequence import (
    LatentPrediction,
    OneStepPrediction,
    Recall,
    SequenceBellman,
    SequenceImprovement,
    TimeAwareBellman,
)
from guerdon.optim import Adam
from guerdon.policies.action_sequence import Encoder, SequenceGaussian
from guerdon.policies.features import Activation, Entry, Features
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class SequenceSAC:
    """Soft actor-critic whose recurrent actor decides once for several steps."""

    controllers: ClassVar[Mapping[str, str]] = {"gaussian": "sequence"}
    default_env: ClassVar[str] = "Pendulum-v1"

    steps: int = 1_000_000  # environment steps
    start: int = 10_000  # steps of random actions before learning
    length: int = 8  # J, actions in a sequence, and steps between updates of the actor
    batch_size: int = 256  # rows an update
    buffer_size: int = 1_000_000  # steps remembered
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share by which the targets of critic and model follow, each step
    lr: float = 3e-4  # of actor, critic, model and temperature
    learn_temperature: bool = True  # adjust the temperature to a target entropy
    alpha: float = 1.0  # temperature, or where it starts
    target_entropy: float | None = None  # nats of one action; -dim(A) in units of half its range if none
    critics: int = 2  # members of the ensemble whose minimum counts
    hidden: tuple[int, ...] = (256,)  # widths of the actor's features; the last is the recurrent state's
    critic_hidden: tuple[int, ...] = (256, 256)  # widths of the critic
    model_hidden: tuple[int, ...] = (400, 300)  # widths of the model
    activation: Activation = "relu"  # of actor and critic
    cell: Literal["gru", "rnn"] = "gru"  # the actor's recurrence
    recall: Recall = "model"  # later states: by the model, with its gradient, from the replay, or none
    time_aware: bool = False  # tell the critic how far into the sequence an action is
    latent: int = 0  # width of learned states (published: 50); 0 takes the observation
    horizon: int = 5  # steps that a latent model foresees in training
    decay: float = 0.5  # weight of each of them relative to the one before
    environments: int = 1  # environments side by side

    @property
    def controller_options(self) -> dict[str, Any]:
        """What the actor is made with, beside its features."""
        return {"cell": self.cell, "latent": self.latent}

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained; critic and model likewise."""
        return {"actor": RoleSettings(Adam(self.lr), max_grad_norm=None)}

    def train(self, run: Run, actor: Role, experience: Rollouts) -> None:
        """Act in sequences, remember single steps; for each step update critic and model, every J-th time the actor."""
        policy = self._fitting(actor.model)
        held = self.roles()["actor"]
        critic = run.adopt("critic", run.engine.role("critic", self.make_critic(policy), settings=held))
        target = run.adopt("target", critic.copy(frozen=True))
        replay = run.track("replay", experience.replay(self.buffer_size, gamma=self.gamma))
        acting = run.track("acting", SequenceSteps(experience, actor, self.length))
        recalled: dict[str, Role] = {}
        if self.recall in ("model", "backprop"):
            model = run.adopt("model", run.engine.role("model", self.make_model(policy), settings=held))
            recalled = {"recalled": run.adopt("model_target", model.copy(frozen=True))}
            if self.latent:
                policy.take_encoder(model.model.encoder)  # type: ignore[arg-type]

        bellman = SequenceBellman(self.alpha)
        timed = TimeAwareBellman(self.length, self.alpha)
        improvement = SequenceImprovement(
            self.length,
            policy.default_target_entropy if self.target_entropy is None else self.target_entropy,
            self.alpha,
            self.recall,
            self.time_aware,
        )
        prediction, foresight = OneStepPrediction(), LatentPrediction(self.horizon, self.decay)

        n = experience.environments.n
        record = n * max(1, 1000 // n)  # environment steps in one record of the metrics
        for _ in run.steps(-(-self.steps // record), what="thousand steps"):
            for _ in range(0, record, n):
                warm = experience.taken < self.start
                acting.advance(1, into=replay, random=warm)
                for _ in range(0 if warm else n):
                    if self.time_aware:
                        batch = replay.windows(self.batch_size, self.length)
                        figures = critic.update(batch, timed, target=target, actor=actor, **recalled)
                    else:
                        batch = replay.sample(self.batch_size)
                        figures = critic.update(batch, bellman, target=target, actor=actor)
                    run.log(value_loss=figures["loss"], q=figures["q"])
                    batch = self._second(replay)
                    if recalled and self.latent:
                        runs = replay.windows(self.batch_size, self.horizon, draws=1)
                        figures = model.update(runs, foresight, target=recalled["recalled"])
                        policy.take_encoder(model.model.encoder)  # type: ignore[arg-type]
                        run.log(model_loss=figures["loss"])
                    elif recalled:
                        run.log(model_loss=model.update(batch, prediction, actor=actor)["loss"])
                    if critic.updates % self.length == 0:
                        run.log(**actor.update(batch, improvement, critic=critic, **recalled))
                    target.follow(critic, self.tau)
                    if recalled:
                        recalled["recalled"].follow(model, self.tau)
            counts = {"critic_updates": critic.updates, "actor_updates": actor.updates}
            run.log(**experience.statistics(), decisions=acting.decisions, **counts)

    def _second(self, replay: Replay) -> Any:
        """What model and actor learn from: drawn apart from the critic's batch."""
        if self.recall == "replay":
            return replay.windows(self.batch_size, self.length, draws=1, previous_action=True)
        return replay.sample(self.batch_size, draws=self.length, previous_action=True)

    def _fitting(self, policy: Any) -> SequenceGaussian:
        """The actor, if these options can train it."""
        if not isinstance(policy, SequenceGaussian):
            raise UsageError(f"SequenceSAC trains a sequence policy, not a {type(policy).__name__}")
        if (policy.cell_kind, policy.latent) != (self.cell, self.latent):
            raise UsageError(
                f"the actor has cell '{policy.cell_kind}' and latent {policy.latent}; set these options of SequenceSAC "
                "to the same values"
            )
        if self.latent and self.recall not in ("model", "backprop"):
            raise UsageError("latent states are learned with a model; use recall='model' or latent=0")
        if self.time_aware and self.recall != "model":
            raise UsageError("a time-aware critic is trained on what the model recalls; use recall='model'")
        return policy

    def _state(self, policy: SequenceGaussian, more: int = 0) -> Features:
        """States as they are."""
        return Features({"": Entry((policy.state_size + more,))}, (), self.activation)

    def make_critic(self, policy: SequenceGaussian) -> ActionCritic:
        """A fresh critic of single steps for ``policy``."""
        return ActionCritic(
            self._state(policy, more=int(self.time_aware)),
            action=len(policy.low),
            hidden=self.critic_hidden,
            activation=self.activation,
            members=self.critics,
        )

    def make_model(self, policy: SequenceGaussian) -> OneStepModel:
        """A fresh model of the environment for ``policy``."""
        encoder = None
        if self.latent:
            encoder = Encoder(Features.from_settings(policy.features.settings()), self.latent)
        return OneStepModel(policy.state_size, len(policy.low), self.model_hidden, encoder)
