"""The training run: what the emitted ``train.py`` calls on every rank."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from autopar.errors import AutoparError
from autopar.runtime import checkpoint, report
from autopar.runtime.ahead import Ahead
from autopar.runtime.data import Batches, batches_of
from autopar.runtime.engine import Engine
from autopar.runtime.folder import BuildFolder
from autopar.runtime.memory import Meter
from autopar.runtime.parameters import plain
from autopar.runtime.sources import Source
from autopar.runtime.world import VICTIM, leave, lost

CHECKPOINTS = "checkpoints"
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def main(
    folder: str | Path,
    *,
    resume: bool | None = None,
    build: Callable[[], nn.Module] | None = None,
    source: Source | None = None,
) -> None:
    """Train a build folder to the job's last step. Under torchrun, one call on each rank.

    ``resume``: go on from the last checkpoint, if there is one (default: whether the command line says ``--resume``).
    ``build`` and ``source``: as for `Engine`. Ends the process: with status 0, or with status 2 and one message when the
    user's input is wrong. On SIGTERM or SIGINT, saves and stops.
    """
    if resume is None:
        parser = argparse.ArgumentParser(description="Train this build folder (start it with torchrun).")
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        resume = parser.parse_args().resume
    assert resume is not None
    try:
        _recorded(Path(folder).resolve(), resume, build, source)
    except SystemExit as ending:
        leave(ending.code if isinstance(ending.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


@record
def _recorded(
    folder: Path, resume: bool, build: Callable[[], nn.Module] | None, source: Source | None
) -> None:  # `record` leaves an error file for the launcher
    _die_with_parent()
    stop = Stop()
    try:
        engine = Engine(folder, source=source, build=build)
        Run(engine, BuildFolder.read(folder), stop).go(resume)
    except (AutoparError, OSError) as error:  # OSError: a full disk under metrics or the token cache
        rank = dist.get_rank() if dist.is_initialized() else 0
        report.failed(folder, rank, str(error))
        if rank == 0:
            print(f"autopar: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not lost(str(error)):
            raise
        raise SystemExit(VICTIM) from None  # the launcher names the rank that failed; this one has nothing to say


def _die_with_parent() -> None:
    """A launcher that is killed must not leave ranks behind (Linux: ``prctl(PR_SET_PDEATHSIG, SIGKILL)``)."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Stop:
    """Set by SIGTERM or SIGINT. All ranks look at it together, so all stop after the same step."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Clock:
    """Where the seconds of a step go on this rank: waiting for ``data``, forward and backward ``passes`` with all sums of
    gradients, the ``update``. On GPUs an update is still running when it is read; the next step's passes wait for it."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def read(self, name: str) -> None:
        """The seconds since the last reading are ``name``'s."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now

    def move(self, source: str, name: str, seconds: float) -> None:
        """So many of the seconds of ``source`` are ``name``'s."""
        self.seconds[source] -= seconds
        self.seconds[name] = seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def parts(self) -> dict[str, float]:
        return {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}


class Run:
    """One training run of an engine over its job's data."""

    def __init__(self, engine: Engine, read: BuildFolder, stop: Stop):
        self.engine, self.read, self.stop, self.world = engine, read, stop, engine.world
        self.folder, self.options = read.path, read.job.train
        self.root = self.folder / CHECKPOINTS
        self.meter = Meter(self.world.device)

    def go(self, resume: bool) -> None:
        batches = batches_of(self.read, self.world, self.engine.seed)
        start = self._start(resume)
        self._say(f"steps {start + 1} to {self.options.steps}; {batches.describe()}")
        ahead = Ahead(batches, start, stop=self.options.steps, pin=self.world.device.type == "cuda")
        try:
            interrupted, lines = self._loop(ahead, start)
        finally:
            ahead.close()
        if not interrupted:
            self._finish(lines, self.options.steps - start)

    def _start(self, resume: bool) -> int:
        """The number of steps already done."""
        there = (self.root / checkpoint.LATEST).exists()
        if resume and there:
            self.engine.load(self.root)
        elif resume:
            self._say("no checkpoint to resume from: starting at the beginning")
        elif there and self.world.first:
            kept = next(p for i in range(1, 10000) if not (p := self.root.with_name(f"{CHECKPOINTS}-{i}")).exists())
            self.root.rename(kept)
            self._say(f"the checkpoints of an earlier run are kept in {kept.name}")
        self.world.barrier()
        return self.engine.steps

    def _loop(self, batches: Batches, start: int) -> tuple[bool, list[dict]]:
        metrics = report.Metrics(self.folder, start) if self.world.first else None
        progress = report.Progress(start, self.options.steps) if self.world.first else None
        interrupted, saved = False, start
        if self.world.first:
            report.status(self.folder, "running")
        try:
            for step in range(start + 1, self.options.steps + 1):
                loss, clock = self._step(batches, step, measure=step == start + 1)
                rate = self.read.manifest.tokens(self.read.plan) / clock.total
                if metrics is not None and progress is not None:
                    scaled = {"loss_scale": self.engine.scale.value} if self.engine.scale else {}
                    metrics.add(
                        step=step, loss=loss, tokens_per_second=rate, step_seconds=clock.total, peak_bytes=self.meter.peak,
                        **clock.parts(), **scaled,
                    )  # fmt: skip
                    progress.step(loss, rate)
                interrupted = self.world.sum(float(self.stop.asked))[0] > 0
                if interrupted or step == self.options.steps or self._due(step):
                    self.engine.save(self.root)
                    saved = step
                if interrupted:
                    break
        finally:
            if metrics is not None and progress is not None:
                metrics.close()
                progress.close()
        if interrupted:
            self._say(f"stopped as asked after step {saved}; its checkpoint is saved, --resume goes on from it")
            if self.world.first:
                report.status(self.folder, "interrupted", step=saved)
        return interrupted, metrics.lines if metrics is not None else []

    def _due(self, step: int) -> bool:
        every = self.options.checkpoint_every
        return every > 0 and step % every == 0

    def _step(self, batches: Batches, step: int, *, measure: bool) -> tuple[float, Clock]:
        """One step: loss and seconds. The first of a run is measured for memory, which makes it slow."""
        clock = Clock()
        batch = batches.batch(step - 1)
        clock.read("data")
        with self.meter.first_step(alive(self.engine)) if measure else contextlib.nullcontext():
            loss = self.engine.step(batch)
        clock.read("passes")
        clock.move("passes", "update", self.engine.update_seconds)
        if measure:
            self.meter.read()
        return loss, clock

    def _finish(self, lines: list[dict], own: int) -> None:
        peaks = self.world.everyone(self.meter.peak)
        if self.world.first:
            found = report.summary(lines, own, peaks, self.read.document, self.meter.measures)
            report.replace(self.folder / report.SUMMARY, json.dumps(found, indent=1))
            report.status(self.folder, "done", step=self.options.steps)
            self._say(report.table(found))
            self._say(f"checkpoints, metrics and summary are in {self.folder}")

    def _say(self, text: str) -> None:
        if self.world.first:
            print(text, file=sys.stderr, flush=True)


def alive(engine: Engine) -> Iterator[torch.Tensor]:
    """The tensors that live through a step: parameters, buffers, optimizer state."""
    for held in engine.held:
        yield plain(held.parameter).detach()
    for _, _, module in engine.stages:
        yield from module.buffers()
    for state in engine.optimizer.state:
        yield from state.values()
