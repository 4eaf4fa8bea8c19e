"""Batches made ahead of time in the background, so that no step waits for them."""

from __future__ import annotations

import queue
import threading
from typing import Any

from autopar.runtime.data import Batch, Batches

DEPTH = 2  # batches that are kept ready


class Ahead:
    """``batches`` from step ``start`` on, made in a thread. Steps are asked for in order; an error comes where it belongs.

    ``pin``: copy them into page-locked memory, from which an accelerator reads without stopping the process.
    """

    def __init__(self, batches: Batches, start: int, *, stop: int, pin: bool = False, depth: int = DEPTH):
        self.batches, self.next, self.stop, self.pin = batches, start, stop, pin
        self._ready: queue.Queue[tuple[int, Any]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(start,), daemon=True, name="autopar-data")
        self._thread.start()

    def describe(self) -> str:
        return self.batches.describe()

    def batch(self, step: int) -> Batch:
        """The batch of the next step; whatever went wrong while it was made is raised here."""
        assert step == self.next < self.stop, (step, self.next, self.stop)
        made, value = self._ready.get()
        assert made == step, (made, step)
        self.next += 1
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # it may wait for room
            except queue.Empty:
                self._thread.join(0.01)

    def _make(self, start: int) -> None:
        for step in range(start, self.stop):
            if self._closed.is_set():
                return
            try:
                value: Any = self.batches.batch(step)
                if self.pin:
                    value = {name: tensor.pin_memory() for name, tensor in value.items()}
            except BaseException as error:
                value = error
            self._ready.put((step, value))
            if isinstance(value, BaseException):
                return
