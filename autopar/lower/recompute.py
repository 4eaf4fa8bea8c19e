"""What a block does not keep for its backward pass: parts of it that run again there, each once, when first needed.

`torch.utils.checkpoint` forgets what the layers inside of a region keep, so a layer whose input is to be made again must
run again itself. Here the layers outside of a part forget its results, too: a norm is made again, the product that reads it is
not. Everything made again has the bits it had: the same operators on the same operands, the same random numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Tensors = tuple[torch.Tensor, ...]


class Again:
    """While active, what autograd would keep of the parts' results, and inside the parts, is replaced by how to make it.

    with Again() as again:
        (normed,) = again.part(self.norm_again, hidden)  # keeps `hidden` alone
        query = F.linear(normed, self.q_weight)  # would keep `normed`
    """

    def __init__(self) -> None:
        self.results: dict[int, tuple[StorageWeakRef, Part, int]] = {}  # storage → the result that is made again
        self.running: Part | None = None
        self.hooks = saved_tensors_hooks(self.pack, unpack)

    def __enter__(self) -> Again:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self.results.clear()

    def part(self, run: Callable[..., Tensors], *given: torch.Tensor, random: bool = False) -> Tensors:
        """``run(*given)``, now and once more in the backward pass. ``random``: it draws random numbers."""
        if not torch.is_grad_enabled():
            return run(*given)
        part = self.running = Part(run, given, [self.find(t) or t for t in given], random)
        made = run(*given)
        self.running = None
        for position, result in enumerate(made):
            storage = result.untyped_storage()
            if storage._cdata not in part.storages:  # a view of what was given stays that
                self.results[storage._cdata] = StorageWeakRef(storage), part, position
        return made

    def find(self, tensor: torch.Tensor) -> Handle | None:
        """How to make a tensor again, where it is (a view of) a part's result."""
        known = self.results.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        _, part, position = known
        return Handle(part, ~position, (tensor.shape, tensor.stride(), tensor.storage_offset()), tensor.dtype)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Handle:
        """What autograd keeps for ``tensor``."""
        part, found = self.running, self.find(tensor)
        if part is None:
            return found or tensor
        number, part.count = part.count, part.count + 1
        if found is not None or tensor.untyped_storage()._cdata in part.storages:
            return found or tensor
        return Handle(part, number)


class Handle:
    """Stands for a tensor of a part: number ``key`` of those kept while it ran, or (``~key``) a view of a result of it."""

    def __init__(self, part: Part, key: int, view: tuple[Any, Any, int] | None = None, dtype: Any = None) -> None:
        self.part, self.key, self.view, self.dtype = part, key, view, dtype
        part.wanted[key] += 1

    def tensor(self) -> torch.Tensor:
        made = self.part.take(self.key)
        if self.view is None:
            return made
        return (made if made.dtype == self.dtype else made.view(self.dtype)).as_strided(*self.view)


def unpack(kept: torch.Tensor | Handle) -> torch.Tensor:
    return kept.tensor() if isinstance(kept, Handle) else kept


class Part:
    """One call of a part: what it was given, and while the backward pass needs them, what it made."""

    def __init__(self, run: Callable[..., Tensors], given: Tensors, kept: list[Any], random: bool) -> None:
        self.run, self.kept = run, kept
        self.flags = [t.requires_grad for t in given]
        self.storages = {t.untyped_storage()._cdata for t in given}
        self.state = random_state(given[0].device) if random else None
        self.wanted: Counter[int] = Counter()  # key → how many handles of it there are
        self.made: dict[int, torch.Tensor] = {}
        self.left: Counter[int] = Counter()
        self.count = 0

    def take(self, key: int) -> torch.Tensor:
        """A tensor of the part, which runs again unless it has just done so; the last handle to ask takes it along."""
        if key not in self.made:
            self.again()
        self.left[key] -= 1
        return self.made[key] if self.left[key] > 0 else self.made.pop(key)

    def again(self) -> None:
        kept: list[torch.Tensor] = []

        def capture(tensor: torch.Tensor) -> int:
            kept.append(tensor.detach() if len(kept) in self.wanted else tensor.new_empty(0))
            return len(kept) - 1

        given = [unpack(k).detach().requires_grad_(f) for k, f in zip(self.kept, self.flags, strict=True)]
        with torch.enable_grad(), saved_tensors_hooks(capture, lambda number: kept[number]), replayed(self.state):
            results = self.run(*given)
        if len(kept) != self.count:
            raise AssertionError(f"{self.run.__name__} kept {self.count} tensors, and {len(kept)} when run again")
        self.made = {k: kept[k] if k >= 0 else results[~k].detach() for k in self.wanted}
        self.left = self.wanted.copy()


def random_state(device: torch.device) -> list[tuple[torch.device, torch.Tensor]]:
    """The random generators' states, of the host and of ``device``."""
    host = [(torch.device("cpu"), torch.get_rng_state())]
    return host if device.type == "cpu" else [*host, (device, torch.cuda.get_rng_state(device))]


def set_random_state(states: list[tuple[torch.device, torch.Tensor]]) -> None:
    for device, state in states:
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


@contextmanager
def replayed(states: list[tuple[torch.device, torch.Tensor]] | None) -> Iterator[None]:
    """With the random numbers from ``states`` on; the generators go on afterwards as if nothing had been drawn."""
    if states is None:
        yield
        return
    now = random_state(states[-1][0])
    set_random_state(states)
    try:
        yield
    finally:
        set_random_state(now)
