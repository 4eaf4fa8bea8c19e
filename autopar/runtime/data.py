"""Global batches, the same sequence of them under every plan: packed text, or random numbers where no text is given."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from autopar.errors import AutoparError
from autopar.runtime import corpus, objectives
from autopar.runtime.corpus import Corpus
from autopar.runtime.folder import BuildFolder
from autopar.runtime.manifest import InputEntry, dtype_of
from autopar.runtime.objectives import Window
from autopar.runtime.order import shuffled
from autopar.runtime.seeds import seed_of
from autopar.runtime.world import World

Batch = dict[str, torch.Tensor]
FILLED = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "document_ids", "prefix_length"})
ASKING = 0.5  # seconds between two questions whether the tokens are there


class Batches(Protocol):
    """``batch(step)`` is the global batch of a step (from 0): the place in the data follows from the step alone."""

    def batch(self, step: int) -> Batch: ...

    def describe(self) -> str: ...


class Random:
    """Random inputs (whole numbers below ``high``, or below 2 where that is unknown; else standard normal)."""

    def __init__(self, read: BuildFolder, seed: int):
        self.read, self.seed = read, seed

    def describe(self) -> str:
        return "no data in the job: training on random numbers"

    def batch(self, step: int) -> Batch:
        draw = torch.Generator().manual_seed(seed_of(self.seed, f"data/{step}"))
        made = {n: _random(e, sequences(self.read, e), draw) for n, e in self.read.manifest.inputs.items()}
        if self.read.job.data.plain:
            return made
        text = {name: made[name] for name in ("input_ids", "labels")}
        return fitted(objectives.example(self.read.job.data, text, None), self.read)


class Packed:
    """Rows cut one after another from the tokens of all documents, in an order shuffled anew for every pass over them."""

    def __init__(self, read: BuildFolder, tokens: Corpus, seed: int):
        self.read, self.corpus, self.seed = read, tokens, seed
        inputs = read.manifest.inputs
        if not FILLED.issuperset(inputs) or "input_ids" not in inputs:
            raise AutoparError(
                f"data: text can fill {', '.join(sorted(FILLED))}; the program takes {', '.join(inputs)}"
            )
        self.sequences, self.length = sequences(read, inputs["input_ids"]), inputs["input_ids"].shape[1]
        separate = "separate" if "document_ids" in inputs else read.job.data.documents
        data = read.job.data.model_copy(update={"documents": separate})
        self.objective = objectives.objective_of(data, lambda token: tokens.facts.special[token])
        self.window = self.objective.window(self.length)
        self.total = len(tokens.ids) // self.window
        self._check(inputs)

    def _check(self, inputs: dict[str, InputEntry]) -> None:
        facts, high = self.corpus.facts, inputs["input_ids"].high
        if self.total == 0:
            raise AutoparError(f"data: {facts.tokens} tokens are less than one sequence of {self.window}")
        if high is not None and facts.highest >= high:
            raise AutoparError(
                f"data.tokenizer: it makes token {facts.highest}; the model's vocabulary ends at {high - 1} "
                f"(a vocabulary of at least {facts.highest + 1} would be right)"
            )
        for name in sorted(self.objective.inputs - inputs.keys()):
            raise AutoparError(
                f"data: {self.read.job.data.objective.name} with documents {self.read.job.data.documents} makes '{name}', "
                f"which the program does not take (it takes {', '.join(inputs)}); compile the job again"
            )

    def describe(self) -> str:
        facts = self.corpus.facts
        text = f"{facts.tokens} tokens of text in {facts.documents} documents: {self.total} sequences of {self.length}"
        if not facts.broken:
            return text
        shown = "\n  ".join(facts.messages)
        more = f"\n  … and {facts.broken - len(facts.messages)} more" if facts.broken > len(facts.messages) else ""
        return f"{text}; {facts.broken} broken line{'s' * (facts.broken > 1)}:\n  {shown}{more}"

    def batch(self, step: int) -> Batch:
        rows = np.arange(step * self.sequences, (step + 1) * self.sequences)
        places = np.empty_like(rows)
        for epoch in np.unique(rows // self.total):
            here = rows // self.total == epoch
            places[here] = shuffled(rows[here] % self.total, self.total, seed_of(self.seed, f"epoch/{epoch}"))
        made = [self._row(int(row), int(place)) for row, place in zip(rows, places, strict=True)]
        return fitted(objectives.stack(made), self.read)

    def _row(self, index: int, place: int) -> objectives.Row:
        start, end = place * self.window, (place + 1) * self.window
        ids = self.corpus.ids[start:end].astype(np.int64)
        learned = self.corpus.learned
        flags = np.ones(self.window, bool) if learned is None else learned[start:end].astype(bool)
        documents = np.searchsorted(self.corpus.starts, np.arange(start, end), side="right")
        draw = np.random.default_rng(seed_of(self.seed, f"row/{index}"))
        return self.objective.row(Window(ids, flags, documents - documents[0]), self.length, draw)


def fitted(made: Batch, read: BuildFolder) -> Batch:
    """What the program takes of a batch, in its dtypes."""
    if "attention_mask" in read.manifest.inputs and "attention_mask" not in made:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    return {name: made[name].to(dtype_of(entry.dtype)) for name, entry in read.manifest.inputs.items()}


def batches_of(read: BuildFolder, world: World, seed: int) -> Batches:
    """The job's data. Collective: the first rank of a host makes the tokens, the others wait."""
    if not read.job.data.given:
        return Random(read, seed)
    target = corpus.place_of(read.job.data, read.path, read.path / "data")
    _prepared(read, world, target)
    tokens = Corpus.read(target)
    if len(set(world.everyone(tokens.facts.digest))) > 1:
        raise AutoparError("data: the hosts do not have the same text or tokenizer: their tokens differ")
    return Packed(read, tokens, seed)


def _prepared(read: BuildFolder, world: World, target: Path) -> None:
    """Wait until the tokens are there on every host, however long that takes.

    They are made in a thread while all ranks keep asking each other: a collective that waits for an hour would end in
    its own timeout.
    """
    first = int(os.environ.get("LOCAL_RANK", 0 if world.first else 1)) == 0
    work = _Work(read, target) if first and not target.exists() else None
    while True:
        states = world.everyone("" if work is None else work.state())
        error = next((s for s in states if s not in ("", _Work.RUNNING)), "")
        if error:
            if work is not None and work.fault is not None:
                raise work.fault
            raise AutoparError(error)
        if _Work.RUNNING not in states:
            return
        time.sleep(ASKING if work is None else 0)
        if work is not None:
            work.thread.join(ASKING)


class _Work:
    """Making the tokens, in a thread."""

    RUNNING = "running"

    def __init__(self, read: BuildFolder, target: Path):
        self.error, self.fault = "", None
        self.thread = threading.Thread(target=self._run, args=(read, target), daemon=True, name="autopar-tokens")
        self.thread.start()
        self.thread.join(ASKING)

    def _run(self, read: BuildFolder, target: Path) -> None:
        try:
            corpus.prepare(read.job.data, read.path, target)
        except (AutoparError, OSError) as caught:
            self.error = str(caught)
        except Exception as caught:  # ours: told to all ranks, raised on this one
            self.error, self.fault = f"the tokens could not be made: {caught!r}", caught

    def state(self) -> str:
        return self.RUNNING if self.thread.is_alive() else self.error


def sequences(read: BuildFolder, entry: InputEntry) -> int:
    """Sequences in a global batch."""
    return entry.shape[0] * read.plan.microbatches * read.plan.mesh.dp


def _random(entry: InputEntry, rows: int, draw: torch.Generator) -> torch.Tensor:
    shape = (rows, *entry.shape[1:]) if entry.batched else entry.shape
    dtype = dtype_of(entry.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    return torch.randint(0, entry.high or 2, shape, generator=draw).to(dtype)
