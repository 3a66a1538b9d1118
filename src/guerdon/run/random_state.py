"""The random states of the whole process: python's, numpy's and torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from guerdon.randomness import mix


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global generators; returns one more, on the CPU, whose stream is independent of theirs."""
    random.seed(mix(seed, 1))
    np.random.seed(mix(seed, 2) & 0xFFFFFFFF)
    torch.manual_seed(mix(seed, 3))
    return torch.Generator().manual_seed(mix(seed, 4))


def random_states(generator: torch.Generator) -> dict[str, Any]:
    """All states, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "python": (version, torch.tensor(numbers, dtype=torch.int64), gauss),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any], generator: torch.Generator) -> None:
    """Put back what `random_states` gave."""
    generator.set_state(states["generator"])
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
