"""Weights of small models, for what is only about where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.engine.protocols import Layout
from guerdon.engine.shards import WHOLE, Parameter

HEADS, KV, SIZE, WIDTH, INNER = 8, 4, 2, 16, 24
QKV = (HEADS * SIZE, KV * SIZE, KV * SIZE)


def even_model(layers: int = 4) -> list[Parameter]:
    """A model of which every rank of any layout holds the same number of bytes: the case of the table's formulas."""
    found = [
        Parameter("embed", (32, WIDTH), "first", 0),
        Parameter("head", (32, WIDTH), "last", 0),
    ]
    for n in range(layers):
        found += [
            Parameter(f"{n}.qkv", (sum(QKV), WIDTH), n, 0, QKV, SIZE),
            Parameter(f"{n}.out", (WIDTH, HEADS * SIZE), n, 1, (), SIZE),
            Parameter(f"{n}.gate_up", (2 * INNER, WIDTH), n, 0, (INNER, INNER)),
            Parameter(f"{n}.down", (WIDTH, INNER), n, 1),
        ]
    return found


def real_model() -> list[Parameter]:
    """Three blocks, norms and biases that are not split, a vocabulary that nothing divides."""
    found = [
        Parameter("embed", (37, WIDTH), "first", 0),
        Parameter("norm", (WIDTH,), "last"),
        Parameter("head", (37, WIDTH), "last", 0),
    ]
    for p in even_model(3)[2:]:
        found.append(p)
        if p.name.endswith(("qkv", "gate_up")):
            found.append(Parameter(p.name + ".bias", p.shape[:1], p.layer, 0, p.parts, p.unit))
        else:
            found.append(Parameter(p.name + ".bias", (WIDTH,), p.layer))
    return found


def numbers(parameters: list[Parameter], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {p.name: torch.randn(p.shape, generator=generator) for p in parameters}


def size_of(parameters: list[Parameter]) -> int:
    return sum(p.bytes_of(WHOLE) for p in parameters)


LAYOUTS = [  # (pp, tp, dp)
    Layout(pp=pp, tp=tp, dp=dp)
    for pp, tp, dp in [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 4, 1), (4, 1, 1)]
]
