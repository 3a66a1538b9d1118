"""Prompts, in a seeded order, and the experience of answering them.

The order is a pure function of the seed and of how many prompts were drawn: each pass over the list is a
permutation of its own. The cursor is therefore one number, and a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import DataError, UsageError
from guerdon.experience.base import check_groups
from guerdon.randomness import mix, row_seeds


class Sampler(Protocol):
    """Whatever answers prompts: an actor role, or a policy."""

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: Any
    ) -> Trajectories: ...


def read_prompts(path: str | Path, column: str = "prompt") -> list[str]:
    """The prompts of a text file (one a line, blank lines skipped) or of a ``.jsonl`` file (``column``).

    Raises `DataError` naming file and row: no such file, not UTF-8, not JSON, a row without the column or
    with something else than a text in it, or no prompt at all.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, row {line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8"
        ) from error
    lines = text.split("\n")  # not splitlines: prompts may hold exotic separators
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        prompts = [_column(path, n, line, column) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path}: holds no prompts; expected one a line")
    return prompts


def _column(path: Path, row: int, line: str, column: str) -> str:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, row {row}: not a JSON object ({error})") from error
    if not isinstance(values, dict) or column not in values:
        has = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{path}, row {row}: no column '{column}' (it has: {has})")
    if not isinstance(values[column], str):
        raise DataError(
            f"{path}, row {row}, column '{column}': expected a text, found {type(values[column]).__name__}"
        )
    if not values[column].isascii():
        try:
            values[column].encode("utf-8")
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON's escapes can write
            raise DataError(
                f"{path}, row {row}, column '{column}': no valid Unicode ({error.reason})"
            ) from error
    return values[column]


class Prompts:
    """A list of prompts, drawn without replacement; when it is used up, the next pass has a new order.

    Args:
        prompts: the texts. Their place in this list is the group number of their answers.
        seed: of the order.
        shuffle: False draws in the given order.

    Raises `DataError` when the list is empty.
    """

    def __init__(self, prompts: Sequence[str], seed: int = 0, shuffle: bool = True) -> None:
        self.texts = list(prompts)
        if not self.texts:
            raise DataError("the list of prompts is empty; give at least one")
        self.seed = seed
        self.shuffle = shuffle
        self.drawn = 0
        self._pass = -1
        self._order: list[int] = []

    @classmethod
    def from_file(
        cls, path: str | Path, column: str = "prompt", seed: int = 0, shuffle: bool = True
    ) -> Prompts:
        """Prompts from a text or JSONL file; see `read_prompts`."""
        return cls(read_prompts(path, column), seed, shuffle)

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, count: int) -> list[int]:
        """The places in ``texts`` of the next ``count`` prompts."""
        places = [self._place(self.drawn + i) for i in range(count)]
        self.drawn += count
        return places

    def _place(self, position: int) -> int:
        number, within = divmod(position, len(self.texts))
        if not self.shuffle:
            return within
        if number != self._pass:
            generator = torch.Generator().manual_seed(mix(self.seed, number))
            self._order = torch.randperm(len(self.texts), generator=generator).tolist()
            self._pass = number
        return self._order[within]

    def state_dict(self) -> dict[str, int]:
        """The cursor."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.drawn = state["drawn"]


class Prompted:
    """Experience of a policy that answers prompts: language models, image generators, bandits over contexts.

    Args:
        prompts: a `Prompts`, or texts to make one of.
        group_size: answers to each prompt. They lie next to each other: rows ``k G`` to ``k G + G - 1``
            belong to one draw.
        seed: of all sampling. Row ``i`` of the run always has the noise of ``(seed, i)``, however the rows
            are batched.
    """

    unit: Literal["trajectory", "step"] = "trajectory"

    def __init__(self, prompts: Prompts | Sequence[str], group_size: int = 1, seed: int = 0) -> None:
        if group_size < 1:
            raise UsageError(f"group_size must be at least 1, not {group_size}")
        self.prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts, seed)
        self.group_size = group_size
        self.seed = seed
        self.rows = 0

    def collect(self, actor: Sampler, n: int, group_size: int | None = None, **options: Any) -> Trajectories:
        """``n`` trajectories of ``actor``; ``options`` go to its sampler, ``group_size`` overrides the usual.

        ``group`` is the prompt's place in the list, so it names the same prompt in every round.
        Raises `UsageError` when ``n`` is not a positive multiple of ``group_size``.
        """
        size = group_size or self.group_size
        check_groups(n, size)
        places = [p for p in self.prompts.draw(n // size) for _ in range(size)]
        seeds = row_seeds(self.seed, self.rows, n)
        self.rows += n
        texts = [self.prompts.texts[place] for place in places]
        group = torch.tensor(places, dtype=torch.int64)
        return actor.sample(texts, seeds, group=group, **self._options(seeds, size), **options)

    def greedy(self, actor: Sampler, traj: Trajectories) -> Trajectories:
        """The likeliest answer to the prompt of each row of ``traj`` (by its ``group``), row for row. Draws no prompts and
        no noise; a prompt that several rows share is answered once.

        Raises `UsageError` for a policy that has no greedy answer (one that denoises, for example).
        """
        if traj.group is None:
            raise UsageError("these trajectories do not say which prompts they answer: group is missing")
        places, row = traj.group.cpu().unique(return_inverse=True)
        texts = [self.prompts.texts[place] for place in places.tolist()]
        without = UsageError(
            "this policy has no greedy answer to a prompt, so it cannot be compared with one; take a language model, or a "
            "method whose baseline needs none (rloo, grpo)"
        )
        try:
            found = actor.sample(texts, row_seeds(self.seed, 0, len(texts)), group=places, greedy=True)
        except TypeError as error:  # a sampler without such an option
            if "greedy" in str(error):
                raise without from error
            raise
        sampler = found.inputs.get("sampler", None)
        if sampler is None or not bool(sampler.get("greedy", torch.tensor(False)).all()):
            raise without  # it took the option and paid no heed
        return found[row.to(found.mask.device)]

    def _options(self, seeds: Tensor, group_size: int) -> dict[str, Any]:
        """Further options for the sampler that follow from the rows."""
        return {}

    def statistics(self, traj: Trajectories) -> dict[str, Tensor]:
        """``reward``: the mean score."""
        return {"reward": traj.score().mean()}

    def state_dict(self) -> dict[str, int]:
        """The cursor: prompts drawn and rows made."""
        return {**self.prompts.state_dict(), "rows": self.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.prompts.load_state_dict(state)
        self.rows = state["rows"]
