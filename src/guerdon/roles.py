"""A model with its optimiser behind a few verbs: the only way a method touches weights.

`Role` runs in this process, on one device. Engines hand out objects with the same verbs that run elsewhere;
a method cannot tell the difference. Micro-batches, gradient accumulation, precision, clipping, LoRA,
gradient checkpointing, compilation and data parallelism live here, and a method never sees them.

Data parallel: several processes hold the same role, each told of the others by a `Workers` object. Each gives its
share of the rows to `Role.update`, and all make the update that one process would make of all rows.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Batch, Trajectories, concatenate, nested
from guerdon.compiled import FlatUpdate, FlatWeights
from guerdon.errors import GuerdonError, NonFiniteError, UsageError
from guerdon.objectives.base import Metrics, Objective
from guerdon.policies import lora
from guerdon.policies.features import Scaler
from guerdon.role_parts import (
    add_figures,
    add_metrics,
    add_share,
    check_adds_up,
    leaves,
    mean_metrics,
    micro_batches,
    minibatch_rows,
    nothing_to_learn,
)
from guerdon.role_settings import Precision, RoleSettings, equip, recompute
from guerdon.role_workers import JointUpdate, Shards, Workers, fingerprint, share
from guerdon.trust_region import natural_step

__all__ = ["Precision", "Role", "RoleSettings", "Shards", "Workers", "add_metrics", "mean_metrics", "share"]


class Role:
    """A model that plays a part (actor, critic, reference, reward) on one device.

    Args:
        name: the part, used in messages and checkpoints.
        model: a `Policy`, a critic, a reward model: any module with the methods that the verbs call.
        settings: see `RoleSettings`.
        device: where it runs.
        group: the workers that hold this role together, each with the same weights; None for this process alone.
            ``copy``, ``follow``, ``state_dict`` and the answers work on each worker for itself, as without a group;
            dropout is drawn by each worker for itself.
        shard: each worker of the group holds a part of the weights, gradients and optimiser only, and gathers the
            rest layer by layer. Every verb is then one that all workers call alike (those that answer, also with no
            rows), and a `state_dict` is the same as without.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        settings: RoleSettings | None = None,
        device: torch.device | str = "cpu",
        group: Workers | None = None,
        shard: bool = False,
    ) -> None:
        self.name = name
        self.settings = settings or RoleSettings()
        self.device = torch.device(device)
        self.updates = 0
        self.group = group
        self._shards: Shards | None = None
        self._same = False  # whether the workers' weights have been compared
        # a model that will be sharded goes to its device part by part
        self.model = model if shard else model.to(self.device)
        self._adapter_off = False
        self._changed = False
        self._flat: FlatWeights | None = None
        self._whole: FlatUpdate | None = None
        model.eval()
        model.requires_grad_(False)
        if self.settings.optimiser is None:
            self._parameters: list[nn.Parameter] = []
            self._optimiser: torch.optim.Optimizer | None = None
            if shard:
                self._shard()
            return
        equip(name, model, self.settings)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise UsageError(f"{name}: the model has no weights to train")
        if shard:
            self._shard()
        self._build_optimiser()

    def join(self, group: Workers | None, device: torch.device | str = "cpu", shard: bool = False) -> None:
        """Go on at ``device`` as one of the copies of this role that the workers of ``group`` hold, each with the same
        weights (an engine does this with a role that it has sent to them). Weights, optimiser and counters stay as they
        are. Raises `UsageError` for a role whose weights are sharded already."""
        if self._shards is not None:
            raise UsageError(f"'{self.name}' is sharded; it stays where it is")
        self.group, self.device, self._same = group, torch.device(device), False
        held = None if self._optimiser is None else self._optimiser.state_dict()
        whole = None if self._whole is None else dict(self._whole.state)
        self._flat = None  # moved weights are no views of one tensor any more
        if shard:
            self._shard()
        else:
            self.model.to(self.device)
        if held is not None or whole is not None:
            self._build_optimiser()
        if whole is not None and self._whole is not None:
            self._whole.state = {name: value.to(self.device) for name, value in whole.items()}
        if held is not None and self._optimiser is not None:
            self._optimiser.load_state_dict(held if self._shards is None else self._shards.part_state(held))

    def _shard(self) -> None:
        if self.group is None:
            raise UsageError(
                f"{self.name}: weights are sharded over the workers of a group; there is none here"
            )
        if self.settings.compile:
            raise UsageError(f"{self.name}: sharded weights cannot be compiled; leave out compile or shard")
        self._shards = self.group.shard(self.model, self.device)
        if self._parameters:
            self._parameters = self._shards.parameters

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
        if self._shards is not None:
            raise UsageError(
                f"'{self.name}': weights that are sharded cannot be one flat tensor; leave out shard"
            )
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
            stack.enter_context(_gathered([self]))
            stack.enter_context(self._autocast())
            if self._adapter_off:
                stack.enter_context(lora.disabled(self.model.core))  # type: ignore[arg-type]
            yield self.model

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.settings.precision))

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: Any
    ) -> Trajectories:
        """Answer each prompt once; see `Policy.sample`. The rows are stamped with this role's version."""
        if not len(prompts):
            raise UsageError(f"there is nothing for '{self.name}' to answer: the list of prompts is empty")
        size = self.settings.sample_batch or len(prompts)
        parts = []
        with self._answering() as model, _gathered(options.values()):
            options = {k: v.answerer() if isinstance(v, Role) else v for k, v in options.items()}
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
        return lora.without(self.model) if self._adapter_off else self.model

    def acting(self) -> Any:
        """A function ``(observation, noise) -> {"action": ...}`` on NumPy arrays, with the newest weights whenever it
        is called (`Controller.actor`)."""
        if self._shards is not None:
            raise UsageError(f"'{self.name}' cannot act with sharded weights; leave out shard")
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
        with self._answering() as model, _gathered(others.values()):
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

    def update(
        self, batch: Any, objective: Objective, *, whole: Tensor | float | None = None, **others: Role
    ) -> Metrics:
        """One optimiser step on ``batch``: forward, backward (in micro-batches), clip, step.

        With a group, all workers call it alike: a `Batch` is this worker's share of the rows (maybe none), and all
        make the step that one process would make of all shares together. Anything else has no rows to share out:
        every worker has the same, and makes the same step of it.

        Args:
            batch: any `Batch`, or whatever the objective takes.
            objective: called as ``objective(model, batch) -> (loss, metrics)``.
            others: roles whose models the objective reads and this call does not train (an actor's objective
                reads a critic): it is called as ``objective(model, batch, critic=critic.model)``.
            whole: with a group, ``objective.weight`` of all rows together, to which the weights of the shares must
                add up; that they do not is how an objective is found that compares rows of different shares. None
                does not ask.

        Returns the objective's metrics, with ``grad_norm`` where gradients are clipped, as 0-d tensors.

        Raises:
            UsageError: the role has no optimiser, or the batch no step to learn from; the shares of a batch cannot be
                learned from apart, or the workers' weights differ.
            NonFiniteError: the loss or the gradient is not finite; the weights are as before.
            GuerdonError: another worker of the group failed. An error of one is raised by all, with the weights as
                before (sharded: where it came inside the model's layers, the others wait until their time is up).
        """
        if self._whole is not None:
            if self.group is not None:
                raise UsageError(
                    f"'{self.name}': compile='update' takes whole batches; give them to fit, on every worker"
                )
            return self.fit(batch, objective, **others)  # type: ignore[arg-type]
        if self._optimiser is None:
            raise self._only_answers()
        settings = self.settings
        models = {name: other.model for name, other in others.items()}
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        self._optimiser.zero_grad(set_to_none=True)
        together = self.group is not None and (isinstance(batch, Batch) or self._shards is not None)
        parts = [] if together else micro_batches(self.name, self.model, batch, objective, self.settings)
        if settings.dropout:
            self._training.train()
        try:
            if together:
                with _gathered(others.values()):
                    total_loss, metrics = self._together(batch, objective, models, whole)
            elif len(parts) == 1:
                loss, metrics = self._forward(batch, objective, models)
                self._backward(loss)
                total_loss = loss.detach()
            else:
                total_loss, metrics = self._accumulate(batch, parts, objective, models)
        finally:
            if settings.dropout:
                self._training.eval()
                if settings.checkpoint_activations:
                    recompute(_core(self._training))
        if self._shards is not None:
            check = self._shards.norm(settings.max_grad_norm)
            if settings.max_grad_norm is not None:
                metrics["grad_norm"] = check
        elif settings.max_grad_norm is not None:
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

    def _only_answers(self) -> UsageError:
        return UsageError(f"role '{self.name}' has no optimiser, so it cannot be updated")

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
        *,
        orders: Sequence[Tensor] | None = None,
        **others: Role,
    ) -> Metrics:
        """``epochs`` passes over ``data`` in minibatches: an `update` for each.

        With a group, every worker has all of ``data`` and the same order, and takes its share of each minibatch
        (``compile="update"``: all of it; every worker makes the same updates).

        Args:
            minibatch: rows an update; None takes all of them at once. Where the rows do not divide evenly, the
                last minibatch of a pass is smaller (with ``compile="update"`` it is filled up with rows that the
                pass has used already, since its size is compiled in).
            generator: shuffles each pass; None keeps the order.
            stop: asked after each pass with its mean metrics; True ends the call (an early stop on the KL).
            orders: the rows in the order of each pass, instead of a ``generator``; one for each of the ``epochs``. A pass
                that takes all rows at once has no order.
            others: as in `update`.

        Returns the mean metrics of all updates made, as 0-d tensors. Raises as `update` does.
        """
        rows = data.batch_size[0]
        size = minibatch_rows(rows, minibatch, epochs, generator, orders)
        if self._whole is not None:
            one_pass = self._compiled_pass(data, objective, size, generator, others)
        else:

            def one_pass(order: Tensor | None) -> tuple[Metrics, int]:
                sums: Metrics = {}
                count = 0
                parts: Iterable[Batch]
                if size == rows:
                    parts = [data]
                elif order is None:
                    parts = data.minibatches(size, generator)
                else:
                    parts = (cast(Any, data)[places] for places in order.split(size))
                for part in parts:
                    add_metrics(sums, self._share_update(part, objective, others))
                    count += 1
                return sums, count

        total: Metrics = {}
        updates = 0
        for i in range(epochs):
            sums, count = one_pass(None if orders is None else orders[i])
            add_metrics(total, sums)
            updates += count
            if stop is not None and stop(mean_metrics(sums, count)):
                break
        return mean_metrics(total, updates)

    def _share_update(self, part: Batch, objective: Objective, others: dict[str, Role]) -> Metrics:
        """An `update` from a minibatch that all workers of the group have whole."""
        if self.group is None:
            return self.update(part, objective, **cast(Any, others))
        rows = share(part.batch_size[0], self.group.rank, self.group.world_size)
        whole = objective.weight(part)
        return self.update(cast(Any, part)[rows], objective, whole=whole, **cast(Any, others))

    def natural_step(self, batch: Batch, objective: Objective, **settings: Any) -> Metrics:
        """One natural-gradient step on the whole batch, as long as a KL allows; needs no optimiser. ``settings`` and
        figures as for `guerdon.trust_region.natural_step`. With a group, every worker has the whole batch and makes the
        same step.

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
    ) -> Callable[[Tensor | None], tuple[Metrics, int]]:
        """A function of the rows' order that makes one pass over ``data`` by whole compiled updates."""
        whole, rows = self._whole, data.batch_size[0]
        assert whole is not None
        tensors = leaves(data)
        template = type(data)

        def rebuild(some: dict[tuple[str, ...], Tensor]) -> Any:
            return template.from_tensordict(nested(some))  # type: ignore[attr-defined]

        flat = {name: other.flat_weights() for name, other in others.items()}
        try:
            step: Any = whole.prepare(tensors, rebuild, objective, flat, None if size == rows else size)
        except GuerdonError:
            raise
        except Exception as error:  # whatever tracing or the compiler say
            raise UsageError(
                f"the update of '{self.name}' cannot be compiled ({type(error).__name__}: {error}); train with "
                "--compile False"
            ) from error
        names = list(whole.names)

        def one_pass(order: Tensor | None) -> tuple[Metrics, int]:
            parts: Sequence[Tensor | None] = [None]
            if size < rows:
                if order is None:
                    order = (
                        torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
                    )
                parts = torch.cat([order, order[: -rows % size]]).split(size)
            figures = []
            for part in parts:
                found = step(self._rate(), part)
                if not (math.isfinite(found[0].item()) and math.isfinite(found[1].item())):
                    raise self._not_finite(found[0], data)
                figures.append(found)
                self.updates += 1
            self._moved()
            loss, norm, *rest = add_figures(figures, names).unbind()
            metrics: Metrics = {"loss": loss}
            if self.settings.max_grad_norm is not None:
                metrics["grad_norm"] = norm
            metrics |= zip(names, rest, strict=True)
            return metrics, len(figures)

        return one_pass

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise nothing_to_learn(self.name)
        loss.backward()

    def _forward(
        self, part: Any, objective: Objective, models: dict[str, nn.Module]
    ) -> tuple[Tensor, Metrics]:
        model = self._training
        with self._autocast():
            if self._shards is not None:
                return cast(Any, self._shards.run(lambda: objective(model, part, **models)))
            return objective(model, part, **models)

    @property
    def _training(self) -> nn.Module:
        return self.model if self._shards is None else self._shards.model

    def _accumulate(
        self, batch: Any, parts: list[Any], objective: Objective, models: dict[str, nn.Module]
    ) -> tuple[Tensor, Metrics]:
        total = objective.weight(batch)
        weights = [objective.weight(part) for part in parts]
        check_adds_up(self.name, float(sum(weights)), float(total), objective)
        empty = not total
        total = total.clamp(min=1e-12)
        loss_sum = torch.zeros((), device=self.device)
        sums: Metrics = {}
        for part, weight in zip(parts, weights, strict=True):
            if not weight and not empty:  # padding only: nothing to learn, nothing to count
                continue
            portion = weight / total
            loss, metrics = self._forward(part, objective, models)
            self._backward(loss * portion)
            loss_sum += loss.detach() * portion
            add_share(sums, metrics, portion)
        return loss_sum, sums

    def _together(
        self, batch: Any, objective: Objective, models: dict[str, nn.Module], whole: Tensor | float | None
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics of the batch of which ``batch`` is this worker's share, and on all workers the gradient of
        that batch in ``.grad``."""
        joint = JointUpdate(
            self.name,
            self.updates,
            cast(Workers, self.group),
            self.device,
            self._parameters,
            self._shards,
            objective,
            forward=lambda part: self._forward(part, objective, models),
        )
        compared = self._same or self._shards is not None
        mark = 0.0 if compared else fingerprint(self.model)
        found = joint.gradient(batch, lambda: self._weighed(batch, objective), whole, mark)
        self._same = True
        return found

    def _weighed(self, batch: Any, objective: Objective) -> list[tuple[Any, float]]:
        """The parts of this worker's share, each with what it weighs."""
        if not isinstance(batch, Batch):
            return [(batch, 1.0)]
        if not batch.batch_size[0]:
            return []
        parts = micro_batches(self.name, self.model, batch, objective, self.settings)
        weights = [float(objective.weight(part)) for part in parts]
        if len(parts) > 1:
            check_adds_up(self.name, sum(weights), float(objective.weight(batch)), objective)
        return list(zip(parts, weights, strict=True))

    # -- relatives -----------------------------------------------------------------------------------------

    def copy(self, frozen: bool = True, name: str | None = None) -> Role:
        """A role with the same weights as now.

        A frozen copy of a LoRA role whose adapter has not moved is the same model with its adapter off: no
        weights are copied. Otherwise the learning part is copied and the rest (text encoder, VAE) shared.
        A copy that is not frozen gets a fresh optimiser of the same kind.
        """
        name = name or self._name_of_copy(frozen)
        if frozen and self.settings.lora is not None and self.updates == 0 and not self._changed:
            twin = object.__new__(type(self))
            twin.__dict__.update(self.__dict__)
            twin.name, twin._adapter_off = name, True
            twin._parameters, twin._optimiser = [], None
            twin.settings = replace(self.settings, optimiser=None)
            return twin
        learns = {id(p) for p in _core(self.model).parameters()}
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters() if id(p) not in learns}
        # running statistics of observations are shared: a reference sees the same inputs as the role it was taken from
        memo |= {id(m): m for m in self.model.modules() if isinstance(m, Scaler)}
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        with _gathered([self]):
            model = copy.deepcopy(self.model, memo)
        twin = Role.__new__(Role)
        twin.__dict__.update(self.__dict__)
        twin.name, twin.model, twin.updates = name, model, 0
        twin._flat = twin._whole = twin._optimiser = None
        twin._parameters = []
        if frozen:
            model.requires_grad_(False)
            for parameter, flag in flags:  # shared ones keep their state
                parameter.requires_grad_(flag)
            twin.settings = replace(self.settings, optimiser=None)
        else:
            if self._shards is not None:
                trained = self._shards.model.named_parameters()
                for parameter, (_, other) in zip(model.parameters(), trained, strict=True):
                    parameter.requires_grad_(other.requires_grad)
            twin._parameters = [p for p in model.parameters() if p.requires_grad]
        if self._shards is not None:
            twin._shard()
        if twin.settings.optimiser:
            twin._build_optimiser()
        # its weights are not the initial ones: a checkpoint must hold them, and its own frozen copies too
        twin._changed = self._changed or self.updates > 0
        return twin

    def _name_of_copy(self, frozen: bool) -> str:
        return f"{self.name}_reference" if frozen else f"{self.name}_copy"

    def follow(self, other: Role, tau: float) -> None:
        """Move this role's weights towards ``other``'s: ``w <- w + tau (w_other - w)``; buffers are copied.
        ``tau=1`` makes them equal."""
        if self._adapter_off:
            raise UsageError(
                f"'{self.name}' is '{other.name}' with its adapter off; it cannot follow another role"
            )
        with torch.no_grad():
            if self._flat is not None and other._flat is not None:
                self._flat.flat.lerp_(other._flat.flat, tau)  # one operation instead of one for each weight
                _copy_each(self._flat.buffers(), other._flat.buffers())
            elif self._shards is None or other._shards is None or not self._shards.follow(other._shards, tau):
                with _gathered([self, other]):
                    _blend(_core(self.model), _core(other.model), tau)
                    if self._shards is not None:
                        self._shards.store()
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
        with _gathered([self]):
            if self.settings.lora is not None:
                weights = lora.adapter_state_dict(_core(self.model))
            else:
                weights = _core(self.model).state_dict()
            if self._shards is not None:
                weights = {name: value.cpu() for name, value in weights.items()}
        optimiser: Any = self._optimiser.state_dict() if self._optimiser is not None else None
        if self._shards is not None:
            optimiser = None if optimiser is None else self._shards.full_state(optimiser)
        if self._whole is not None:
            optimiser = dict(self._whole.state)
        return {"updates": self.updates, "weights": weights, "optimiser": optimiser}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises `KeyError` or `RuntimeError` when it does not fit."""
        self.updates = state["updates"]
        self._same = False
        if state["weights"] is not None:
            with _gathered([self]):
                if self.settings.lora is not None:
                    lora.load_adapter_state_dict(_core(self.model), state["weights"])
                else:
                    _core(self.model).load_state_dict(state["weights"])
                if self._shards is not None:
                    self._shards.store()
            self._changed = self._changed or self._optimiser is None
        if state["optimiser"] is not None and self._whole is not None:
            self._whole.state = {name: state["optimiser"][name].clone() for name in self._whole.state}
        elif state["optimiser"] is not None and self._optimiser is not None:
            optimiser = state["optimiser"]
            self._optimiser.load_state_dict(
                optimiser if self._shards is None else self._shards.part_state(optimiser)
            )
        self._moved()

    def save(self, folder: str | Path) -> None:
        """Write the model in its ecosystem's format (`Policy.save_pretrained`). Sharded, the first worker writes."""
        with _gathered([self]):
            if self._shards is None or cast(Workers, self.group).rank == 0:
                self.model.save_pretrained(folder)  # type: ignore[operator]

    def __getstate__(self) -> dict[str, Any]:
        """For sending a role to another process: there it is alone until `join`."""
        if self._shards is not None:
            raise UsageError(
                f"'{self.name}' is sharded: no process has all of it to send; send its state_dict()"
            )
        state = self.__dict__ | {"group": None, "_same": False}
        if self._flat is not None:  # views would each take the whole tensor along
            state["model"] = copy.deepcopy(self.model)
            for parameter in state["model"].parameters():
                parameter.data = parameter.data.clone()
            state["_parameters"] = [p for p in state["model"].parameters() if p.requires_grad]
            state["_flat"] = None
            if self._whole is not None:
                state["_whole"] = dict(self._whole.state)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._whole, dict):
            held = self._whole
            self._build_optimiser()
            cast(FlatUpdate, self._whole).state = held


def _core(model: nn.Module) -> nn.Module:
    return getattr(model, "core", model)


def _gathered(values: Iterable[Any]) -> contextlib.ExitStack:
    """Inside, those of ``values`` that are sharded roles have their full weights."""
    stack = contextlib.ExitStack()
    for value in values:
        if isinstance(value, Role) and value._shards is not None:
            stack.enter_context(value._shards.whole())
    return stack


def _blend(mine: nn.Module, theirs: nn.Module, tau: float) -> None:
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    apart = [(m, t) for m, t in pairs if m is not t]
    if apart:
        torch._foreach_lerp_([m for m, _ in apart], [t for _, t in apart], tau)
    _copy_each(mine.buffers(), theirs.buffers())


def _copy_each(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for m, t in zip(mine, theirs, strict=True):
        if m is not t:
            m.copy_(t)
