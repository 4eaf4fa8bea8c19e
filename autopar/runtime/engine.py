"""The engine: one object per rank that trains the emitted modules of a build folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from autopar.errors import AutoparError
from autopar.runtime import adapter, carried, checkpoint, gradients, materialize, pipeline, zero
from autopar.runtime.batch import microbatches
from autopar.runtime.folder import BuildFolder
from autopar.runtime.gather import buffers, gather
from autopar.runtime.manifest import StageEntry
from autopar.runtime.optim import Optimizer
from autopar.runtime.parameters import held_by
from autopar.runtime.scaler import LossScale, unscale
from autopar.runtime.seeds import seed_of
from autopar.runtime.sources import Source
from autopar.runtime.world import World, leave
from autopar.spec.job import Optimizer as OptimizerOptions


class Engine:
    """Trains a build folder. Every method is collective: all ranks call it with the same arguments.

    ``source`` says where the values of parameters and buffers come from (default: what the manifest lists; ``build``
    makes the model where they come from a seed). ``optimizer``, ``clip`` and ``seed`` override the job's.
    Under torchrun the process group is started if there is none; one device needs neither.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        source: Source | None = None,
        build: Callable[[], nn.Module] | None = None,
        optimizer: OptimizerOptions | None = None,
        clip: float | None = None,
        seed: int | None = None,
        device: torch.device | None = None,
    ):
        read = BuildFolder.read(folder)
        self.folder, self.plan, self.manifest, self.job = read.path, read.plan, read.manifest, read.job
        self.clip = self.job.train.clip if clip is None else clip
        self.seed = self.job.train.seed if seed is None else seed
        pipeline.check(self.plan, self.manifest)
        self.world = World.join(self.plan.mesh, device)
        source = source or materialize.source_of(self.folder, self.manifest, build)
        materialize.check(self.manifest, source)
        self.stages = [self._stage(read, i, source) for i in self.plan.stages_on(self.world.rank("pp"))]
        parts = [(entry, module) for _, entry, module in self.stages]
        self.held = held_by(parts, self.manifest, self.world)
        self.states = carried.carried_by(parts)
        count = self.plan.microbatches
        reduce = self.manifest.reduce_dtype
        self.replicas = [zero.Replicas(m, e.units, count, reduce, self.world) for e, m in parts]
        self.sums = gradients.Sums(self.held, self.manifest, self.plan, self.world)
        self.optimizer = Optimizer(self.held, optimizer or self.job.optimizer, self.job.train.steps, self.seed)
        self.runner = self._runner()
        self.scale = LossScale() if self.manifest.precision.get("compute") == "float16" else None
        self.finite = True  # whether the gradients of the last `accumulate` were, on all ranks
        self.update_seconds = 0.0  # what `apply` took in the last `step`, as this process saw it
        self.norm: float | None = None  # the global gradient norm of the last `apply`, where it was needed

    def _stage(self, read: BuildFolder, index: int, source: Source) -> tuple[int, StageEntry, nn.Module]:
        entry = self.manifest.stages[index]
        module = read.stage(index, self.world.group("tp"), self.world.group("cp"))
        materialize.verify_module(entry, module, self.world.shape.tp)
        for item in entry.parameters:
            module.get_parameter(item.path).requires_grad_(item.trainable)
        zero.shard(module, entry, self.plan.zero, self.manifest.reduce_dtype, self.world)
        materialize.fill(entry, module, self.manifest, source, self.world)
        return index, entry, module

    def _runner(self) -> pipeline.Runner:
        if self.plan.mesh.pp > 1:
            return pipeline.Pipeline(self.stages, self.plan, self.world)
        _, entry, module = self.stages[0]
        return pipeline.Loop(entry, module, self.plan.zero)

    @property
    def steps(self) -> int:
        """Steps done, also those whose update was skipped since a float16 gradient overflowed."""
        return self.optimizer.updates + (self.scale.skipped if self.scale else 0)

    def step(self, batch: Mapping[str, torch.Tensor]) -> float:
        """One optimizer step on a global batch; returns its mean loss, the same on every rank.

        ``batch`` is the *global* batch on every rank: (dp × micro-batches × sequences per micro-batch, …) tensors by
        key. Each replica takes its own share. The mean is over all counted labels of the global batch.
        """
        loss = self.accumulate(batch)
        begin = time.perf_counter()
        self.apply()
        self.update_seconds = time.perf_counter() - begin
        return loss

    def accumulate(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Forward, backward and all sums of gradients, without an update: `gradients` can be read afterwards.

        Gradients of a float16 program are scaled while they are computed and summed, and come out unscaled; `finite`
        says whether they are.

        Random numbers (dropout) follow from the seed, the number of steps, the replica, the cp and the pp rank alone, and
        are the same on all ranks along tp; so a resumed run draws what an uninterrupted one would.
        """
        parts = microbatches(dict(batch), self.manifest, self.plan, self.world.rank("dp"), self.world.device)
        factor = self.scale.value if self.scale else 1.0
        scale = factor / self._count(parts)
        place = f"{self.steps}/{self.world.rank('dp')}/{self.world.rank('pp')}"
        place += f"/{self.world.rank('cp')}" if self.world.shape.cp > 1 else ""
        self.world.seed(seed_of(self.seed, place))
        loss = self.runner.run(parts, scale)
        for replicas in self.replicas:
            replicas.finish()
        self.sums.run()
        if self.scale:
            self.finite = unscale(self.held, factor, self.world)
        return self.world.total(0.0 if loss is None else float(loss) / factor)

    def _count(self, parts: list[pipeline.Microbatch]) -> float:
        """The labels that count, in the whole global batch."""
        own, (index, entry, module) = 0.0, max(self.stages, key=lambda s: s[0])
        if index == len(self.manifest.stages) - 1:
            own = sum(float(module.count(**{k: p[k] for k in entry.inputs})) for p in parts)  # type: ignore[operator]
        total = self.world.total(own)
        if total <= 0:
            raise AutoparError("no label of this batch counts (all are ignored): it has no mean loss")
        return total

    def apply(self) -> None:
        """Clip by the true global norm (if asked for), update, and forget the gradients; no update if they overflowed.
        What stages carry from step to step moves on."""
        if self.clip is not None and self.finite:
            self.norm = gradients.norm(self.held, self.world)
            gradients.clip(self.held, self.clip, self.norm)
        if self.finite:
            self.optimizer.step()
        if self.scale:
            self.scale.update(self.finite)
        carried.advance(self.states, self.world)
        for held in self.held:
            held.parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All parameters and persistent buffers, whole, in the original names, on the CPU of *every* rank.

        Every rank holds the full model afterwards; `save` writes shards instead. Tied tensors appear under each name.
        """
        found = gather([(h.name, h.shard, h.local, h.owned) for h in self.held], self._shapes(False), self.world)
        full = {n: t for canonical, t in found.items() for n in self.manifest.names(canonical)}
        return full | self._buffers()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of all trainable parameters after `accumulate`, like `state_dict`; zeros where none flowed."""
        own = [(h.name, h.shard, h.grad, h.owned) for h in self.held if h.grad is not None]
        found = gather(own, self._shapes(True), self.world)  # type: ignore[arg-type]
        return {n: t for canonical, t in found.items() for n in self.manifest.names(canonical)}

    def _shapes(self, trainable: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Canonical name → whole shape and dtype, over all stages, in order."""
        items = [e for s in self.manifest.stages for e in s.parameters if e.trainable or not trainable]
        return {self.manifest.canonical(e.name): (e.shape, e.torch_dtype) for e in items}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return buffers(self.manifest, self.stages, self.world)

    def leave(self) -> NoReturn:
        """End this rank's process with status 0 when the others are done too, in place of ``destroy_process_group``."""
        leave()

    def save(self, path: str | Path, *, trainable_only: bool = False) -> Path:
        """Write a sharded checkpoint ``path/step-N`` that loads under any plan, and point ``path/latest`` to it.

        ``trainable_only``: without the frozen parameters, which a run that loads it takes from where it began.
        """
        return checkpoint.save(self, Path(path), trainable_only=trainable_only)

    def load(self, path: str | Path) -> None:
        """Read a checkpoint (a ``step-N`` folder, or the folder that holds it), saved under any plan."""
        checkpoint.load(self, Path(path))

    def save_adapter(self, folder: str | Path) -> Path:
        """Write what the PEFT passes trained in peft's own format, whatever the plan; only that is gathered."""
        return adapter.save(self, Path(folder))

    def load_adapter(self, folder: str | Path) -> None:
        """Fill the adapter's parameters from a folder that `save_adapter` or peft wrote."""
        adapter.load(self, Path(folder))
