"""Plans on disk: JSON that reads back equal."""

from __future__ import annotations

import json
import os
from pathlib import Path

from autopar.errors import PlanError
from autopar.plan.plan import VERSION, PlanDocument
from autopar.spec.base import build
from autopar.spec.source import Source


def read_plan(path: str | Path) -> PlanDocument:
    """The plan of a JSON file, or of a build folder's `plan.json`. PlanError, SpecError: what it is instead."""
    file = Path(path) / "plan.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise PlanError(f"{file}: no such plan file")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"{file}: not a plan: not JSON ({error})") from None
    if not isinstance(data, dict) or "plan" not in data:
        raise PlanError(f"{file}: not a plan: the key 'plan' is missing (`autopar plan JOB -o PLAN.json` writes one)")
    if data.get("version", VERSION) != VERSION:
        raise PlanError(f"{file}: a plan of version {data['version']}; this program reads version {VERSION}")
    return build(PlanDocument, Source(data, str(file)), "the plan")


def write_plan(document: PlanDocument, path: str | Path) -> None:
    """Write a plan as JSON; the file is whole or not there. PlanError where that place cannot be written."""
    write_text(path, document.model_dump_json(indent=1) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file in one step: a crash leaves the old one or the new one."""
    file = Path(path)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PlanError(f"cannot write {file}: {error.strerror}") from None


def writable(path: str | Path) -> None:
    """Raise PlanError early, before the work, if a file cannot be written at ``path``."""
    file = Path(path)
    if file.is_dir():
        raise PlanError(f"cannot write {file}: it is a folder")
    if not file.parent.is_dir():
        raise PlanError(f"cannot write {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PlanError(f"cannot write {file}: permission denied")
