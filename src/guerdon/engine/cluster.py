"""What a cluster of GPUs can do: sizes, rates, bandwidths and latencies, read from a small TOML file that a user edits."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, UsageError, nearest

_FOLDER = Path(__file__).parent / "clusters"
_SHORT = re.compile(r"(\d+)x(\d+)x([A-Za-z][\w-]*)")


@dataclass(frozen=True)
class ClusterSpec:
    """Equal nodes of equal GPUs. The keys of a TOML file are the fields of this class, in the same units.

    Args:
        name: for reports.
        nodes, gpus_per_node: the cluster has ``nodes * gpus_per_node`` GPUs; ranks fill a node before the next begins.
        memory_gib: memory of a GPU in GiB, of which the share ``memory_usable`` is for models.
        tflops: peak rate of dense bf16 matrix products, TFLOP/s; ``compute_efficiency`` of it is reached.
        memory_tb_s: peak bandwidth of a GPU's memory, TB/s; ``memory_efficiency`` of it is reached.
        intra_node_gb_s: bus bandwidth of a collective inside a node, GB/s.
        inter_node_gb_s: bandwidth of one network card, GB/s.
        rails: network cards a node, shared by all groups that leave the node at the same time. 0 means that contention is not
            modelled: each such group has ``inter_node_gb_s`` for itself.
        collective_us, small_collective_us: start of a large collective, and of one while decoding, microseconds.
        launch_us, decode_launch_us: start of one layer's kernels, and the same while decoding, microseconds.
        reallocation_ms: start of moving a model's weights to another layout, milliseconds.
        host_gb_s: bandwidth between a GPU and the host's memory, GB/s: how fast offloaded weights come back.

    Raises `UsageError` for a value of the wrong type or out of range, naming the field.
    """

    name: str
    nodes: int
    gpus_per_node: int
    memory_gib: float
    tflops: float
    memory_tb_s: float
    intra_node_gb_s: float
    inter_node_gb_s: float
    rails: int = 0
    memory_usable: float = 0.9
    compute_efficiency: float = 0.45
    memory_efficiency: float = 0.6
    collective_us: float = 12.0
    small_collective_us: float = 15.0
    launch_us: float = 25.0
    decode_launch_us: float = 8.0
    reallocation_ms: float = 30.0
    host_gb_s: float = 25.0

    def __post_init__(self) -> None:
        for field in fields(self):
            problem = _fault(field.name, getattr(self, field.name))
            if problem:
                raise UsageError(f"cluster '{self.name}': {field.name} {problem}")

    # --- sizes and rates, in bytes, seconds and operations ----------------------------------------------

    @property
    def gpus(self) -> int:
        """GPUs altogether."""
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> float:
        """Bytes of a GPU that models may use."""
        return self.memory_gib * 2**30 * self.memory_usable

    @property
    def flops(self) -> float:
        """Operations a second that matrix products reach."""
        return self.tflops * 1e12 * self.compute_efficiency

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second that kernels read from a GPU's memory."""
        return self.memory_tb_s * 1e12 * self.memory_efficiency

    def with_gpus(self, gpus: int) -> ClusterSpec:
        """The same machines, as many as ``gpus`` take; fewer than a node means a smaller node."""
        if gpus < 1:
            raise UsageError(f"a cluster needs at least one GPU, not {gpus}")
        if gpus <= self.gpus_per_node:
            return replace(self, nodes=1, gpus_per_node=gpus)
        if gpus % self.gpus_per_node:
            raise UsageError(f"{gpus} GPUs are no whole number of nodes of {self.gpus_per_node}")
        return replace(self, nodes=gpus // self.gpus_per_node)

    # --- communication ----------------------------------------------------------------------------------

    def between_nodes(self, members: int = 1) -> float:
        """Bytes a second for one group that leaves its nodes and has ``members`` GPUs in each.

        The GPUs of a node form ``gpus_per_node / members`` such groups, which work at the same time and share its cards.
        """
        rate = self.inter_node_gb_s * 1e9
        if self.rails == 0:
            return rate
        groups = max(1.0, self.gpus_per_node / max(1, members))
        return rate * self.rails / groups

    def bandwidth(self, size: int, stride: int = 1) -> float:
        """Bytes a second for a group of ``size`` ranks, ``stride`` apart, that begins with a node."""
        if size * stride <= self.gpus_per_node or size == 1:
            return self.intra_node_gb_s * 1e9
        return self.between_nodes(min(size, max(1, self.gpus_per_node // stride)))

    def all_reduce(self, bytes_: float, size: int, stride: int = 1, small: bool = False) -> float:
        """Seconds of an all-reduce (of as much as a reduce-scatter with an all-gather): 2 (n-1)/n bytes / bandwidth + start."""
        if size <= 1:
            return 0.0
        start = (self.small_collective_us if small else self.collective_us) * 1e-6
        return 2 * (size - 1) / size * bytes_ / self.bandwidth(size, stride) + start

    def all_gather(self, bytes_: float, size: int, stride: int = 1) -> float:
        """Seconds of an all-gather to ``bytes_`` on each rank (a reduce-scatter takes as long): half of an all-reduce."""
        if size <= 1:
            return 0.0
        return (size - 1) / size * bytes_ / self.bandwidth(size, stride) + self.collective_us * 1e-6

    # --- this machine -----------------------------------------------------------------------------------

    @staticmethod
    def measure(processes: int, device: str = "cpu", threads: int = 1) -> ClusterSpec:
        """This machine as a node of ``processes`` workers, measured: seconds, a few.

        Args:
            processes: that measure at the same time, over gloo (CPU) or NCCL (GPUs, one each).
            device: "cpu" or "cuda".
            threads: of each process on the CPU.

        Efficiencies are 1, because the rates are those that were reached. A single process has no bandwidth to others: it gets
        that of its memory.
        """
        if processes < 1 or threads < 1:
            raise UsageError(
                f"cannot measure {processes} processes with {threads} threads; at least 1 of each"
            )
        from guerdon.engine.meter import measure

        found = measure(processes, device, threads)
        bus = found.get("bus", found["bandwidth"]) / 1e9
        start = found.get("start", 0.0) * 1e6
        return ClusterSpec(
            f"measured ({processes} {device} processes)",
            nodes=1,
            gpus_per_node=processes,
            memory_gib=found["memory"] / 2**30,
            tflops=found["flops"] / 1e12,
            memory_tb_s=found["bandwidth"] / 1e12,
            intra_node_gb_s=bus,
            inter_node_gb_s=bus,
            compute_efficiency=1.0,
            memory_efficiency=1.0,
            collective_us=start,
            small_collective_us=start,
            launch_us=found["launch"] * 1e6,
            decode_launch_us=found["launch"] * 1e6,
            reallocation_ms=found.get("moving", 0.0) * 1e3,
            host_gb_s=found["host"] / 1e9,
        )

    # --- files ------------------------------------------------------------------------------------------

    @staticmethod
    def shipped() -> list[str]:
        """Names of the clusters that come with the library."""
        return sorted(path.stem for path in _FOLDER.glob("*.toml"))

    @staticmethod
    def load(where: str | Path) -> ClusterSpec:
        """A cluster by the path of a TOML file, by a shipped name ("a100"), or by a short name: "8x8xH100" is eight nodes of
        eight H100.

        Raises `UsageError` for an unknown name and `DataError` for a file that cannot be used, naming file, key and what was
        expected.
        """
        text = str(where)
        short = _SHORT.fullmatch(text)
        if text.endswith(".toml") or "/" in text:
            return _read(Path(text))
        kind = (short[3] if short else text).lower()
        if kind not in ClusterSpec.shipped():
            raise UsageError(
                f"no cluster is called '{text}'; {nearest(kind, ClusterSpec.shipped())} (as 'a100', '2x8xA100' or the path of "
                "a .toml file)"
            )
        spec = _read(_FOLDER / f"{kind}.toml")
        if short is None:
            return spec
        if int(short[1]) < 1 or int(short[2]) < 1:
            raise UsageError(f"cluster '{text}': nodes and GPUs a node must be at least 1")
        return replace(spec, nodes=int(short[1]), gpus_per_node=int(short[2]))


def _fault(name: str, value: Any) -> str:
    """What is wrong with ``value`` as field ``name``, and what was expected; "" for nothing."""
    kind = next(field.type for field in fields(ClusterSpec) if field.name == name)
    if kind == "str":
        return "" if isinstance(value, str) and value else f"is {value!r}; expected a text"
    if kind == "int":
        least = 0 if name == "rails" else 1
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if good else f"is {value!r}; expected a whole number of at least {least}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return f"is {value!r}; expected a number"
    if name in ("memory_usable", "compute_efficiency", "memory_efficiency"):
        return "" if 0 < value <= 1 else f"is {value!r}; expected a share above 0 and at most 1"
    if name.endswith(("_us", "_ms")):
        return "" if value >= 0 else f"is {value!r}; expected a time of at least 0"
    return "" if value > 0 else f"is {value!r}; expected a number above 0"


def _read(path: Path) -> ClusterSpec:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the cluster {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is not TOML: {error}") from error
    known = [field.name for field in fields(ClusterSpec)]
    for key, value in values.items():
        if key not in known:
            raise DataError(f"{path}: '{key}' is no key of a cluster; {nearest(key, known)}")
        problem = _fault(key, value)
        if problem:
            raise DataError(f"{path}: '{key}' {problem}")
    for field in fields(ClusterSpec):
        if field.default is MISSING and field.name not in values:
            raise DataError(
                f"{path}: '{field.name}' is missing; clusters/a100.toml of guerdon.engine shows every key"
            )
    return ClusterSpec(**values)
