"""RND-PPO: PPO with a novelty bonus from random network distillation, for rewards that are hardly ever paid.

The method of Yin et al., "Random Network Distillation Based Deep Reinforcement Learning for AGV Path Planning"
(IEEE IV 2024, arXiv 2404.12594), which adds the bonus to the reward (``mode="sum"``), and that of Burda et al.,
"Exploration by Random Network Distillation" (2019, arXiv 1810.12894), in which bonus and reward are two streams with a
critic each, and novelty knows no episodes (``mode="two_stream"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from guerdon.credit import gae, normalise
from guerdon.critics.state import StateCritic
from guerdon.errors import UsageError, nearest
from guerdon.evaluation.coverage import Coverage
from guerdon.experience.rollouts import Rollouts
from guerdon.feedback.base import Feedback
from guerdon.feedback.intrinsic import RandomNetwork, RNDBonus, next_observation
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.value import ValueRegression
from guerdon.optim import Adam
from guerdon.policies.features import Activation, Features, to_tensor
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run

Mode = Literal["sum", "two_stream"]
Bonus = Literal["rnd", "shuffled", "noise", "none"]


@dataclass
class RNDPPO:
    """Proximal policy optimisation with a bonus for what random network distillation finds new."""

    default_env: ClassVar[str] = "MountainCarContinuous-v0"
    # its mean starts at the middle of the action's range, also where that is not zero (a speed)
    controllers: ClassVar[Mapping[str, str]] = {"gaussian": "squashed"}

    rounds: int = 75  # rounds of sampling and learning
    samples: int = 8192  # environment steps a round
    epochs: int = 4  # passes over each round's samples
    minibatch: int = 1024  # steps an optimiser step
    mode: Mode = "two_stream"  # add bonus and reward, or keep two streams with a critic each
    bonus: Bonus = "rnd"  # what is paid; shuffled and noise are controls, none is plain PPO
    bonus_weight: float = 1.0  # of the bonus (two_stream: of its advantage)
    bonus_schedule: Literal["constant", "linear"] = "constant"  # the weight stays, or falls to 0 at the end
    reward_weight: float = 2.0  # of the reward's advantage (two_stream)
    bonus_gamma: float = 0.99  # discount of later bonuses
    gamma: float = 0.999  # discount of later rewards (sum: of both)
    lam: float = 0.95  # lambda of generalised advantage estimation
    clip: float = 0.2  # how far the probability ratio may move from 1
    entropy: float = 0.001  # weight of an entropy bonus
    lr: float = 3e-4  # of the actor's Adam
    critic_lr: float = 1e-3  # of the critics' Adam
    predictor_lr: float = 1e-3  # of the predictor's Adam
    proportion: float = 0.25  # probability with which the predictor learns from a step
    novelty_hidden: tuple[int, ...] = (128, 128)  # widths of the random network; the predictor has one more
    embedding: int = 64  # numbers that the random network gives
    novelty_columns: tuple[int, int] | None = None  # first and past-the-last entry judged (none: all)
    warm_up: int = 6400  # steps for the statistics of observations before the first round
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this
    environments: int = 64  # environments side by side
    hidden: tuple[int, ...] = (128, 128)  # widths of actor and critics
    activation: Activation = "tanh"  # of actor and critics
    normalise_observation: bool = False  # for actor and critics, by running statistics

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("bonus", get_args(Bonus))):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"rnd_ppo: {name} is '{value}'; {nearest(value, known)}")
        if not 0 < self.proportion <= 1:
            raise UsageError(f"rnd_ppo: proportion is {self.proportion}; it is a probability above 0")

    def roles(self) -> dict[str, RoleSettings]:
        """How actor, critic and predictor are held and trained."""
        return {
            "actor": RoleSettings(Adam(self.lr, eps=1e-5), self.max_grad_norm),
            "critic": RoleSettings(Adam(self.critic_lr, eps=1e-5), self.max_grad_norm),
            "predictor": RoleSettings(Adam(self.predictor_lr), max_grad_norm=None),
        }

    def train(self, run: Run, actor: Role, experience: Rollouts, feedback: Feedback, critic: Role) -> None:
        """Act, price what was new, estimate both advantages, take clipped steps, and let the predictor catch up."""
        bonus = None if self.bonus == "none" else self._bonus(run, experience)
        intrinsic_critic = None
        if bonus is not None and self.mode == "two_stream":
            intrinsic_critic = run.role("intrinsic_critic", _sibling(critic), settings=self.roles()["critic"])
        coverage = Coverage.of(experience.environments.observation_space)
        if coverage is not None:
            run.track("coverage", coverage)
        objective, regression = ClippedSurrogate(clip=self.clip, entropy=self.entropy), ValueRegression()
        passes = {"epochs": self.epochs, "minibatch": self.minibatch, "generator": run.generator}

        for step in run.steps(self.rounds):
            if step == 0 and bonus is not None:
                n = experience.environments.n
                untrained = experience.collect(actor, -(-self.warm_up // n) * n)
                bonus.observe(untrained.inputs["step", "observation"])
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            present = to_tensor(experience.environments.observation).to(actor.device)
            following = next_observation(traj, present)
            if coverage is not None:
                coverage.add(following.cpu())
                run.log(coverage=coverage.count)

            if bonus is not None:
                bonus.observe(following)
                novel = bonus.reward(following)
                weight = self.bonus_weight * (
                    1 - step / self.rounds if self.bonus_schedule == "linear" else 1
                )
                run.log(bonus=novel.mean(), bonus_weight=weight)
                if self.mode == "sum":
                    assert traj.reward is not None
                    traj.reward = traj.reward + weight * novel
            traj.value = critic.value(traj)
            advantage, traj.target = gae(
                traj.reward,
                traj.value,
                traj.mask,
                traj.terminated,
                traj.truncated,
                next_value=critic.next_value(traj),
                gamma=self.gamma,
                lam=self.lam,
            )
            if intrinsic_critic is not None:
                stream = traj.with_(value=intrinsic_critic.value(traj))
                novel_advantage, stream.target = gae(  # across the ends of episodes: a row is one long life
                    novel,
                    stream.value,
                    stream.mask,
                    bootstrap=intrinsic_critic.evaluate(lambda model, seen: model.values(seen), present),
                    gamma=self.bonus_gamma,
                    lam=self.lam,
                )
                advantage = self.reward_weight * advantage + weight * novel_advantage
            traj.advantage = normalise(advantage, traj.mask)

            data = traj.as_rows()
            run.log(**actor.fit(data, objective, **passes))
            run.log(value_loss=critic.fit(data, regression, **passes)["loss"])
            if intrinsic_critic is not None:
                run.log(bonus_value_loss=intrinsic_critic.fit(stream.as_rows(), regression, **passes)["loss"])
            if bonus is not None:
                learned = bonus.learn(following, self.proportion, 1, self.minibatch, run.generator)
                run.log(predictor_loss=learned["loss"])
            run.log(**experience.statistics(traj))

    def _bonus(self, run: Run, experience: Rollouts) -> RNDBonus:
        shape = experience.environments.observation_space.shape
        if shape is None or len(shape) != 1:
            raise UsageError(
                f"rnd_ppo judges observations that are flat vectors, but those of {experience.environments.id} are "
                f"{experience.environments.observation_space}; flatten them first"
            )
        first, last = self.novelty_columns or (0, shape[0])
        if not 0 <= first < last <= shape[0]:
            raise UsageError(
                f"rnd_ppo: novelty_columns are {first} to {last}, but the observation has {shape[0]} entries"
            )
        model = RandomNetwork(last - first, self.novelty_hidden, self.embedding)
        role = run.role("predictor", model, settings=self.roles()["predictor"])
        control = "none" if self.bonus == "rnd" else self.bonus
        n = experience.environments.n
        bonus = RNDBonus(role, n, self.bonus_gamma, (first, last), control, run.generator)  # type: ignore[arg-type]
        return run.track("bonus", bonus)  # type: ignore[return-value]


def _sibling(critic: Role) -> StateCritic:
    """Another critic of the same make with weights of its own. What normalises observations is shared."""
    features: Features = critic.model.features  # type: ignore[assignment]
    return StateCritic(
        Features(features.entries, features.hidden, features.activation, scaler=features.scaler)
    )
