"""Weights that wait in the host's memory: the bytes, the numbers, and what holds the tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guerdon.engine.offload import Offloader
from guerdon.errors import UsageError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


def test_device_memory_is_freed_to_the_byte_and_weights_come_back_bit_for_bit() -> None:
    net = model()
    before = [w.detach().clone() for w in net.parameters()]
    size = sum(w.nbytes for w in before)
    away = Offloader(net.parameters())
    assert (away.bytes, away.device_bytes, away.host_bytes) == (size, size, 0)
    assert away.offload() == size
    assert away.away
    assert (away.device_bytes, away.host_bytes) == (0, size)
    assert all(w.untyped_storage().nbytes() == 0 for w in net.parameters())
    assert away.restore() == size
    assert not away.away
    assert (away.device_bytes, away.host_bytes) == (size, 0)
    assert all(torch.equal(w, b) for w, b in zip(net.parameters(), before, strict=True))


def test_an_optimiser_goes_on_as_if_nothing_had_been() -> None:
    results = []
    for offloads in (False, True):
        net = model()
        optimiser = torch.optim.Adam(net.parameters(), lr=0.1)
        for step in range(3):
            if offloads and step:
                moments = [m for s in optimiser.state.values() for m in s.values() if torch.is_tensor(m)]
                away = Offloader([*net.parameters(), *moments])
                away.offload()
                away.restore()
            optimiser.zero_grad()
            net(torch.ones(2, 64)).square().sum().backward()
            optimiser.step()
        results.append([w.detach().clone() for w in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_views_of_one_memory_count_once_and_stay_views() -> None:
    flat = torch.arange(10.0)
    views = [flat[:4], flat[4:].view(2, 3)]
    away = Offloader([flat, *views])
    assert away.bytes == flat.nbytes
    away.offload()
    away.restore()
    assert views[1].tolist() == [[4, 5, 6], [7, 8, 9]]
    flat[4] = -1
    assert views[1][0, 0] == -1


def test_twice_is_once() -> None:
    tensor = torch.ones(3)
    away = Offloader([tensor, torch.empty(0)])
    assert away.restore() == 0
    assert away.offload() == 12
    assert away.offload() == 0
    assert away.restore() == 12
    assert away.restore() == 0
    assert tensor.tolist() == [1, 1, 1]


def test_memory_that_cannot_be_given_back_is_refused() -> None:
    import numpy as np

    borrowed = torch.from_numpy(np.ones(3, dtype=np.float32))
    with pytest.raises(UsageError, match="clone it first"):
        Offloader([borrowed]).offload()
    assert borrowed.tolist() == [1, 1, 1]
