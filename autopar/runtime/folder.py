"""Reading a build folder: the plan, the job, the manifest and the emitted stage classes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from torch import nn

from autopar.errors import AutoparError, PlanError
from autopar.plan.plan import Plan, PlanDocument
from autopar.runtime.manifest import Manifest
from autopar.runtime.seeds import seed_of
from autopar.spec.job import Job

PACKAGE = "autopar_build"  # emitted modules are imported under this name, numbered by folder


@dataclass(frozen=True)
class BuildFolder:
    """A build folder, read. ``document`` is None where plan.json holds a bare plan."""

    path: Path
    plan: Plan
    manifest: Manifest
    job: Job
    document: PlanDocument | None

    @classmethod
    def read(cls, path: str | Path) -> BuildFolder:
        """AutoparError when a file is missing or damaged."""
        folder = Path(path).resolve()
        manifest = Manifest.read(folder)
        plan, document = _plan(folder)
        return cls(folder, plan, manifest, _job(folder), document)

    def stage(self, index: int, tp: dist.ProcessGroup | None, cp: dist.ProcessGroup | None = None) -> nn.Module:
        """The emitted module of a stage, its parameters on meta. ``cp``: for plans that split sequences."""
        module = self._import(f"stages.{self.manifest.stages[index].module}")
        with torch.device("meta"):
            return module.Stage(tp=tp, cp=cp) if self.plan.mesh.cp > 1 else module.Stage(tp=tp)

    def _import(self, name: str) -> ModuleType:
        file = self.path.joinpath(*name.split(".")).with_suffix(".py")
        if not file.exists():
            raise AutoparError(f"{self.path}: {file.relative_to(self.path)} is missing; compile the job again")
        unique = f"{seed_of(0, str(self.path)):x}_{name.replace('.', '_')}"
        spec = importlib.util.spec_from_file_location(f"{PACKAGE}_{unique}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        with _importing_from(self.path):
            spec.loader.exec_module(module)
        return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Emitted code imports its neighbours (``from collectives import …``); another folder's must not be taken for them."""
    local = {"stages", *(p.stem for p in folder.glob("*.py"))}
    set_aside = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in local and n != "__main__"}
    for name in set_aside:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.partition(".")[0] in local and n != "__main__"]:
            del sys.modules[name]
        sys.modules.update(set_aside)


def _plan(folder: Path) -> tuple[Plan, PlanDocument | None]:
    data = _text(folder / "plan.json")
    try:
        loaded: dict[str, Any] = json.loads(data)
        if "plan" in loaded:
            document = PlanDocument.model_validate(loaded)
            return document.plan, document
        return Plan.model_validate(loaded), None
    except (ValidationError, json.JSONDecodeError) as error:
        raise PlanError(f"{folder / 'plan.json'}: not a plan of this version of autopar: {error}") from None


def _job(folder: Path) -> Job:
    path = folder / "job.yaml"
    if not path.exists():
        return Job()
    try:
        return Job.model_validate(yaml.safe_load(path.read_text()) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise AutoparError(f"{path}: not a job of this version of autopar: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise AutoparError(f"{path.parent}: no {path.name} there; is it a build folder of `autopar compile`?") from None
