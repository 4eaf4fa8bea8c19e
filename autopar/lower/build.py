"""The build folder: what is saved here is what runs."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch

from autopar.errors import PlanError
from autopar.ir import adapters
from autopar.ir.program import Program
from autopar.lower import collectives, recompute, sequences
from autopar.lower.emit import emit
from autopar.lower.launching import launching
from autopar.plan.plan import PlanDocument

TRAIN = '''\
"""Trains this build folder: `torchrun --nproc-per-node {ranks} train.py` (add --resume to go on from a checkpoint)."""

from pathlib import Path

from autopar.executable import Executable
from autopar.runtime.train import main

if __name__ == "__main__":
    folder = Path(__file__).parent
    main(folder, build=Executable.load(folder).builder())
'''

README = """\
# {title}

Written by autopar. `stages/` is the program each pipeline stage runs, `collectives.py` how tensors move between devices,
`plan.json` the plan it was written for, `plan.html` its picture, `manifest.json` which original parameter lives where.

{launching}
{summary}
"""


def build(
    program: Program,
    document: PlanDocument,
    folder: Path,
    *,
    job: str,
    weights: list[dict[str, Any]],
    page: str | None = None,
    summary: str = "",
) -> Path:
    """Write the executable of ``program`` (static, at the plan's micro-batch) under the plan into ``folder``.

    ``job``: YAML of the job; ``weights``: where parameter values come from (see the runtime's manifest). The folder is
    written beside and moved into place, so that an interrupted build leaves nothing half.
    """
    stages, manifest = emit(program, document.plan)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "stages").mkdir(parents=True)
        for stage in stages:
            (part / "stages" / f"{stage.name}.py").write_text(stage.source)
        (part / "collectives.py").write_text(inspect.getsource(collectives))
        if document.plan.recompute_groups:
            (part / "recompute.py").write_text(inspect.getsource(recompute))
        if document.plan.context is not None:
            text = inspect.getsource(sequences).replace(
                "from autopar.lower.collectives import", "from collectives import"
            )
            (part / "sequences.py").write_text(text)
        ranks = document.plan.mesh.devices
        (part / "train.py").write_text(TRAIN.format(ranks=ranks))
        (part / "plan.json").write_text(document.model_dump_json(indent=1) + "\n")
        (part / "job.yaml").write_text(job)
        (part / "README.md").write_text(
            README.format(
                title=folder.name, launching=launching(document.plan), summary=textwrap.indent(summary, "    ")
            )
        )
        constants = large_constants(program, manifest)
        if constants:
            from safetensors.torch import save_file

            save_file(constants, part / "constants.safetensors")
            weights = [*weights, {"files": "constants.safetensors"}]
        manifest |= {"weights": weights, "precision": program.precision or {}}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if program.adapters:
            (part / "adapters.json").write_text(adapters.dump(program.adapters))
        if page is not None:
            (part / "plan.html").write_text(page)
        return placed(part, folder)
    except OSError as error:
        raise PlanError(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def placed(part: Path, folder: Path) -> Path:
    """Move what was written into its place; files of an earlier build that a run made (checkpoints, metrics) stay."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "stages", ignore_errors=True)
    for item in part.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        item.replace(target)
    return folder


def large_constants(program: Program, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Values of constants that the code does not spell out."""
    listed = {b["name"] for s in manifest["stages"] for b in s["buffers"]}
    named = [n for n in listed if n not in program.buffers]
    return {n: program.tensors[n].detach().cpu().contiguous() for n in named if not program.tensors[n].is_meta}
