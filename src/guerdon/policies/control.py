"""Controllers: policies that act on observations.

    Categorical         one of A actions (or one for each of D dials)
    Gaussian            a diagonal Gaussian in the environment's own units, one learned deviation per dimension
    SquashedGaussian    tanh of a Gaussian whose deviation depends on the state, scaled to the action's range
    Deterministic       tanh, scaled, with Gaussian noise for exploration
    Greedy              the best of A action values, now and then a random action (`guerdon.critics.greedy`)

All of them read ``inputs["step", "observation"]`` and write ``inputs["step", "action"]``. Randomness comes in from
outside as ``noise``, so that a step can be repeated, compiled, or taken elsewhere. On the CPU, controllers whose
observation is a flat vector act through NumPy on the memory of their own weights.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.errors import DataError, UsageError, nearest
from guerdon.objectives import divergence
from guerdon.policies.base import Policy, masked
from guerdon.policies.features import Features, numpy_perceptron, orthogonal, to_tensor

Act = Callable[[Any, np.ndarray | None], dict[str, np.ndarray]]
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class Controller(Policy):
    """What all controllers share.

    Args:
        features: from observations to feature vectors.

    Attributes:
        name: in `CLASSES`.
        noise: which random numbers acting needs: their kind, and how many for one row.
    """

    name: ClassVar[str]
    noise: tuple[Literal["normal", "gumbel", "uniform"], int]

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.log_temperature: nn.Parameter | None = None
        self._acting: tuple[nn.Parameter, int, Act] | None = None

    @property
    def default_target_entropy(self) -> float:
        """The entropy that published SAC aims at: minus the number of action dimensions in units of half the action's
        range; for discrete actions 0.98 of the most there can be."""
        raise NotImplementedError

    def learn_temperature(self, initial: float = 1.0) -> None:
        """Give the controller a temperature of its own, learned beside its weights (Haarnoja et al., 2018)."""
        self.log_temperature = nn.Parameter(torch.tensor(math.log(initial)))

    @classmethod
    def build(cls, features: Mapping[str, Any], **settings: Any) -> Controller:
        """A fresh controller from the plain data that its file holds: what the features' and its own ``settings``
        gave."""
        return cls(Features.from_settings(features), **settings)

    # -- to be supplied ------------------------------------------------------------------------------------

    def mode(self, observation: Any) -> Tensor:
        """The likeliest (or best) action ``[N, ...]`` at observations ``[N, ...]``."""
        raise NotImplementedError

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        """Act on observations ``[N, ...]``: ``{"action": [N, ...], ...}``, all that ``log_prob`` needs later.

        Args:
            noise: ``[N, K]`` as `noise` says; None takes the mode.
        """
        raise NotImplementedError

    def _numpy(self, forward: Any) -> Act | None:
        """`act` in NumPy, given ``forward(observation) -> outputs of the heads``; None where there is none."""
        return None

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        """Weight ``[width, outputs]`` and bias of each head, for `_numpy`."""
        return []

    def settings(self) -> dict[str, Any]:
        """Arguments of the class beside the features, as plain data."""
        raise NotImplementedError

    # -- acting --------------------------------------------------------------------------------------------

    def actor(self) -> Act:
        """The fastest function ``(observation, noise) -> {"action": ...}`` on NumPy arrays, without gradient.
        It always has the newest weights."""
        if self._acting is not None:  # as long as the weights lie where they lay, it reads them
            first, place, act = self._acting
            if first.data_ptr() == place:
                return act
        first = next(self.parameters())
        self._acting = (first, first.data_ptr(), self._make_actor())
        return self._acting[2]

    def _make_actor(self) -> Act:
        heads = self._heads()
        here = all(p.device.type == "cpu" for p in self.parameters())
        if heads and here and self.features.plain:
            fast = self._numpy(numpy_perceptron(self.features, heads))
            if fast is not None:
                return fast

        device = next(self.parameters()).device

        @torch.no_grad()
        def act(observation: Any, noise: np.ndarray | None) -> dict[str, np.ndarray]:
            drawn = None if noise is None else torch.from_numpy(noise).to(device)
            out = self.act(to_tensor(observation).to(device), drawn)
            return {name: value.cpu().numpy() for name, value in out.items()}

        return act

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: object
    ) -> Trajectories:
        """Controllers answer no prompts. Raises `UsageError`."""
        raise UsageError("a controller acts in an environment, it answers no prompts; give it one with --env")

    # -- files ---------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"policy": self.name, "features": self.features.settings(), **self.settings()}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(
            {
                name: value.detach().cpu().clone().contiguous()
                for name, value in self.state_dict().items()
                if name != "log_temperature"  # it serves training only
            },
            str(folder / "model.safetensors"),
        )


def load_controller(folder: str | Path) -> Controller:
    """The controller that `Controller.save_pretrained` wrote into ``folder``.

    Raises `DataError` when there is none, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cls = controller_class(config.pop("policy"))
        controller = cls.build(config.pop("features"), **config)
        controller.load_state_dict(load_file(str(folder / "model.safetensors")))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{folder} holds no controller that can be read: {error}") from error
    return controller


def _observation(traj: Trajectories) -> Any:
    return traj.inputs["step", "observation"]


class Categorical(Controller):
    """One of ``actions`` actions, or one for each of several dials.

    Args:
        features: from observations to feature vectors.
        actions: number of actions, or of positions of each dial.
        init: ``"orthogonal"`` (PPO's: gain sqrt 2, head 0.01) or ``"default"`` (PyTorch's).
    """

    name: ClassVar[str] = "categorical"
    kind: ClassVar[str] = "categorical"

    def __init__(
        self,
        features: Features,
        actions: int | Sequence[int],
        init: Literal["orthogonal", "default"] = "orthogonal",
    ) -> None:
        super().__init__(features)
        self.dials = None if isinstance(actions, int) else [int(a) for a in actions]
        self.actions = actions if isinstance(actions, int) else max(actions)
        outputs = self.actions * (1 if self.dials is None else len(self.dials))
        self.head = nn.Linear(features.width, outputs)
        if init == "orthogonal":
            orthogonal(self.features)
            orthogonal(self.head, 0.01)
        self.noise = ("gumbel", outputs)
        forbidden = torch.zeros(outputs)
        if self.dials is not None:
            rows = forbidden.view(len(self.dials), self.actions)
            for row, positions in zip(rows, self.dials, strict=True):
                row[positions:] = -math.inf
        self.forbidden: Tensor
        self.register_buffer("forbidden", forbidden, persistent=False)

    @property
    def default_target_entropy(self) -> float:
        return 0.98 * math.log(self.actions)

    def logits(self, observation: Any) -> Tensor:
        """``[..., A]``, or ``[..., D, A]`` with dials."""
        logits = self.head(self.features(observation))
        if self.dials is None:
            return logits
        return (logits + self.forbidden).unflatten(-1, (len(self.dials), self.actions))

    def distribution(self, traj: Trajectories) -> TensorDict:
        return TensorDict({"logits": self.logits(_observation(traj))}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        p = self.distribution(traj) if distribution is None else distribution
        return divergence.log_prob(p, traj.inputs["step", "action"], mask=traj.mask)

    def mode(self, observation: Any) -> Tensor:
        return self.logits(observation).argmax(-1)

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        logits = self.logits(observation)
        if noise is not None:  # the largest of logits plus Gumbel noise is a sample of the softmax
            logits = logits + noise.view(logits.shape)
        return {"action": logits.argmax(-1)}

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.head.weight.T, self.head.bias)] if self.dials is None else []

    def _numpy(self, forward: Any) -> Act:
        def act(observation: Any, noise: np.ndarray | None) -> dict[str, np.ndarray]:
            logits = forward(observation)[0]
            if noise is not None:
                logits += noise
            return {"action": logits.argmax(1)}

        return act

    def settings(self) -> dict[str, Any]:
        return {"actions": self.actions if self.dials is None else self.dials}


class Gaussian(Controller):
    """A diagonal Gaussian in the environment's units; the environment clips.

    Args:
        features: from observations to feature vectors.
        low, high: ``[A]``, the action's range (the mean is not squashed into it).
        log_std: where the learned, state-independent log deviations start.
        init: as for `Categorical`.
    """

    name: ClassVar[str] = "gaussian"
    kind: ClassVar[str] = "gaussian"

    def __init__(
        self,
        features: Features,
        low: Sequence[float],
        high: Sequence[float],
        log_std: float = 0.0,
        init: Literal["orthogonal", "default"] = "orthogonal",
    ) -> None:
        super().__init__(features)
        self.low, self.high = list(map(float, low)), list(map(float, high))
        self.head = nn.Linear(features.width, len(self.low))
        self.log_std = nn.Parameter(torch.full((len(self.low),), float(log_std)))
        if init == "orthogonal":
            orthogonal(self.features)
            orthogonal(self.head, 0.01)
        self.noise = ("normal", len(self.low))

    def distribution(self, traj: Trajectories) -> TensorDict:
        mean = self.mode(_observation(traj))
        return TensorDict(
            {"mean": mean, "std": self.log_std.exp().expand_as(mean)}, batch_size=traj.mask.shape
        )

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        p = self.distribution(traj) if distribution is None else distribution
        return divergence.log_prob(p, traj.inputs["step", "action"], mask=traj.mask)

    def mode(self, observation: Any) -> Tensor:
        return self.head(self.features(observation))

    def draw(self, observation: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``(action [N, A], log_prob [N])``, differentiable in the weights through both."""
        action = self.mode(observation) + self.log_std.exp() * noise
        return action, (-0.5 * noise.square() - self.log_std - _HALF_LOG_TAU).sum(-1)

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        mean = self.mode(observation)
        return {"action": mean if noise is None else mean + self.log_std.exp() * noise}

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.head.weight.T, self.head.bias)]

    def _numpy(self, forward: Any) -> Act:
        log_std = self.log_std.detach().numpy()

        def act(observation: Any, noise: np.ndarray | None) -> dict[str, np.ndarray]:
            mean = forward(observation)[0]
            if noise is not None:
                mean += np.exp(log_std) * noise
            return {"action": mean}

        return act

    def settings(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}


class SquashedGaussian(Controller):
    """``tanh`` of a Gaussian, scaled to ``[low, high]``: the actor of SAC (Haarnoja et al., 2018).

    ``distribution`` is that of the value before tanh, which travels as ``inputs["step", "raw"]``: the KL of two
    squashed Gaussians is that of the Gaussians. ``log_prob`` is of the action, with the change of variables.
    """

    name: ClassVar[str] = "squashed"
    kind: ClassVar[str] = "gaussian"
    LOG_STD = (-20.0, 2.0)

    def __init__(self, features: Features, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__(features)
        self.low, self.high = _range(low, high)
        size = len(self.low)
        self.mean = nn.Linear(features.width, size)
        self.log_std = nn.Linear(features.width, size)
        low_, high_ = torch.tensor(self.low), torch.tensor(self.high)
        self.scale: Tensor
        self.centre: Tensor
        self.register_buffer("scale", (high_ - low_) / 2, persistent=False)
        self.register_buffer("centre", (high_ + low_) / 2, persistent=False)
        self.noise = ("normal", size)

    @property
    def default_target_entropy(self) -> float:
        # published for actions in [-1, 1]; scaling the range shifts the entropy by the log of the scale
        return -float(len(self.low)) + float(self.scale.log().sum())

    def parameters_at(self, observation: Any) -> tuple[Tensor, Tensor]:
        """Mean and log deviation ``[..., A]`` of the value before tanh."""
        hidden = self.features(observation)
        return self.mean(hidden), self.log_std(hidden).clamp(*self.LOG_STD)

    def distribution(self, traj: Trajectories) -> TensorDict:
        mean, log_std = self.parameters_at(_observation(traj))
        return TensorDict({"mean": mean, "std": log_std.exp()}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        p = self.distribution(traj) if distribution is None else distribution
        raw = traj.inputs["step", "raw"]
        return masked(divergence.log_prob(p, raw, mask=traj.mask) - self._stretch(raw), traj.mask)

    def _stretch(self, raw: Tensor) -> Tensor:
        """``log |d action / d raw|``: ``2 (log 2 - u - softplus(-2 u))`` is ``log(1 - tanh(u)^2)``, exactly and
        without the cancellation."""
        slope = 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))
        return (slope + self.scale.log()).sum(-1)

    def squash(self, raw: Tensor) -> Tensor:
        """The action of a value before tanh."""
        return raw.tanh() * self.scale + self.centre

    def draw(self, observation: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``(action [N, A], log_prob [N])``, differentiable in the weights through both."""
        action, _, log_prob = self.draw_raw(observation, noise)
        return action, log_prob

    def draw_raw(self, observation: Any, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`draw`, with the value before tanh between the two."""
        mean, log_std = self.parameters_at(observation)
        raw = mean + log_std.exp() * noise
        log_prob = (-0.5 * noise.square() - log_std - _HALF_LOG_TAU).sum(-1) - self._stretch(raw)
        return self.squash(raw), raw, log_prob

    def log_prob_raw(self, observation: Any, raw: Tensor) -> Tensor:
        """``[N]``, of actions given by their value before tanh; differentiable in ``raw`` too."""
        mean, log_std = self.parameters_at(observation)
        gaussian = -0.5 * ((raw - mean) * (-log_std).exp()).square() - log_std - _HALF_LOG_TAU
        return gaussian.sum(-1) - self._stretch(raw)

    def mode(self, observation: Any) -> Tensor:
        return self.squash(self.parameters_at(observation)[0])

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        mean, log_std = self.parameters_at(observation)
        raw = mean if noise is None else mean + log_std.exp() * noise
        return {"action": self.squash(raw), "raw": raw}

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [(head.weight.T, head.bias) for head in (self.mean, self.log_std)]

    def _numpy(self, forward: Any) -> Act:
        scale, centre = self.scale.numpy(), self.centre.numpy()

        def act(observation: Any, noise: np.ndarray | None) -> dict[str, np.ndarray]:
            raw, log_std = forward(observation)
            if noise is not None:
                raw = raw + np.exp(np.clip(log_std, *self.LOG_STD)) * noise
            return {"action": np.tanh(raw) * scale + centre, "raw": raw}

        return act

    def settings(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}


class Deterministic(Controller):
    """``tanh``, scaled to ``[low, high]``; exploration adds Gaussian noise: the actor of TD3 (Fujimoto et al., 2018).

    Args:
        exploration: deviation of the noise, as a share of half the action's range.
    """

    name: ClassVar[str] = "deterministic"
    kind: ClassVar[str] = "deterministic"

    def __init__(
        self, features: Features, low: Sequence[float], high: Sequence[float], exploration: float = 0.1
    ) -> None:
        super().__init__(features)
        self.low, self.high = _range(low, high)
        self.exploration = exploration
        self.head = nn.Linear(features.width, len(self.low))
        low_, high_ = torch.tensor(self.low), torch.tensor(self.high)
        self.scale: Tensor
        self.centre: Tensor
        self.register_buffer("scale", (high_ - low_) / 2, persistent=False)
        self.register_buffer("centre", (high_ + low_) / 2, persistent=False)
        self.noise = ("normal", len(self.low))

    def distribution(self, traj: Trajectories) -> TensorDict:
        """A Gaussian of the exploration's width around the action."""
        mean = self.mode(_observation(traj))
        std = (self.exploration * self.scale).expand_as(mean)
        return TensorDict({"mean": mean, "std": std}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        p = self.distribution(traj) if distribution is None else distribution
        return divergence.log_prob(p, traj.inputs["step", "action"], mask=traj.mask)

    def mode(self, observation: Any) -> Tensor:
        return self.head(self.features(observation)).tanh() * self.scale + self.centre

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        action = self.mode(observation)
        if noise is not None:
            action = action + self.exploration * self.scale * noise
            action = torch.maximum(torch.minimum(action, self.centre + self.scale), self.centre - self.scale)
        return {"action": action}

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.head.weight.T, self.head.bias)]

    def _numpy(self, forward: Any) -> Act:
        scale, centre = self.scale.numpy(), self.centre.numpy()
        low, high = centre - scale, centre + scale

        def act(observation: Any, noise: np.ndarray | None) -> dict[str, np.ndarray]:
            action = np.tanh(forward(observation)[0]) * scale + centre
            if noise is not None:
                action = (action + self.exploration * scale * noise).clip(low, high)
            return {"action": action}

        return act

    def settings(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "exploration": self.exploration}


def _range(low: Sequence[float], high: Sequence[float]) -> tuple[list[float], list[float]]:
    lows, highs = [float(v) for v in low], [float(v) for v in high]
    if not all(math.isfinite(v) for v in lows + highs):
        raise UsageError(
            "this controller needs actions of a finite range; wrap the environment in RescaleAction, or use a Gaussian"
        )
    return lows, highs


# --- from spaces ------------------------------------------------------------------------------------------

# by string where a controller stands on a higher floor than this file
CLASSES: dict[str, type[Controller] | str] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "squashed": SquashedGaussian,
    "deterministic": Deterministic,
    "greedy": "guerdon.critics.greedy:Greedy",
    "small": "guerdon.policies.small:SmallController",
    "sequence": "guerdon.policies.action_sequence:SequenceGaussian",
}


def controller_class(which: str) -> type[Controller]:
    """One of `CLASSES`. Raises `UsageError` with the nearest name."""
    if which not in CLASSES:
        raise UsageError(f"there is no controller '{which}'; {nearest(which, CLASSES)}")
    entry = CLASSES[which]
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = CLASSES[which] = getattr(importlib.import_module(module), name)
    assert not isinstance(entry, str)
    return entry


def kinds_for(action_space: Any) -> tuple[str, ...]:
    """Kinds of policy that can act in a gymnasium action space. Raises `UsageError` where there is none."""
    name = type(action_space).__name__
    if name in ("Discrete", "MultiDiscrete"):
        return ("categorical",)
    if name == "Box" and len(action_space.shape) == 1:
        return ("gaussian", "deterministic")
    raise UsageError(
        f"no controller for the action space {action_space}; Discrete, MultiDiscrete and Box with one axis are known"
    )


def make_controller(which: str, features: Features, action_space: Any, **options: Any) -> Controller:
    """A fresh controller, one of `CLASSES`, for a gymnasium action space.

    Raises `UsageError` for one that does not fit the space.
    """
    cls = controller_class(which)
    if cls.kind not in kinds_for(action_space):
        raise UsageError(f"a {which} controller cannot act in {action_space}")
    if hasattr(action_space, "low"):
        return cls(features, action_space.low.tolist(), action_space.high.tolist(), **options)  # type: ignore[call-arg,arg-type]
    if hasattr(action_space, "nvec"):
        if which != "categorical":
            raise UsageError(f"a {which} controller takes one discrete action, not {action_space}")
        return Categorical(features, [int(n) for n in action_space.nvec], **options)
    return cls(features, int(action_space.n), **options)  # type: ignore[call-arg,arg-type]
