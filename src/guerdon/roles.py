"""A model with its optimiser behind a few verbs: the only way a method touches weights.

`Role` runs in this process, on one device. Engines hand out objects with the same verbs that run elsewhere;
a method cannot tell the difference. Micro-batches, gradient accumulation, precision, clipping, LoRA,
gradient checkpointing and compilation live here, and a method never sees them.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Batch, Trajectories, concatenate
from guerdon.errors import NonFiniteError, UsageError, nearest
from guerdon.objectives.base import Metrics, Objective
from guerdon.optim import Optimiser

if TYPE_CHECKING:
    from guerdon.policies.lora import LoRA

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RoleSettings:
    """How a role holds and trains its model.

    Args:
        optimiser: what moves the weights; None for a role that only answers.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        lora: train low-rank adapters instead of the weights.
        micro_batch: rows of a batch per forward and backward pass; None takes all at once. The update is
            the same either way (the parts are weighted by what they count).
        micro_steps: steps per pass, for policies whose steps are independent.
        sample_batch: rows per call of the sampler.
        precision: of the matrix work under autocast; log-probabilities stay float32.
        compile: run the core through ``torch.compile`` (worth it only for long runs).
        checkpoint_activations: recompute activations in the backward pass, where the core knows how
            (``gradient_checkpointing_enable``).
        dropout: leave dropout on during updates. Off by default: with it, the ratio of a fresh sample is
            not 1.
    """

    optimiser: Optimiser | None = None
    max_grad_norm: float | None = 1.0
    lora: LoRA | None = None
    micro_batch: int | None = None
    micro_steps: int | None = None
    sample_batch: int | None = None
    precision: Precision = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            hint = nearest(self.precision, get_args(Precision))
            raise UsageError(f"unknown precision '{self.precision}'; {hint}")
        for name in ("micro_batch", "micro_steps", "sample_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")


class Role:
    """A model that plays a part (actor, critic, reference, reward) on one device.

    Args:
        name: the part, used in messages and checkpoints.
        model: a `Policy`, a critic, a reward model: any module with the methods that the verbs call.
        settings: see `RoleSettings`.
        device: where it runs.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        settings: RoleSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.settings = settings or RoleSettings()
        self.device = torch.device(device)
        self.updates = 0
        self.model = model.to(self.device)
        self._adapter_off = False
        self._changed = False
        core = getattr(model, "core", model)
        model.eval()
        model.requires_grad_(False)
        if self.settings.optimiser is None:
            self._parameters: list[nn.Parameter] = []
            self._optimiser: torch.optim.Optimizer | None = None
            return
        if self.settings.lora is not None:
            from guerdon.policies import lora

            lora.add(core, self.settings.lora)
        else:
            core.requires_grad_(True)
        if self.settings.checkpoint_activations:
            for verb in ("gradient_checkpointing_enable", "enable_gradient_checkpointing"):
                if hasattr(core, verb):
                    getattr(core, verb)()
                    break
            else:
                raise UsageError(f"{name}: {type(core).__name__} cannot checkpoint activations")
        if self.settings.compile:
            core.compile()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise UsageError(f"{name}: the model has no weights to train")
        self._optimiser = self.settings.optimiser.build(self._parameters)

    def __repr__(self) -> str:
        trained = sum(p.numel() for p in self._parameters)
        total = sum(p.numel() for p in self.model.parameters())
        return f"Role({self.name}: {type(self.model).__name__}, {trained:,} of {total:,} weights train, {self.device})"

    # -- answers (no gradient) -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _answering(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.settings.precision != "float32":
                stack.enter_context(self._autocast())
            if self._adapter_off:
                from guerdon.policies import lora

                stack.enter_context(lora.disabled(self.model.core))  # type: ignore[arg-type]
            yield self.model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=getattr(torch, self.settings.precision))

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: Any
    ) -> Trajectories:
        """Answer each prompt once; see `Policy.sample`. The rows are stamped with this role's version."""
        if not len(prompts):
            raise UsageError(f"there is nothing for '{self.name}' to answer: the list of prompts is empty")
        size = self.settings.sample_batch or len(prompts)
        parts = []
        with self._answering() as model:
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                own = {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in options.items()}
                part_group = None if group is None else group[rows]
                parts.append(model.sample(prompts[rows], seeds[rows], part_group, **own))
        traj = concatenate(parts)
        traj.version = torch.full((len(prompts),), self.updates, dtype=torch.int64, device=traj.mask.device)
        return traj

    def log_prob(self, traj: Trajectories) -> Tensor:
        """``[B, T]`` log-probability of the stored steps under this role's weights."""
        return self._by_parts(traj, lambda model, part: model.log_prob(part))

    def distribution(self, traj: Trajectories) -> TensorDict:
        """The step distributions ``[B, T]`` under this role's weights; see `Policy.distribution`."""
        return self._by_parts(traj, lambda model, part: model.distribution(part))

    def value(self, traj: Trajectories) -> Tensor:
        """``[B, T]`` values of the states, from a critic."""
        return self._by_parts(traj, lambda model, part: model.value(part))

    def score(self, traj: Trajectories) -> Tensor:
        """``[B]`` or ``[B, T]`` scores, from a reward model."""
        return self._by_parts(traj, lambda model, part: model.score(part))

    def _by_parts(self, traj: Trajectories, call: Any) -> Any:
        with self._answering() as model:
            size = self.settings.sample_batch or traj.batch_size[0]
            if size >= traj.batch_size[0]:
                return call(model, traj.to(self.device))
            parts = [call(model, part.to(self.device)) for part in traj.minibatches(size)]
        return torch.cat(parts)

    # -- learning ------------------------------------------------------------------------------------------

    def update(self, batch: Any, objective: Objective) -> Metrics:
        """One optimiser step on ``batch``: forward, backward (in micro-batches), clip, step.

        Args:
            batch: any `Batch`, or whatever the objective takes.
            objective: called as ``objective(model, batch) -> (loss, metrics)``.

        Returns the objective's metrics, with ``grad_norm`` where gradients are clipped, as 0-d tensors.

        Raises:
            UsageError: the role has no optimiser, or the batch no step to learn from.
            NonFiniteError: the loss or the gradient is not finite; the weights are as before.
        """
        if self._optimiser is None:
            raise UsageError(f"role '{self.name}' has no optimiser, so it cannot be updated")
        settings = self.settings
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        self._optimiser.zero_grad(set_to_none=True)
        parts = self._split(batch, objective)
        if settings.dropout:
            self.model.train()
        try:
            if len(parts) == 1:
                loss, metrics = self._forward(batch, objective)
                self._backward(loss)
                total_loss = loss.detach()
            else:
                total_loss, metrics = self._accumulate(batch, parts, objective)
        finally:
            if settings.dropout:
                self.model.eval()
        if settings.max_grad_norm is not None:
            metrics["grad_norm"] = check = nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
        else:
            check = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not (math.isfinite(check.item()) and math.isfinite(total_loss.item())):
            what = "loss" if not math.isfinite(total_loss.item()) else "gradient"
            self._optimiser.zero_grad(set_to_none=True)
            error = NonFiniteError(
                f"the {what} of '{self.name}' is not finite at update {self.updates}; the weights are unchanged"
            )
            error.batch = batch  # type: ignore[attr-defined]
            raise error
        optimiser = settings.optimiser
        assert optimiser is not None
        if optimiser.schedule != "constant" or optimiser.warmup:
            rate = optimiser.lr * optimiser.factor(self.updates)
            for group in self._optimiser.param_groups:
                group["lr"] = rate
        self._optimiser.step()
        self.updates += 1
        self._moved()
        return metrics

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise UsageError(
                f"the loss of '{self.name}' does not depend on its weights: this batch holds no step to learn from"
            )
        loss.backward()

    def _forward(self, part: Any, objective: Objective) -> tuple[Tensor, Metrics]:
        if self.settings.precision == "float32":
            return objective(self.model, part)
        with self._autocast():
            return objective(self.model, part)

    def _accumulate(self, batch: Any, parts: list[Any], objective: Objective) -> tuple[Tensor, Metrics]:
        total = objective.weight(batch)
        weights = [objective.weight(part) for part in parts]
        if not math.isclose(float(sum(weights)), float(total), rel_tol=1e-4):
            raise UsageError(
                f"'{self.name}': this batch cannot be split into micro-batches, because {type(objective).__name__} "
                "compares its rows with one another; use a larger micro_batch, or a batch of pairs"
            )
        empty = not total
        total = total.clamp(min=1e-12)
        loss_sum = torch.zeros((), device=self.device)
        sums: Metrics = {}
        for part, weight in zip(parts, weights, strict=True):
            if not weight and not empty:  # padding only: nothing to learn, nothing to count
                continue
            share = weight / total
            loss, metrics = self._forward(part, objective)
            self._backward(loss * share)
            loss_sum += loss.detach() * share
            for key, value in metrics.items():
                if key.endswith("_max"):
                    sums[key] = torch.maximum(sums[key], value) if key in sums else value
                else:
                    sums[key] = sums.get(key, 0.0) + value * share
        return loss_sum, sums

    def _split(self, batch: Any, objective: Objective) -> list[Any]:
        rows, steps = self.settings.micro_batch, self.settings.micro_steps
        if not isinstance(batch, Batch) or (rows is None and steps is None):
            return [batch]
        parts: list[Any] = (
            [batch] if rows is None or rows >= batch.batch_size[0] else list(batch.minibatches(rows))
        )
        if steps is None or not isinstance(batch, Trajectories) or steps >= batch.steps:
            return parts
        if not getattr(self.model, "markov", False):
            raise UsageError(
                f"'{self.name}': the steps of {type(self.model).__name__} cannot be split (micro_steps)"
            )
        if getattr(objective, "reduction", None) not in ("step", "constant"):
            raise UsageError(
                "micro_steps needs an objective that treats steps apart (reduction 'step' or 'constant')"
            )
        return [
            part.select_steps(start, start + steps)
            for part in parts
            for start in range(0, batch.steps, steps)
        ]

    # -- relatives -----------------------------------------------------------------------------------------

    def copy(self, frozen: bool = True, name: str | None = None) -> Role:
        """A role with the same weights as now.

        A frozen copy of a LoRA role whose adapter has not moved is the same model with its adapter off: no
        weights are copied. Otherwise the learning part is copied and the rest (text encoder, VAE) shared.
        A copy that is not frozen gets a fresh optimiser of the same kind.
        """
        name = name or (f"{self.name}_reference" if frozen else f"{self.name}_copy")
        if frozen and self.settings.lora is not None and self.updates == 0 and not self._changed:
            twin = copy.copy(self)
            twin.name, twin._adapter_off = name, True
            twin._parameters, twin._optimiser = [], None
            twin.settings = replace(self.settings, optimiser=None)
            return twin
        learns = {id(p) for p in _core(self.model).parameters()}
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters() if id(p) not in learns}
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        model = copy.deepcopy(self.model, memo)
        twin = Role.__new__(Role)
        twin.__dict__.update(self.__dict__)
        twin.name, twin.model, twin.updates = name, model, 0
        if frozen:
            model.requires_grad_(False)
            for parameter, flag in flags:  # shared ones keep their state
                parameter.requires_grad_(flag)
            twin.settings = replace(self.settings, optimiser=None)
            twin._parameters, twin._optimiser = [], None
        else:
            twin._parameters = [p for p in model.parameters() if p.requires_grad]
            twin._optimiser = (
                self.settings.optimiser.build(twin._parameters) if self.settings.optimiser else None
            )
        # its weights are not the initial ones: a checkpoint must hold them, and its own frozen copies too
        twin._changed = self._changed or self.updates > 0
        return twin

    def follow(self, other: Role, tau: float) -> None:
        """Move this role's weights towards ``other``'s: ``w <- w + tau (w_other - w)``; buffers are copied.
        ``tau=1`` makes them equal."""
        if self._adapter_off:
            raise UsageError(
                f"'{self.name}' is '{other.name}' with its adapter off; it cannot follow another role"
            )
        with torch.no_grad():
            mine, theirs = list(_core(self.model).parameters()), list(_core(other.model).parameters())
            pairs = [(m, t) for m, t in zip(mine, theirs, strict=True) if m is not t]
            if pairs:
                torch._foreach_lerp_([m for m, _ in pairs], [t for _, t in pairs], tau)
            for m, t in zip(_core(self.model).buffers(), _core(other.model).buffers(), strict=True):
                m.copy_(t)
        self._changed = True
        self._moved()

    def _moved(self) -> None:
        changed = getattr(self.model, "core_changed", None)
        if changed is not None:
            changed()

    # -- files ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Weights that can have moved, optimiser and counters: what a checkpoint needs. A frozen copy of the
        initial weights is made again by the method and stores nothing."""
        if self._optimiser is None and not self._changed:
            return {"updates": self.updates, "weights": None, "optimiser": None}
        if self.settings.lora is not None:
            from guerdon.policies import lora

            weights = lora.adapter_state_dict(_core(self.model))
        else:
            weights = _core(self.model).state_dict()
        optimiser = self._optimiser.state_dict() if self._optimiser is not None else None
        return {"updates": self.updates, "weights": weights, "optimiser": optimiser}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises `KeyError` or `RuntimeError` when it does not fit."""
        self.updates = state["updates"]
        if state["weights"] is not None:
            if self.settings.lora is not None:
                from guerdon.policies import lora

                lora.load_adapter_state_dict(_core(self.model), state["weights"])
            else:
                _core(self.model).load_state_dict(state["weights"])
            self._changed = self._changed or self._optimiser is None
        if state["optimiser"] is not None and self._optimiser is not None:
            self._optimiser.load_state_dict(state["optimiser"])
        self._moved()

    def save(self, folder: str | Path) -> None:
        """Write the model in its ecosystem's format (`Policy.save_pretrained`)."""
        self.model.save_pretrained(folder)  # type: ignore[operator]


def _core(model: nn.Module) -> nn.Module:
    return getattr(model, "core", model)
