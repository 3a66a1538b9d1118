"""A worker process that holds roles: the other end of `guerdon.engine.remote.RemoteRole`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.engine.packing import Hole, Named, Path, describe, leaf_of, on_cpu, unpack, unpack_prompts
from guerdon.engine.workers import Worker, register
from guerdon.objectives.base import Metrics, Objective
from guerdon.roles import Role


class RoleWorker(Worker):
    """A process that holds roles and runs their verbs.

    Args:
        device: "cpu", or "cuda" for the GPU that was given to this process.
        threads: CPU threads for tensor work.
        timeout: seconds that a collective operation may take.
    """

    def __init__(self, device: str = "cpu", threads: int = 1, timeout: float = 120.0) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.timeout = timeout
        self.roles: dict[str, Role] = {}
        self.group: Any = None

    @register("one_to_all")
    def join(self) -> None:
        """Meet the other workers of the group."""
        from guerdon.engine import parallel

        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            self.group = parallel.join(
                self.master_address, self.master_port, self.rank, self.world_size, backend, self.timeout
            )

    @register("one_to_all", blocking=False)
    def make(self, key: str, role: Role, shared: Sequence[tuple[str, str, str]], shard: bool) -> None:
        """Take over a role. ``shared`` names modules that it has in common with another: ``(path, key, path there)``."""
        for path, other, there in shared:
            role.model.set_submodule(path, self.roles[other].model.get_submodule(there))
        role.name = key.partition("#")[0]
        role.join(self.group, self.device, shard)
        self.roles[key] = role

    @register("one_to_all", blocking=False)
    def drop(self, keys: Sequence[str]) -> None:
        """Forget roles that nobody has a handle of any more."""
        for key in keys:
            self.roles.pop(key, None)

    @register("one_to_all")
    def holds(self) -> list[str]:
        """The names of its roles."""
        return list(self.roles)

    @register("one_to_all", blocking=False)
    def copy(self, source: str, key: str, frozen: bool) -> None:
        self.roles[key] = self.roles[source].copy(frozen, name=key.partition("#")[0])

    @register("one_to_all", blocking=False)
    def follow(self, key: str, other: str, tau: float) -> None:
        self.roles[key].follow(self.roles[other], tau)

    @register("one_to_all", blocking=False)
    def expect(self, key: str, updates: int) -> None:
        self.roles[key].expect(updates)

    @register("one_to_all", blocking=False)
    def observe(self, key: str, observation: Any) -> None:
        self.roles[key].observe(observation)

    # -- answers -------------------------------------------------------------------------------------------

    @register("dp", blocking=False)
    def sample(self, key: str, rows: TensorDict, options: dict[str, Any]) -> Trajectories:
        """Answer the prompts in ``rows``, with their seeds and groups."""
        prompts, seeds, group, options = unpack_prompts(rows, self._named(options))
        return self._home(self.roles[key].sample(prompts, seeds, group, **options))

    @register("dp", blocking=False)
    def answer(self, key: str, own: Any, holes: Sequence[Hole], verb: str, *values: Any) -> Any:
        """``role.verb(batch)``."""
        return self._home(getattr(self.roles[key], verb)(unpack(own, holes, values)))

    @register("dp", blocking=False)
    def compare(
        self, key: str, a: Any, a_holes: Sequence[Hole], b: Any, b_holes: Sequence[Hole], *values: Any
    ) -> Tensor:
        batches = unpack(a, a_holes, values), unpack(b, b_holes, values)
        return cast(Tensor, self._home(self.roles[key].compare(*batches)))

    @register("one_to_all")
    def evaluate(
        self,
        key: str,
        own: Any,
        holes: Sequence[Hole],
        function: Callable[..., Any],
        others: dict[str, Named],
        *values: Any,
    ) -> Any:
        """``role.evaluate(function, batch, **others)``, of the first worker."""
        batch = unpack(own, holes, values)
        found = self.roles[key].evaluate(function, batch, **self._named(others))
        return self._home(found) if self.rank == 0 else None

    @register("dp_metric", rows="uneven")
    def describe(self, value: Any) -> Any:
        """Shapes and types of what another call returned here, without its numbers."""
        return describe(value)

    @register("dp")
    def leaf(self, inside: Path, width: Sequence[int], value: Any) -> Tensor:
        """One tensor of what another call returned here."""
        return leaf_of(value, inside, width)

    # -- learning ------------------------------------------------------------------------------------------

    @register("dp_metric", blocking=False, rows="uneven")
    def update(
        self,
        key: str,
        own: Any,
        holes: Sequence[Hole],
        objective: Objective,
        others: dict[str, Named],
        *values: Any,
    ) -> Metrics:
        """One update of all workers together; ``own`` are this worker's rows."""
        return self._home(
            self.roles[key].update(unpack(own, holes, values), objective, **self._named(others))
        )

    @register("one_to_all", blocking=False)
    def fit(
        self,
        key: str,
        own: Any,
        holes: Sequence[Hole],
        objective: Objective,
        settings: dict[str, Any],
        others: dict[str, Named],
        *values: Any,
    ) -> Metrics:
        """Passes over a batch that every worker has whole; of each minibatch it takes its share."""
        data = unpack(own, holes, values)
        return self._home(self.roles[key].fit(data, objective, **settings, **self._named(others)))

    @register("one_to_all", blocking=False)
    def natural_step(
        self,
        key: str,
        own: Any,
        holes: Sequence[Hole],
        objective: Objective,
        settings: dict[str, Any],
        *values: Any,
    ) -> Metrics:
        return self._home(self.roles[key].natural_step(unpack(own, holes, values), objective, **settings))

    # -- weights -------------------------------------------------------------------------------------------

    @register("one_to_all", blocking=False)
    def state(self, key: str, optimiser: bool, whole: bool = False) -> dict[str, Any] | None:
        """What `Role.state_dict` gives, of the first worker (all have the same); ``whole``: with weights that a checkpoint
        can do without."""
        role = self.roles[key]
        state = whole_state(role) if whole else role.state_dict()
        if not optimiser:
            state["optimiser"] = None
        return on_cpu(state) if self.rank == 0 else None

    @register("one_to_all", blocking=False)
    def load(self, key: str, state: Any) -> None:
        """Take over a state, or the answer of another group to `state`."""
        self.roles[key].load_state_dict(state[0] if isinstance(state, list) else state)

    def _named(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` with the roles that are named there."""
        return {k: self.roles[v.key] if isinstance(v, Named) else v for k, v in options.items()}

    def _home(self, value: Any) -> Any:
        return value if self.device.type == "cpu" else on_cpu(value)


def whole_state(role: Role) -> dict[str, Any]:
    """`Role.state_dict` of a role in this process, with weights that a checkpoint can do without."""
    state = role.state_dict()
    if state["weights"] is None and role.settings.lora is None:
        state["weights"] = getattr(role.model, "core", role.model).state_dict()
    return state
