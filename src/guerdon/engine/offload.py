"""Weights that wait in the host's memory while nobody computes with them.

A model that does not learn is needed for one call in an iteration. `Offloader` takes the memory of its tensors away and
gives it back with the same numbers (ReaLHF: Mei et al., 2024, section 5). The tensors themselves stay: parameters, views and
an optimiser that hold them need not be told, they only must not be read in between.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from guerdon.errors import UsageError


class Offloader:
    """Moves the storages of some tensors between their device and the host's memory.

    Args:
        tensors: what is moved; views of one storage count once.

    On CUDA the host's copies are pinned and the copies are queued on the current stream, so `restore` returns at once and
    what is queued after it finds the weights. On a CPU both ends are the same memory: the numbers of bytes are right, and
    nothing is gained.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._storages[storage._cdata] = (storage, storage.nbytes())
        self._host: list[Tensor] | None = None

    @property
    def bytes(self) -> int:
        """What is moved."""
        return sum(size for _, size in self._storages.values())

    @property
    def away(self) -> bool:
        """Whether the numbers are in the host's memory."""
        return self._host is not None

    @property
    def device_bytes(self) -> int:
        """Bytes in use on the device at this moment, read from the storages."""
        return sum(storage.nbytes() for storage, _ in self._storages.values())

    @property
    def host_bytes(self) -> int:
        """Bytes that wait in the host's memory."""
        return 0 if self._host is None else sum(copy.nbytes for copy in self._host)

    def offload(self) -> int:
        """Take the device's memory away; the bytes that this freed (0 if they are away already).

        Raises `UsageError` for a storage whose memory is not its own to give back, as that of a mapped file."""
        if self._host is not None:
            return 0
        copies = []
        for storage, size in self._storages.values():
            if not storage.resizable():
                raise UsageError(
                    "the memory of a tensor that is mapped or shared cannot be given back; clone it first"
                )
            there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
            host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            copies.append(host.copy_(there, non_blocking=True))
        for storage, _ in self._storages.values():
            storage.resize_(0)
        self._host = copies
        return self.bytes

    def restore(self) -> int:
        """Bring the numbers back, bit for bit; the bytes that came (0 if they are here already)."""
        if self._host is None:
            return 0
        for (storage, size), host in zip(self._storages.values(), self._host, strict=True):
            storage.resize_(size)
            there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
            there.copy_(host, non_blocking=True)
        self._host = None
        return self.bytes
