"""What the machine at hand can do, measured: rates of computing and memory, and of processes that talk to one another."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from guerdon.engine import parallel
from guerdon.engine.pools import ResourcePool
from guerdon.engine.workers import Worker, WorkerGroup, register

_KERNELS = 20  # small operations of one layer of a transformer, about


class Meter(Worker):
    """One of the processes that measure at the same time, as they would work at the same time.

    Args:
        device: "cpu" or "cuda" (process i takes GPU i).
        threads: of each process, on the CPU.
    """

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        parallel.join(self.master_address, self.master_port, self.rank, self.world_size)
        self.device = torch.device(device, self.rank) if device == "cuda" else torch.device(device)
        self.kind = torch.bfloat16 if device == "cuda" else torch.float32

    def _seconds(self, once: Callable[[], object], repeats: int = 7) -> float:
        times = []
        for _ in range(repeats + 2):
            self._wait()
            start = time.perf_counter()
            once()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @register("one_to_all")
    def alone(self) -> dict[str, float]:
        """Rates of one process while the others measure theirs."""
        big = self.device.type == "cuda"
        n = 4096 if big else 512
        a, b = (torch.randn(n, n, device=self.device, dtype=self.kind) for _ in range(2))
        flops = 2 * n**3 / self._seconds(lambda: a @ b)
        wide = torch.zeros(2**28 if big else 2**23, device=self.device)
        bandwidth = 2 * wide.nbytes / self._seconds(lambda: wide.clone())
        small = torch.zeros(8, device=self.device)

        def layer() -> None:
            for _ in range(_KERNELS):
                small.add_(1)

        host = torch.zeros(2**24, pin_memory=big)
        loading = host.nbytes / self._seconds(lambda: host.to(self.device, copy=True))
        memory = (
            torch.cuda.get_device_properties(self.device).total_memory
            if big
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.world_size
        )
        return {
            "flops": flops,
            "bandwidth": bandwidth,
            "launch": self._seconds(layer),
            "host": loading,
            "memory": float(memory),
        }

    @register("one_to_all")
    def together(self) -> dict[str, float]:
        """Collectives of all processes: seconds to start one, and bytes a second on the bus (as NCCL's tests count them)."""
        n = self.world_size
        small = torch.zeros(64, device=self.device)
        large = torch.zeros(2**26 if self.device.type == "cuda" else 2**20, device=self.device)
        start = self._seconds(lambda: dist.all_reduce(small), 31)
        seconds = self._seconds(lambda: dist.all_reduce(large))
        moving = self._seconds(lambda: dist.broadcast(small, 0), 31)
        return {
            "start": start,
            "bus": 2 * (n - 1) / n * large.nbytes / max(seconds - start, 1e-9),
            "moving": moving,
        }


def measure(processes: int, device: str = "cpu", threads: int = 1) -> dict[str, float]:
    """Rates of ``processes`` on this machine, in operations, bytes and seconds: of the slowest of them.

    Keys: flops, bandwidth, launch, host, memory, and with more than one process start, bus, moving.
    """
    pool = ResourcePool([processes], gpus=1.0 if device == "cuda" else 0.0)
    with WorkerGroup(pool, Meter, device, threads, backend="process", name="meter") as group:
        found = group.call("alone")
        told = group.call("together") if processes > 1 else []
    slow = {key: max(one[key] for one in found) for key in ("launch",)}
    slow |= {key: min(one[key] for one in found) for key in ("flops", "bandwidth", "host", "memory")}
    if told:
        slow |= {key: max(one[key] for one in told) for key in ("start", "moving")}
        slow["bus"] = min(one["bus"] for one in told)
    return slow
