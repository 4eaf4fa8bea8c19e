"""A program under a plan: saved as a build folder, started under torchrun."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.errors import PlanError
from autopar.plan.plan import Plan, PlanDocument
from autopar.spec.job import Job

if TYPE_CHECKING:
    import torch

    from autopar.ir.program import Program
    from autopar.runtime.engine import Engine
    from autopar.runtime.sources import Source

WEIGHTS = "weights.safetensors"
CHECKPOINTS = "checkpoints"  # of a run, in its build folder
ADDED = "added.safetensors"  # first values of the parameters that passes added


@dataclass
class Executable:
    """What `autopar.compile` returns. ``program`` is None for one that was loaded from its folder."""

    program: Program | None
    document: PlanDocument
    job: Job
    folder: Path | None = None

    @property
    def plan(self) -> Plan:
        return self.document.plan

    def save(self, folder: str | Path) -> Path:
        """Write the build folder. Weights of a model with real tensors are written along (safetensors)."""
        target = Path(folder)
        if self.program is None:
            assert self.folder is not None
            if target.resolve() != self.folder.resolve():
                shutil.copytree(self.folder, target, dirs_exist_ok=True)
            return target
        from autopar.lower.build import build
        from autopar.plan.text import summary

        static = self.program.at(batch=self.plan.microbatch, length=self.length())
        target.mkdir(parents=True, exist_ok=True)
        return build(
            static,
            self.document,
            target,
            job=self.job.dump(),
            weights=self.weights(target),
            page=page_of(self.document, static),
            summary=summary(self.document),
        )

    def length(self) -> int | None:
        return self.job.batch.length if self.job.batch is not None else None

    def weights(self, folder: Path) -> list[dict[str, Any]]:
        """The manifest's list of where values come from: the job's checkpoint, this module's tensors, or a seed."""
        from safetensors.torch import save_file

        assert self.program is not None
        program, origin = self.program, self.job.model
        if origin is None:
            missing = [n for n in program.read() if program.tensors[n].is_meta and n not in program.initial]
            if missing:
                raise PlanError(
                    f"the model has no weights ({missing[0]} is on the meta device) and the job names no model"
                )
            values = {n: program.tensors[n].detach().cpu().contiguous().clone() for n in program.read()}
            save_file(values, folder / WEIGHTS)
            return [{"files": WEIGHTS}]
        seed: dict[str, Any] = {"seed": self.job.train.seed}
        base: list[dict[str, Any]] = [seed]
        if stored := self.stored(folder):
            seed["buffers_only"] = True  # a missing parameter is an error
            base = [stored, seed]
        if not program.initial:
            return base
        save_file(self.added(folder, base), folder / ADDED)
        return [{"files": ADDED}, *base]

    def stored(self, folder: Path) -> dict[str, Any] | None:
        """The manifest's entry for the job's checkpoint; that of a declared model is written along in our names."""
        from safetensors.torch import save_file

        origin = self.job.model
        if origin is None or (origin.weights is None and (origin.hf is None or origin.config is not None)):
            return None
        if origin.weights is not None:
            from autopar.models.checkpoint import read_checkpoint

            tensors = read_checkpoint(origin.weights).named_parameters()  # a tied one once
            save_file({n: p.detach().contiguous() for n, p in tensors}, folder / WEIGHTS)
            return {"files": WEIGHTS}
        from autopar.models.huggingface import spelling

        name = str(origin.hf)
        path = Path(name).expanduser().resolve()
        return {"gguf": str(path)} if path.suffix == ".gguf" else {"files": str(path), **spelling(name)}

    def added(self, folder: Path, base: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Values of the parameters that passes added: as they are, or as they begin, some from the ``base`` weights."""
        from autopar.runtime.materialize import chain
        from autopar.sharding.placement import R

        assert self.program is not None
        program, seed = self.program, self.job.train.seed
        measured = any(i.kind == "norms" and program.tensors[n].is_meta for n, i in program.initial.items())
        source = chain(folder, base, self.builder()) if measured else None
        found: dict[str, torch.Tensor] = {}
        for name, initial in program.initial.items():
            entry = program.parameters.get(name) or program.buffers[name]
            shape, dtype = entry.shape, entry.dtype
            if not (held := program.tensors[name]).is_meta:
                found[name] = held.detach().cpu().contiguous().clone()
            elif initial.kind == "norms":
                assert source is not None
                found[name] = initial.measured(source.read(initial.of, R, 0, 1)).to(dtype)
            else:
                found[name] = initial.make(name, shape, dtype, seed)
        return found

    def save_adapter(self, folder: str | Path, checkpoint: str | Path | None = None) -> Path:
        """Write what the PEFT passes train in peft's own format.

        The values are those of ``checkpoint`` (a ``step-N`` folder or one of several; default: the build folder's own
        latest), or the program's where nothing was trained from a folder yet.
        """
        from autopar.ir import adapters
        from autopar.runtime import adapter

        if self.folder is not None and (checkpoint is not None or (self.folder / CHECKPOINTS).exists()):
            where = Path(checkpoint) if checkpoint is not None else self.folder / CHECKPOINTS
            return adapters.save(adapter.listed(self.folder), adapter.of_checkpoint(self.folder, where), folder)
        if self.program is None:
            raise PlanError(f"{self.folder}: it was not trained yet: there is no checkpoint to take the adapter from")
        return self.program.save_adapter(folder)

    @classmethod
    def load(cls, folder: Path) -> Executable:
        from autopar.runtime.folder import BuildFolder

        read = BuildFolder.read(folder)
        if read.document is None:
            raise PlanError(f"{folder}/plan.json: a bare plan without its costs; compile the job again")
        return cls(None, read.document, read.job, folder)

    def start(self, source: Source | None = None) -> Engine:
        """The engine of this rank, under torchrun (one device: without). Values come from the traced module if it has any."""
        from autopar.runtime.engine import Engine
        from autopar.runtime.sources import Tensors

        if self.folder is None:
            self.document = agreed(self.document)
            self.folder = shared_folder(self)
        if source is None and self.program is not None and not any(t.is_meta for t in self.program.tensors.values()):
            source = Tensors(self.program.tensors)
        return Engine(self.folder, source=source, build=self.builder())

    def builder(self) -> Any:
        """Makes the model without weights, for values that come from a seed."""
        if self.job.model is None:
            return None
        from autopar.models.load import build

        return lambda: build(self.job.model, meta=True)  # type: ignore[arg-type]


def agreed(document: PlanDocument) -> PlanDocument:
    """Rank 0's plan, on every rank: a search that ends by its time limit may end elsewhere on another rank."""
    import os

    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return document
    if not dist.is_initialized():
        from autopar.runtime.world import local_device, start

        start(local_device())
    held = [document.model_dump_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return PlanDocument.model_validate_json(str(held[0]))


def shared_folder(executable: Executable) -> Path:
    """A folder that this rank's executable is written into; each rank writes its own, they are equal."""
    folder = Path(tempfile.mkdtemp(prefix="autopar-"))
    made = Executable(executable.program, executable.document, executable.job.model_copy(update={"model": None}))
    from autopar.lower.build import build

    assert made.program is not None
    static = made.program.at(batch=made.plan.microbatch, length=made.length())
    return build(static, made.document, folder, job=executable.job.dump(), weights=[])


def page_of(document: PlanDocument, program: Program | None = None) -> str:
    """The plan's HTML page."""
    from autopar.plan.draw import page

    return page(document, str(program) if program is not None else None)
