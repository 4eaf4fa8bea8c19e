"""Global batches, the same sequence of them under every plan: packed text, or random numbers where no text is given."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import torch

from autopar.errors import AutoparError
from autopar.runtime import tokens
from autopar.runtime.folder import BuildFolder
from autopar.runtime.manifest import InputEntry, dtype_of
from autopar.runtime.seeds import seed_of
from autopar.runtime.world import World

Batch = dict[str, torch.Tensor]
FILLED = ("input_ids", "labels", "attention_mask", "position_ids")  # the inputs that text can fill


class Batches(Protocol):
    """``batch(step)`` is the global batch of a step: position in the data follows from the step alone."""

    def batch(self, step: int) -> Batch: ...

    def describe(self) -> str: ...


class Random:
    """Random inputs (whole numbers below ``high``, or below 2 where that is unknown; else standard normal)."""

    def __init__(self, read: BuildFolder, seed: int):
        self.read, self.seed = read, seed

    def describe(self) -> str:
        return "no data.text in the job: training on random numbers"

    def batch(self, step: int) -> Batch:
        draw = torch.Generator().manual_seed(seed_of(self.seed, f"data/{step}"))
        return {name: _random(entry, _sequences(self.read, entry), draw) for name, entry in self._inputs()}

    def _inputs(self) -> list[tuple[str, InputEntry]]:
        return list(self.read.manifest.inputs.items())


class Text:
    """Sequences cut one after another from all the text, in an order that is shuffled anew for every pass over it."""

    def __init__(self, read: BuildFolder, tokens_: np.ndarray, seed: int):
        self.read, self.tokens, self.seed = read, tokens_, seed
        inputs = read.manifest.inputs
        odd = [n for n in inputs if n not in FILLED]
        if odd or "input_ids" not in inputs:
            raise AutoparError(f"data.text can fill {', '.join(FILLED)}; the program takes {', '.join(inputs)}")
        self.sequences, self.length = _sequences(read, inputs["input_ids"]), inputs["input_ids"].shape[1]
        self.total = len(tokens_) // self.length
        if self.total == 0:
            raise AutoparError(f"data.text: {len(tokens_)} tokens are less than one sequence of {self.length}")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        high, largest = inputs["input_ids"].high, int(tokens_.max())
        if high is not None and largest >= high:
            raise AutoparError(f"data.tokenizer: it makes token {largest}; the model's vocabulary ends at {high - 1}")

    def describe(self) -> str:
        return f"{len(self.tokens)} tokens of text: {self.total} sequences of {self.length}"

    def batch(self, step: int) -> Batch:
        first = step * self.sequences
        ids = torch.stack([self._sequence(first + i) for i in range(self.sequences)])
        made = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        made["position_ids"] = torch.arange(self.length).expand_as(ids)
        return {name: made[name].to(dtype_of(e.dtype)) for name, e in self.read.manifest.inputs.items()}

    def _sequence(self, index: int) -> torch.Tensor:
        epoch, place = divmod(index, self.total)
        if self._order[0] != epoch:
            order = np.random.default_rng(seed_of(self.seed, f"epoch/{epoch}")).permutation(self.total)
            self._order = (epoch, order)
        start = int(self._order[1][place]) * self.length
        return torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))


def batches_of(read: BuildFolder, world: World, seed: int) -> Batches:
    """The job's data. Collective: the first rank of a host makes the token cache, the others wait."""
    data = read.job.data
    if not data.text:
        return Random(read, seed)
    target = tokens.cache_of(data, read.path, read.path / "data")
    error = ""
    if int(os.environ.get("LOCAL_RANK", 0 if world.first else 1)) == 0 and not target.exists():
        try:
            tokens.tokenize(data, read.path, target)
        except (AutoparError, OSError) as caught:
            error = str(caught)
    error = world.first_error(error)
    if error:
        raise AutoparError(error)
    return Text(read, tokens.read(target), seed)


def _sequences(read: BuildFolder, entry: InputEntry) -> int:
    """Sequences in a global batch."""
    return entry.shape[0] * read.plan.microbatches * read.plan.mesh.dp


def _random(entry: InputEntry, sequences: int, draw: torch.Generator) -> torch.Tensor:
    shape = (sequences, *entry.shape[1:]) if entry.batched else entry.shape
    dtype = dtype_of(entry.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    return torch.randint(0, entry.high or 2, shape, generator=draw).to(dtype)
