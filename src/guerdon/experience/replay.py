"""Replay: what happened, kept for as long as there is room, and drawn again at random.

Rows are kept as they came, step by step, for each environment; n-step returns are summed when a row is drawn, so
one memory serves any n. Sampling is uniform or by priority, and brings along the random numbers that an
update needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Transitions
from guerdon.errors import UsageError
from guerdon.randomness import mix


class Replay:
    """The last ``capacity`` steps of ``environments`` parallel streams.

    Args:
        capacity: steps kept, over all streams.
        environments: parallel streams; each is a ring of its own.
        gamma: discount, for n-step returns.
        n_step: rewards summed before the bootstrap.
        prioritised: draw rows by ``priority ** alpha`` (Schaul et al., 2016) instead of uniformly.
        alpha: see above; beta: exponent of the importance weights.
        seed: of all draws.

    Observations may be arrays or dictionaries of them. Memory is taken when the first row is added (the system
    gives it page by page as the ring fills).
    """

    def __init__(
        self,
        capacity: int,
        environments: int = 1,
        gamma: float = 0.99,
        n_step: int = 1,
        prioritised: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        seed: int = 0,
    ) -> None:
        if capacity < environments * max(1, n_step):
            raise UsageError(
                f"a replay of {capacity} steps is too small for {environments} environments and {n_step}-step returns"
            )
        self.environments, self.gamma, self.n_step = environments, gamma, n_step
        self.length = capacity // environments
        self.alpha, self.beta = alpha, beta
        self.generator = torch.Generator().manual_seed(mix(seed, 0x5EED))
        self.added = 0  # steps of each stream, ever
        self._data: dict[str, Any] = {}
        self._arrays: list[tuple[str, Any]] = []
        self._tree = _SumTree(self.length * environments) if prioritised else None

    def __len__(self) -> int:
        """Rows that can be drawn."""
        return min(self.added, self.length) * self.environments

    # -- filling -------------------------------------------------------------------------------------------

    def add(
        self,
        observation: Any,
        action: np.ndarray,
        reward: np.ndarray,
        next_observation: Any,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """One step of every stream: arrays ``[environments, ...]``. ``next_observation`` is what followed, before
        any reset."""
        row = {
            "observation": observation,
            "action": action,
            "reward": reward,
            "next_observation": next_observation,
            "terminated": terminated,
            "truncated": truncated,
        }
        if not self._arrays:
            self._allocate(row)
        at = self.added % self.length
        for name, target in self._arrays:
            value = row[name]
            if isinstance(target, dict):
                for key, array in target.items():
                    array[at] = value[key]
            else:
                target[at] = value
        if self._tree is not None:
            first = at * self.environments
            self._tree.set(np.arange(first, first + self.environments), self._tree.largest)
        self.added += 1

    def _allocate(self, row: dict[str, Any]) -> None:
        def room(value: Any) -> Tensor:
            example = torch.as_tensor(np.asarray(value))
            if example.dtype == torch.float64:
                example = example.float()
            return torch.empty((self.length, *example.shape), dtype=example.dtype)

        for name, value in row.items():
            self._data[name] = (
                {k: room(v) for k, v in value.items()} if isinstance(value, dict) else room(value)
            )
        self._link()

    def _link(self) -> None:
        """NumPy views of the tensors: writing a row through them costs a tenth of the same in torch. And flat
        views for drawing."""

        def views(change: Any) -> list[tuple[str, Any]]:
            return [
                (n, {k: change(t) for k, t in v.items()} if isinstance(v, dict) else change(v))
                for n, v in self._data.items()
            ]

        self._arrays = views(lambda t: t.numpy())
        self._flat = dict(views(lambda t: t.view(-1, *t.shape[2:])))
        action = self._data["action"]
        self._noise = action.shape[2] if action.dtype.is_floating_point and action.ndim == 3 else 0

    # -- drawing -------------------------------------------------------------------------------------------

    def sample(self, n: int, draws: int = 2, previous_action: bool = False) -> Transitions:
        """``n`` rows, with replacement. For n-step returns ``reward`` is the discounted sum, ``next_observation`` what
        followed the last reward in it, ``discount`` its factor. Raises `UsageError` while there are none.

        Args:
            draws: vectors of noise in a row, ``noise [n, draws, A]``.
            previous_action: fill in the field of this name.
        """
        rows = len(self)
        if not rows:
            raise UsageError("the replay is empty; act before learning from it")
        weight = None
        if self._tree is None:
            index = torch.randint(rows, (n,), generator=self.generator)
        else:
            drawn, share = self._tree.draw(
                torch.rand(n, generator=self.generator, dtype=torch.float64).numpy()
            )
            index = torch.from_numpy(drawn)
            correction = (rows * share) ** -self.beta
            weight = torch.from_numpy((correction / correction.max()).astype(np.float32))
        fields = self._n_steps(index) if self.n_step > 1 else self._one_step(index)
        fields["index"] = index
        if weight is not None:
            fields["weight"] = weight
        return self._as_batch(fields, index, draws, previous_action)

    def _as_batch(
        self, fields: dict[str, Any], index: Tensor, draws: int, previous_action: bool
    ) -> Transitions:
        if previous_action:
            fields["previous_action"] = self.previous_action(index)
        if self._noise:
            fields["noise"] = torch.randn(*index.shape, draws, self._noise, generator=self.generator)
        # what add() took was checked
        return Transitions.from_tensordict(TensorDict(fields, batch_size=index.shape))

    def windows(self, n: int, length: int, draws: int = 2, previous_action: bool = False) -> Transitions:
        """``n`` runs of ``length`` rows that followed each other, drawn uniformly, one run after the other: ``[n *
        length]`` rows, single steps whatever ``n_step`` is. Where the episode (or the memory) ends within a run,
        ``weight`` is 0 for the rows after it, which repeat the last one, and 1 for all others.

        Raises `UsageError` while the memory is empty.
        """
        held = min(self.added, self.length)
        if not held:
            raise UsageError("the replay is empty; act before learning from it")
        oldest = self.added % self.length if self.added >= self.length else 0
        first = torch.randint(held * self.environments, (n,), generator=self.generator)
        age, stream = first // self.environments, first % self.environments
        places = (age[:, None] + torch.arange(length)).clamp(max=held - 1)
        rows = (places + oldest) % self.length * self.environments + stream[:, None]
        ended = self._flat["terminated"][rows] | self._flat["truncated"][rows] | (places == held - 1)
        count = (ended[:, :-1].cumsum(1) == 0).sum(1, keepdim=True) + 1  # rows of the run that are real
        position = torch.arange(length).expand(n, length)
        index = rows.gather(1, torch.minimum(position, count - 1)).flatten()
        fields = self._one_step(index)
        fields["index"] = index
        fields["weight"] = (position < count).flatten().float()
        return self._as_batch(fields, index, draws, previous_action)

    def _take(self, name: str, index: Tensor) -> Any:
        value = self._flat[name]
        if isinstance(value, dict):
            return TensorDict({k: t[index] for k, t in value.items()}, batch_size=index.shape)
        return value.index_select(0, index)

    def _one_step(self, index: Tensor) -> dict[str, Any]:
        fields = {name: self._take(name, index) for name in self._flat}
        fields["discount"] = torch.full(index.shape, self.gamma)
        return fields

    def _n_steps(self, index: Tensor) -> dict[str, Any]:
        slot, stream = index // self.environments, index % self.environments
        oldest = self.added % self.length if self.added >= self.length else 0
        held = min(self.added, self.length)
        age = (slot - oldest) % self.length  # 0 is the oldest slot
        ahead = torch.arange(self.n_step)
        places = (age[:, None] + ahead).clamp(max=held - 1)
        rows = (places + oldest) % self.length * self.environments + stream[:, None]
        ended = self._flat["terminated"][rows] | self._flat["truncated"][rows]
        ended |= (age[:, None] + ahead) >= held - 1  # nothing newer is known
        before = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1).cumsum(1) == 0
        count = before.sum(1)
        last = rows.gather(1, (count - 1)[:, None]).squeeze(1)
        discounts = self.gamma ** ahead.float()
        return {
            "observation": self._take("observation", index),
            "action": self._take("action", index),
            "reward": (self._flat["reward"][rows] * before * discounts).sum(1),
            "next_observation": self._take("next_observation", last),
            "terminated": self._flat["terminated"][last],
            "truncated": self._flat["truncated"][last],
            "discount": self.gamma ** count.float(),
        }

    def previous_action(self, index: Tensor) -> Tensor:
        """``[N, ...]``: the action before each row's, zeros where an episode (or the memory) begins."""
        oldest = self.added % self.length if self.added >= self.length else 0
        slot, stream = index // self.environments, index % self.environments
        before = (slot - 1) % self.length * self.environments + stream
        ended = self._flat["terminated"][before] | self._flat["truncated"][before]
        begins = (ended | (slot == oldest)).reshape(-1, *[1] * (self._flat["action"].ndim - 1))
        action = self._flat["action"][before]
        return torch.where(begins, torch.zeros((), dtype=action.dtype), action)

    def prioritise(self, index: Tensor, error: Tensor) -> None:
        """Set the priorities of drawn rows to the size of their errors ``[N]``. Does nothing in a uniform replay."""
        if self._tree is not None:
            priority = (error.detach().abs().double().cpu().numpy() + 1e-6) ** self.alpha
            self._tree.set(index.numpy(), priority)

    # -- files ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, the filled part of the memory included."""
        held = min(self.added, self.length)

        def part(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: part(t) for k, t in value.items()}
            # a view would take the whole memory along into the file
            return value if held == self.length else value[:held].clone()

        return {
            "added": self.added,
            "data": {name: part(value) for name, value in self._data.items()},
            "generator": self.generator.get_state(),
            "tree": None if self._tree is None else torch.from_numpy(self._tree.sums.copy()),
            "largest": 1.0 if self._tree is None else float(self._tree.largest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises `UsageError` when it was made with another size."""
        held = min(state["added"], self.length)
        if state["data"]:

            def room(value: Tensor) -> Tensor:
                if value.shape[0] != held or value.shape[1] != self.environments:
                    raise UsageError(
                        "the saved replay has another size; resume with the settings it was made with"
                    )
                whole = torch.empty((self.length, *value.shape[1:]), dtype=value.dtype)
                whole[: value.shape[0]] = value
                return whole

            self._data = {
                n: {k: room(t) for k, t in v.items()} if isinstance(v, dict) else room(v)
                for n, v in state["data"].items()
            }
            self._link()
        self.added = state["added"]
        self.generator.set_state(state["generator"])
        if self._tree is not None and state["tree"] is not None:
            self._tree.sums[:] = state["tree"].numpy()
            self._tree.largest = state["largest"]


class _SumTree:
    """Priorities in the leaves of a binary tree whose nodes hold their children's sums: a draw or a change costs
    log2(size) array operations for a whole batch."""

    def __init__(self, size: int) -> None:
        self.leaves = 1 << max(1, (size - 1).bit_length())
        self.sums = np.zeros(2 * self.leaves)
        self.largest = 1.0

    def set(self, index: np.ndarray, priority: Any) -> None:
        node = index + self.leaves
        self.sums[node] = priority
        self.largest = max(self.largest, float(np.max(priority)))
        node = np.unique(node >> 1)
        while node[0] > 0:
            self.sums[node] = self.sums[2 * node] + self.sums[2 * node + 1]
            node = np.unique(node >> 1)

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leaves drawn with one uniform number for each equal share of the total, and their shares."""
        total = self.sums[1]
        mass = (np.arange(len(uniform)) + uniform) * (total / len(uniform))
        node = np.ones(len(uniform), dtype=np.int64)
        while node[0] < self.leaves:
            node = 2 * node
            right = mass >= self.sums[node]
            right &= self.sums[node + 1] > 0  # rounding may not lead into an empty half
            mass = mass - np.where(right, self.sums[node], 0.0)
            node = node + right
        return node - self.leaves, self.sums[node] / total
