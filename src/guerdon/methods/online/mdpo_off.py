"""MDPO, off policy: mirror descent policy optimisation from replay (Tomar et al., 2022, arXiv 2005.09814).

A relative of SAC whose policy also stays near the one it was some steps ago, by the KL divergence or Tsallis'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from guerdon.critics.state import StateCritic
from guerdon.experience.rollouts import Rollouts
from guerdon.objectives.mirror_descent import SoftMirrorDescent, SoftValue, ValueBellman
from guerdon.optim import Adam
from guerdon.policies.features import Activation, Features
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class MDPOOff:
    """Mirror descent policy optimisation from replay, with twin action values and a state value."""

    controllers: ClassVar[Mapping[str, str]] = {"gaussian": "squashed"}
    critic_kind: ClassVar[str] = "action"
    default_env: ClassVar[str] = "Pendulum-v1"

    steps: int = 1_000_000  # environment steps
    start: int = 10_000  # steps of random actions before learning
    m: int = 1000  # environment steps between refreshes of the policy that this one stays near
    kl: float = 0.5  # 1/t_k, the weight of the divergence (published: 0.3 to 0.8 by task)
    entropy: float = 0.2  # lambda, what a nat of entropy is worth (0: "hard" MDPO)
    q: float = 1.0  # of Tsallis' logarithm, 1 to 2; 1 is the KL divergence
    regulariser: float = 1e-3  # cost of the squares of the Gaussian's mean and log deviation
    act_by_mean: bool = False  # after the start, act without noise, as the published script does
    batch_size: int = 256  # rows an update; one update for each environment step
    buffer_size: int = 1_000_000  # steps remembered
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share by which the target value follows, each update
    lr: float = 3e-4  # of actor, critic and state value
    hidden: tuple[int, ...] = (256, 256)  # widths of the networks
    activation: Activation = "relu"  # of the networks
    environments: int = 1  # environments side by side

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        return {name: RoleSettings(Adam(self.lr), max_grad_norm=None) for name in ("actor", "critic")}

    def train(self, run: Run, actor: Role, experience: Rollouts, critic: Role) -> None:
        """Act, remember, and for each step make one update of critic, state value, actor and target; now and then
        let the old policy catch up."""
        features = Features(actor.model.features.entries, self.hidden, self.activation)
        state_critic = StateCritic(features, init="default", scale=1.0)
        value = run.role("value", state_critic, settings=self.roles()["critic"])
        target = run.adopt("target", value.copy(frozen=True))
        old = run.adopt("old", actor.copy(frozen=True))
        replay = run.track("replay", experience.replay(self.buffer_size, gamma=self.gamma))
        bellman, soft_value = ValueBellman(), SoftValue(self.entropy, self.q)
        improvement = SoftMirrorDescent(self.kl, self.entropy, self.q, self.regulariser)
        acts: Any = _WithoutNoise(actor) if self.act_by_mean else actor
        n = experience.environments.n
        report = 1000  # environment steps in one record of the metrics
        for _ in run.steps(-(-self.steps // report), what="thousand steps"):
            for _ in range(0, report, n):
                warm = experience.taken < self.start
                experience.advance(None if warm else acts, 1, into=replay)
                if experience.taken % self.m < n:
                    old.follow(actor, tau=1.0)
                if warm:
                    continue
                for _ in range(n):
                    batch = replay.sample(self.batch_size)
                    fitted = critic.update(batch, bellman, target=target)
                    value.update(batch, soft_value, actor=actor, critic=critic)
                    run.log(value_loss=fitted["loss"], q=fitted["q"])
                    run.log(**actor.update(batch, improvement, critic=critic, old=old))
                    target.follow(value, self.tau)
            run.log(**experience.statistics())


class _WithoutNoise:
    """An actor that takes its likeliest action."""

    def __init__(self, actor: Role) -> None:
        self.model, self._actor = actor.model, actor

    def acting(self) -> Any:
        """As `Role.acting`; the noise it is given is not used."""
        act = self._actor.acting()
        return lambda observation, noise: act(observation, None)
