"""Rows in pieces and threads."""

from __future__ import annotations

import threading

import pytest
import torch

from guerdon.policies.parallel import by_rows


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 32, 33, 64, 65, 100, 193])
def test_pieces_join_to_the_whole(rows: int, two_threads: None) -> None:
    x = torch.randn(rows, 3)
    sizes: list[int] = []

    def call(piece: slice) -> torch.Tensor:
        sizes.append(len(x[piece]))
        return x[piece] * 2

    for gradient in (True, False):
        sizes.clear()
        with torch.set_grad_enabled(gradient):
            assert torch.equal(by_rows(call, rows), x * 2)
        assert sum(sizes) == rows
        assert max(sizes) <= 32
        assert len(sizes) == 1 or len(sizes) % 2 == 0


def test_threads_only_without_gradient(two_threads: None) -> None:
    weight = torch.ones(3, requires_grad=True)
    x = torch.randn(64, 3)
    threads: set[str] = set()
    inner: list[int] = []

    def call(piece: slice) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        inner.append(torch.get_num_threads())
        return x[piece] * weight

    by_rows(call, 64).sum().backward()
    assert threads == {threading.current_thread().name}
    torch.testing.assert_close(weight.grad, x.sum(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        by_rows(call, 64)
    assert threads == {threading.current_thread().name}

    inner.clear()
    with torch.no_grad():
        assert not by_rows(call, 64).requires_grad
    assert all("guerdon-rows" in name for name in threads - {threading.current_thread().name})
    assert len(threads) > 1
    assert inner == [1, 1]
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [2]  # other threads are not left with one


def test_errors_come_through(two_threads: None) -> None:
    def call(piece: slice) -> torch.Tensor:
        raise KeyError("wrong")

    with pytest.raises(KeyError, match="wrong"), torch.no_grad():
        by_rows(call, 64)
