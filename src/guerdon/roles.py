"""A model with its optimiser behind a few verbs: the only way a method touches weights.

`Role` runs in this process, on one device. Engines hand out objects with the same verbs that run elsewhere;
a method cannot tell the difference. Micro-batches, gradient accumulation, precision, clipping, LoRA,
gradient checkpointing and compilation live here, and a method never sees them.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Batch, Trajectories, concatenate
from guerdon.compiled import FlatUpdate, FlatWeights
from guerdon.errors import GuerdonError, NonFiniteError, UsageError, nearest
from guerdon.objectives.base import Metrics, Objective
from guerdon.optim import Optimiser
from guerdon.policies.features import Scaler
from guerdon.trust_region import natural_step

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
        compile: True runs the core through ``torch.compile`` (worth it only for long runs). ``"update"`` is
            for small networks on the CPU: the whole update, optimiser included, becomes one compiled function
            of flat tensors (`guerdon.compiled`), many times faster than the sum of its operations.
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
    compile: bool | Literal["update"] = False
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
        if self.compile == "update":
            for name in ("lora", "micro_batch", "micro_steps"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"compile='update' takes whole batches of whole weights; leave out {name}"
                    )
            if self.precision != "float32" or self.dropout:
                raise UsageError("compile='update' works in float32 without dropout")


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
        self._flat: FlatWeights | None = None
        self._whole: FlatUpdate | None = None
        core = getattr(model, "core", model)
        model.eval()
        model.requires_grad_(False)
        if self.settings.optimiser is None:
            self._parameters: list[nn.Parameter] = []
            self._optimiser: torch.optim.Optimizer | None = None
            return
        if self.settings.lora is not None:
            from guerdon.policies import lora

            wanted = self.settings.lora
            if wanted.targets is None and hasattr(model, "lora_targets"):
                wanted = replace(wanted, targets=model.lora_targets)  # type: ignore[arg-type]
            lora.add(core, wanted)
        else:
            core.requires_grad_(True)
        if self.settings.checkpoint_activations:
            for verb in ("gradient_checkpointing_enable", "enable_gradient_checkpointing"):
                if hasattr(core, verb):
                    getattr(core, verb)()
                    _recompute(core)
                    break
            else:
                raise UsageError(f"{name}: {type(core).__name__} cannot checkpoint activations")
        if self.settings.compile is True:
            core.compile()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise UsageError(f"{name}: the model has no weights to train")
        self._build_optimiser()

    def _build_optimiser(self) -> None:
        optimiser = self.settings.optimiser
        assert optimiser is not None
        if self.settings.compile == "update":
            if len(self._parameters) != len(list(self.model.parameters())):
                raise UsageError(f"{self.name}: compile='update' needs a model all of whose weights train")
            self._optimiser = None
            self._whole = FlatUpdate(self.flat_weights(), optimiser, self.settings.max_grad_norm)
        else:
            self._whole = None
            self._optimiser = optimiser.build(self._parameters)

    def flat_weights(self) -> FlatWeights:
        """This role's weights as one flat tensor, of which the model's parameters are views."""
        if self._flat is None:
            self._flat = FlatWeights(self.model)
        return self._flat

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
        options = {k: v.answerer() if isinstance(v, Role) else v for k, v in options.items()}
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

    def answerer(self) -> Any:
        """This role's model as another role's sampler may call it (an opponent, a reference to mix with): with the
        adapter off where this is the reference of an adapted actor."""
        if not self._adapter_off:
            return self.model
        from guerdon.policies import lora

        return lora.without(self.model)

    def acting(self) -> Any:
        """A function ``(observation, noise) -> {"action": ...}`` on NumPy arrays, with the newest weights whenever it
        is called (`Controller.actor`)."""
        return self.model.actor()  # type: ignore[operator]

    def observe(self, observation: Any) -> None:
        """Take observations ``[N, ...]`` into the running statistics that normalise them, if the model keeps any. A
        critic that shares them sees them too."""
        features = self.model.features
        if features.scaler is not None:  # type: ignore[union-attr]
            features.scaler.update(features.vector(observation))  # type: ignore[union-attr,operator]
            self._changed = True

    def evaluate(self, function: Callable[..., Any], batch: Any, **others: Role) -> Any:
        """``function(model, batch, **other models)`` without gradient, for figures that no other verb gives."""
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        with self._answering() as model:
            return function(model, batch, **{name: other.model for name, other in others.items()})

    def log_prob(self, traj: Trajectories) -> Tensor:
        """``[B, T]`` log-probability of the stored steps under this role's weights."""
        return self._by_parts(traj, lambda model, part: model.log_prob(part))

    def distribution(self, traj: Trajectories) -> TensorDict:
        """The step distributions ``[B, T]`` under this role's weights; see `Policy.distribution`."""
        return self._by_parts(traj, lambda model, part: model.distribution(part))

    def value(self, traj: Trajectories) -> Tensor:
        """``[B, T]`` values of the states, from a critic."""
        return self._by_parts(traj, lambda model, part: model.value(part))

    def next_value(self, traj: Trajectories) -> Tensor | None:
        """``[B, T]`` values of the states after each step, from a critic; None where every trajectory is a
        complete episode, after which nothing follows."""
        if traj.truncated is None:
            return None
        return self._by_parts(traj, lambda model, part: model.next_value(part))

    def score(self, traj: Trajectories) -> Tensor:
        """``[B]`` or ``[B, T]`` scores, from a reward model."""
        return self._by_parts(traj, lambda model, part: model.score(part))

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``, the probability that ``a`` is preferred to ``b``, from a model of pairs."""
        with self._answering() as model:
            size = self.settings.sample_batch or a.batch_size[0]
            sides = zip(a.minibatches(size), b.minibatches(size), strict=True)
            return torch.cat([model.compare(x.to(self.device), y.to(self.device)) for x, y in sides])

    def _by_parts(self, traj: Trajectories, call: Any) -> Any:
        with self._answering() as model:
            size = self.settings.sample_batch or traj.batch_size[0]
            if size >= traj.batch_size[0]:
                return call(model, traj.to(self.device))
            parts = [call(model, part.to(self.device)) for part in traj.minibatches(size)]
        return torch.cat(parts)

    # -- learning ------------------------------------------------------------------------------------------

    def update(self, batch: Any, objective: Objective, **others: Role) -> Metrics:
        """One optimiser step on ``batch``: forward, backward (in micro-batches), clip, step.

        Args:
            batch: any `Batch`, or whatever the objective takes.
            objective: called as ``objective(model, batch) -> (loss, metrics)``.
            others: roles whose models the objective reads and this call does not train (an actor's objective
                reads a critic): it is called as ``objective(model, batch, critic=critic.model)``.

        Returns the objective's metrics, with ``grad_norm`` where gradients are clipped, as 0-d tensors.

        Raises:
            UsageError: the role has no optimiser, or the batch no step to learn from.
            NonFiniteError: the loss or the gradient is not finite; the weights are as before.
        """
        if self._whole is not None:
            return self.fit(batch, objective, **others)  # type: ignore[arg-type]
        if self._optimiser is None:
            raise UsageError(f"role '{self.name}' has no optimiser, so it cannot be updated")
        settings = self.settings
        models = {name: other.model for name, other in others.items()}
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        self._optimiser.zero_grad(set_to_none=True)
        parts = self._split(batch, objective)
        if settings.dropout:
            self.model.train()
        try:
            if len(parts) == 1:
                loss, metrics = self._forward(batch, objective, models)
                self._backward(loss)
                total_loss = loss.detach()
            else:
                total_loss, metrics = self._accumulate(batch, parts, objective, models)
        finally:
            if settings.dropout:
                self.model.eval()
                if settings.checkpoint_activations:
                    _recompute(_core(self.model))
        if settings.max_grad_norm is not None:
            metrics["grad_norm"] = check = nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
        else:
            check = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not (math.isfinite(check.item()) and math.isfinite(total_loss.item())):
            self._optimiser.zero_grad(set_to_none=True)
            raise self._not_finite(total_loss, batch)
        optimiser = settings.optimiser
        assert optimiser is not None
        if optimiser.schedule != "constant" or optimiser.warmup:
            for group in self._optimiser.param_groups:
                group["lr"] = self._rate()
        self._optimiser.step()
        self.updates += 1
        self._moved()
        return metrics

    def expect(self, updates: int) -> None:
        """Say how many updates there will be in all, where the optimiser's schedule was left open (``total=None``) because
        only the data tell. A resumed run says it again: the number is not part of the state."""
        optimiser = self.settings.optimiser
        if optimiser is not None and optimiser.total is None:
            self.settings = replace(self.settings, optimiser=replace(optimiser, total=updates))

    def _rate(self) -> float:
        optimiser = self.settings.optimiser
        assert optimiser is not None
        return optimiser.lr * optimiser.factor(self.updates)

    def _not_finite(self, loss: Tensor, batch: Any) -> NonFiniteError:
        what = "loss" if not math.isfinite(loss.item()) else "gradient"
        error = NonFiniteError(
            f"the {what} of '{self.name}' is not finite at update {self.updates}; the weights are unchanged"
        )
        error.batch = batch  # type: ignore[attr-defined]
        return error

    def fit(
        self,
        data: Batch,
        objective: Objective,
        epochs: int = 1,
        minibatch: int | None = None,
        generator: torch.Generator | None = None,
        stop: Callable[[Metrics], bool] | None = None,
        **others: Role,
    ) -> Metrics:
        """``epochs`` passes over ``data`` in minibatches: an `update` for each.

        Args:
            minibatch: rows an update; None takes all of them at once. Where the rows do not divide evenly, the
                last minibatch of a pass is smaller (with ``compile="update"`` it is filled up with rows that the
                pass has used already, since its size is compiled in).
            generator: shuffles each pass; None keeps the order.
            stop: asked after each pass with its mean metrics; True ends the call (an early stop on the KL).
            others: as in `update`.

        Returns the mean metrics of all updates made, as 0-d tensors. Raises as `update` does.
        """
        rows = data.batch_size[0]
        size = rows if minibatch is None else min(minibatch, rows)
        if size < 1:
            raise UsageError(f"a minibatch holds at least one row, not {size}")
        if self._whole is not None:
            one_pass = self._compiled_pass(data, objective, size, generator, others)
        else:

            def one_pass() -> tuple[Metrics, int]:
                sums: Metrics = {}
                count = 0
                parts = [data] if size == rows else data.minibatches(size, generator)
                for part in parts:
                    _add(sums, self.update(part, objective, **others))
                    count += 1
                return sums, count

        total: Metrics = {}
        updates = 0
        for _ in range(epochs):
            sums, count = one_pass()
            _add(total, sums)
            updates += count
            if stop is not None and stop(_mean(sums, count)):
                break
        return _mean(total, updates)

    def natural_step(self, batch: Batch, objective: Objective, **settings: Any) -> Metrics:
        """One natural-gradient step on the whole batch, as long as a KL allows; needs no optimiser. ``settings`` and
        figures as for `guerdon.trust_region.natural_step`.

        Raises `UsageError` for a role that trains an adapter.
        """
        if self.settings.lora is not None:
            raise UsageError(f"'{self.name}': a natural step moves whole weights; leave out lora")
        figures = natural_step(self.flat_weights(), batch.to(self.device), objective, **settings)
        self.updates += 1
        self._changed = True
        self._moved()
        return figures

    def _compiled_pass(
        self,
        data: Batch,
        objective: Objective,
        size: int,
        generator: torch.Generator | None,
        others: dict[str, Role],
    ) -> Callable[[], tuple[Metrics, int]]:
        """A function that makes one pass over ``data`` by whole compiled updates."""
        whole, rows = self._whole, data.batch_size[0]
        assert whole is not None
        leaves = _leaves(data)
        template = type(data)

        def rebuild(tensors: dict[tuple[str, ...], Tensor]) -> Any:
            return _from_leaves(template, tensors)

        flat = {name: other.flat_weights() for name, other in others.items()}
        try:
            step: Any = whole.prepare(leaves, rebuild, objective, flat, None if size == rows else size)
        except GuerdonError:
            raise
        except Exception as error:  # whatever tracing or the compiler say
            raise UsageError(
                f"the update of '{self.name}' cannot be compiled ({type(error).__name__}: {error}); train with "
                "--compile False"
            ) from error
        names = list(whole.names)

        def one_pass() -> tuple[Metrics, int]:
            parts: Sequence[Tensor | None] = [None]
            if size < rows:
                order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
                parts = torch.cat([order, order[: -rows % size]]).split(size)
            figures = []
            for part in parts:
                found = step(self._rate(), part)
                if not (math.isfinite(found[0].item()) and math.isfinite(found[1].item())):
                    raise self._not_finite(found[0], data)
                figures.append(found)
                self.updates += 1
            self._moved()
            total = figures[0]
            if len(figures) > 1:
                table = torch.stack(figures)
                total = table.sum(0)
                for i, name in enumerate(names, 2):
                    if name.endswith("_max"):
                        total[i] = table[:, i].max()
            loss, norm, *rest = total.unbind()
            metrics: Metrics = {"loss": loss}
            if self.settings.max_grad_norm is not None:
                metrics["grad_norm"] = norm
            metrics |= zip(names, rest, strict=True)
            return metrics, len(figures)

        return one_pass

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise UsageError(
                f"the loss of '{self.name}' does not depend on its weights: this batch holds no step to learn from"
            )
        loss.backward()

    def _forward(
        self, part: Any, objective: Objective, models: dict[str, nn.Module]
    ) -> tuple[Tensor, Metrics]:
        if self.settings.precision == "float32":
            return objective(self.model, part, **models)
        with self._autocast():
            return objective(self.model, part, **models)

    def _accumulate(
        self, batch: Any, parts: list[Any], objective: Objective, models: dict[str, nn.Module]
    ) -> tuple[Tensor, Metrics]:
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
            loss, metrics = self._forward(part, objective, models)
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
        # running statistics of observations are shared: a reference sees the same inputs as the role it was taken from
        memo |= {id(m): m for m in self.model.modules() if isinstance(m, Scaler)}
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        model = copy.deepcopy(self.model, memo)
        twin = Role.__new__(Role)
        twin.__dict__.update(self.__dict__)
        twin.name, twin.model, twin.updates = name, model, 0
        twin._flat = twin._whole = None
        if frozen:
            model.requires_grad_(False)
            for parameter, flag in flags:  # shared ones keep their state
                parameter.requires_grad_(flag)
            twin.settings = replace(self.settings, optimiser=None)
            twin._parameters, twin._optimiser = [], None
        else:
            twin._parameters = [p for p in model.parameters() if p.requires_grad]
            twin._optimiser = None
            if self.settings.optimiser:
                twin._build_optimiser()
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
        if self._flat is not None and other._flat is not None:
            with torch.no_grad():  # one operation instead of one for each weight
                self._flat.flat.lerp_(other._flat.flat, tau)
                for m, t in zip(self._flat.buffers(), other._flat.buffers(), strict=True):
                    if m is not t:
                        m.copy_(t)
            self._changed = True
            self._moved()
            return
        with torch.no_grad():
            mine, theirs = list(_core(self.model).parameters()), list(_core(other.model).parameters())
            pairs = [(m, t) for m, t in zip(mine, theirs, strict=True) if m is not t]
            if pairs:
                torch._foreach_lerp_([m for m, _ in pairs], [t for _, t in pairs], tau)
            for m, t in zip(_core(self.model).buffers(), _core(other.model).buffers(), strict=True):
                if m is not t:
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
        if self._optimiser is None and self._whole is None and not self._changed:
            return {"updates": self.updates, "weights": None, "optimiser": None}
        if self.settings.lora is not None:
            from guerdon.policies import lora

            weights = lora.adapter_state_dict(_core(self.model))
        else:
            weights = _core(self.model).state_dict()
        optimiser: Any = self._optimiser.state_dict() if self._optimiser is not None else None
        if self._whole is not None:
            optimiser = dict(self._whole.state)
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
        if state["optimiser"] is not None and self._whole is not None:
            self._whole.state = {name: state["optimiser"][name].clone() for name in self._whole.state}
        elif state["optimiser"] is not None and self._optimiser is not None:
            self._optimiser.load_state_dict(state["optimiser"])
        self._moved()

    def save(self, folder: str | Path) -> None:
        """Write the model in its ecosystem's format (`Policy.save_pretrained`)."""
        self.model.save_pretrained(folder)  # type: ignore[operator]


def _recompute(core: nn.Module) -> None:
    """transformers' layers recompute only while they are training, which a role's models are not (their dropout stays
    off): tell those layers alone, not what is in them."""
    for module in core.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True


def _core(model: nn.Module) -> nn.Module:
    return getattr(model, "core", model)


# --- metrics and leaves -----------------------------------------------------------------------------------


def _add(sums: Metrics, metrics: Metrics) -> None:
    """Sum up metrics; of those called ``..._max`` keep the largest."""
    for name, value in metrics.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            sums[name] = torch.maximum(sums[name], value)
        else:
            sums[name] = sums[name] + value


def _mean(sums: Metrics, count: int) -> Metrics:
    return {name: v if name.endswith("_max") else v / max(count, 1) for name, v in sums.items()}


_UNREAD = {"outputs", "group", "version", "index"}  # what judges and books read, objectives do not


def _leaves(data: Batch) -> dict[tuple[str, ...], Tensor]:
    """The tensors of a batch that an objective may read, by nested name."""
    leaves: dict[tuple[str, ...], Tensor] = {}

    def walk(prefix: tuple[str, ...], node: Any) -> None:
        for name, value in node.items():
            if isinstance(value, Tensor):
                leaves[(*prefix, name)] = value
            elif value is not None and (prefix or name not in _UNREAD):
                walk((*prefix, name), value)

    walk((), data._tensordict)  # type: ignore[attr-defined]
    # compiled functions know one layout: an expanded tensor (one deviation for all rows) would be read beyond its end
    return {name: leaf.contiguous() for name, leaf in leaves.items() if name[0] not in _UNREAD}


def _from_leaves(kind: type[Batch], leaves: dict[tuple[str, ...], Tensor]) -> Batch:
    """A batch again from (rows of) its leaves. Per-step inputs have batch ``[B, T]``, all else ``[B]``."""
    first = next(iter(leaves.values()))
    root = TensorDict({}, batch_size=first.shape[:1])
    mask = leaves.get(("mask",))
    for name, leaf in leaves.items():
        for depth in range(1, len(name)):
            if name[:depth] not in root.keys(include_nested=True):
                per_step = name[: min(depth, 2)] == ("inputs", "step") or name[0] == "reference"
                shape = mask.shape if per_step and mask is not None else first.shape[:1]
                root[name[:depth]] = TensorDict({}, batch_size=shape)
        root[name] = leaf
    return kind.from_tensordict(root)  # type: ignore[attr-defined,no-any-return]
