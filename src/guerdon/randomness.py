"""Random numbers that belong to a trajectory, not to the order in which things were computed.

Every row that a policy samples has a seed of its own, derived from the run's seed and the row's number.
Its noise is the same whatever the micro-batch, the device, the number of workers or a resume in between;
"same prompts and seeds" before and after training means the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several integers (SplitMix64's finaliser, applied in turn)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def row_seeds(seed: int, start: int, count: int) -> Tensor:
    """``int64 [count]``: the seeds of rows ``start`` to ``start + count`` of a run with ``seed``."""
    return torch.tensor([mix(seed, start + i) for i in range(count)], dtype=torch.int64)


def normal(seeds: Tensor | Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """``[N, *shape]`` standard normal noise; row ``i`` depends on ``seeds[i]`` alone. Drawn on the CPU, so
    that every device sees the same numbers."""
    generator = torch.Generator()
    rows = torch.empty((len(seeds), *shape))
    for row, seed in zip(rows, _integers(seeds), strict=True):
        generator.manual_seed(seed)
        row.normal_(generator=generator)
    return rows.to(device)


def uniform(
    seeds: Tensor | Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """``[N, *shape]`` uniform numbers in [0, 1); row ``i`` depends on ``seeds[i]`` alone."""
    generator = torch.Generator()
    rows = torch.empty((len(seeds), *shape))
    for row, seed in zip(rows, _integers(seeds), strict=True):
        generator.manual_seed(seed)
        row.uniform_(generator=generator)
    return rows.to(device)


def _integers(seeds: Tensor | Sequence[int]) -> list[int]:
    return seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
