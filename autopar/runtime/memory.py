"""How many bytes of tensors are alive at most on this rank."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEASURES = {
    "cpu": "the most bytes of live tensor storages during one step (temporaries inside single kernels are not seen)",
    "cuda": "torch.cuda.max_memory_allocated",
}


RESYNC = 1.01  # growth over the peak at which all sizes are read anew: FSDP frees storages without an operator


class LiveBytes(TorchDispatchMode):
    """Counts the storages of tensors on the CPU while it is active: those given at the start, and every new one.

    Sees each operator's inputs and results, in the backward pass too, and when a storage is freed. Slow (a Python call
    for every operator), so one step is measured, not all. ``peak``: bytes, to 1 %.
    """

    def __init__(self, alive: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in alive:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((result, args)):
            if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
                self._see(value)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key))
        if known != size:
            self._sizes[key] = size
            self.now += size - (known or 0)
            if self.now > self.peak * RESYNC:
                self._resync()

    def _resync(self) -> None:
        for key, reference in self._storages.items():
            storage = reference()
            self._sizes[key] = 0 if storage is None else storage.nbytes()
        self.now = sum(self._sizes.values())
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._storages.pop(key, None)


class Meter:
    """The peak bytes of this rank: measured in one step on the CPU, by the allocator on CUDA."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    @property
    def measures(self) -> str:
        return MEASURES[self.device.type]

    def first_step(self, alive: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
        """A context manager for the step to measure; `read` it afterwards."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return nullcontext()
        self.mode = LiveBytes(alive)
        return self.mode

    def read(self) -> int:
        cuda = self.device.type == "cuda"
        self.peak = torch.cuda.max_memory_allocated(self.device) if cuda else self.mode.peak
        return self.peak
