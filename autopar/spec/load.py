"""Reading a job: a file or a name, changed by ``--set key.path=value``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autopar.errors import SpecError, suggestion
from autopar.spec import library, source
from autopar.spec.base import build
from autopar.spec.cluster import read_cluster
from autopar.spec.data import locate
from autopar.spec.job import Job
from autopar.spec.origin import place, read_origin
from autopar.spec.source import Source

REQUIRED = ("model", "cluster", "batch")


def load_job(path_or_name: str | Path, sets: Iterable[str] = ()) -> Job:
    """The job of a file, or of a name in `jobs/`, with every ``key.path=value`` of ``sets`` applied in order.

    Raises SpecError with ``file:line``, or the ``--set`` at fault, in the message.
    """
    path = job_path(path_or_name)
    return parse_job(source.read(path), sets, folder=path.parent)


def job_path(path_or_name: str | Path) -> Path:
    """The file of a job given by path or by name."""
    text, path = str(path_or_name), Path(path_or_name)
    named = library.lookup("jobs", text)
    if path.is_dir() and named is None:
        raise SpecError(f"{text} is a folder (directory); a job is a YAML file, or a name in specs/jobs")
    if path.exists() or "/" in text or path.suffix in (".yaml", ".yml", ".json"):
        if not path.exists():
            raise SpecError(f"{text}: no such file{suggestion(path.stem, library.names('jobs'))}")
        return path
    return named or library.find("jobs", text)


def parse_job(job: Source, sets: Iterable[str] = (), folder: Path | None = None) -> Job:
    """The job of a source. ``folder``: where relative paths in it are looked for if the current folder lacks them."""
    if job.data is None:
        raise job.error(f"the job is empty; it needs at least {', '.join(REQUIRED)}")
    if not isinstance(job.data, dict):
        kind = "list" if isinstance(job.data, list) else "single value"
        raise job.error(f"a job must be a mapping with keys such as {', '.join(REQUIRED)}; this is a {kind}")
    for text in sets:
        assign(job, text)
    missing = [key for key in REQUIRED if job.data.get(key) is None]
    unknown = [key for key in job.data if key not in Job.model_fields]
    if not unknown and missing:
        also = f", {' and '.join(missing[1:])} too" if missing[1:] else ""
        raise SpecError(f"{job.label}: the key '{missing[0]}' is missing in the job{also}")
    data = dict(job.data)
    if not unknown:
        data["model"] = _located(read_origin(job.sub("model")), folder)
        data["cluster"] = read_cluster(job.sub("cluster"))
    built = build(Job, Source(data, job.label, job.marks), "the job")
    return built.model_copy(update={"data": locate(built.data, job, folder)})


def assign(job: Source, text: str) -> None:
    """Apply one ``key.path=value``; the value is YAML. A name on the way becomes ``{name: …}``."""
    label = f"--set {text}"
    path, equals, written = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"{label}: must be key.path=value, such as batch.length=4096")
    here: Any = job.data
    place: list[Any] = []
    for depth, key in enumerate(keys[:-1]):
        place.append(_index(here, key, label) if isinstance(here, list) else key)
        here = _step(here, key, keys[:depth], label)
    if isinstance(here, list):
        place.append(_index(here, keys[-1], label))
    elif isinstance(here, dict):
        place.append(keys[-1])
    else:
        raise SpecError(f"{label}: '{'.'.join(keys[:-1])}' is {here!r} and has no key '{keys[-1]}'")
    here[place[-1]] = source.value(written, label)
    job.marks = {at: mark for at, mark in job.marks.items() if at[: len(place)] != tuple(place)}
    job.marks[tuple(place)] = label


def _step(here: Any, key: str, before: list[str], label: str) -> Any:
    """The container under ``key``, made where it is not there yet."""
    if isinstance(here, list):
        return here[_index(here, key, label)]
    if not isinstance(here, dict):
        raise SpecError(f"{label}: '{'.'.join(before)}' is {here!r} and has no key '{key}'")
    if not before and key not in here and key not in Job.model_fields:
        near = suggestion(key, Job.model_fields) or f" (keys there: {', '.join(Job.model_fields)})"
        raise SpecError(f"{label}: unknown key '{key}' in the job{near}")
    if here.get(key) is None:
        here[key] = {}
    elif isinstance(here[key], str) and key in ("cluster", "model"):
        here[key] = {"name": here[key]}
    return here[key]


def _index(here: list[Any], key: str, label: str) -> int:
    if key.isdigit() and int(key) < len(here):
        return int(key)
    named = [i for i, item in enumerate(here) if isinstance(item, dict) and key in item]
    raise SpecError(
        f"{label}: this is a list of {len(here)} entries; write a number from 0"
        + (f" (here: {named[0]}.{key})" if named else f" to {len(here) - 1}, not '{key}'")
    )


def _located(origin: Any, folder: Path | None) -> Any:
    """A checkpoint's folder that is found beside the job file, by its full path."""
    if origin.hf is None or place(origin.hf).is_absolute():
        return origin
    for base in (Path.cwd(), *([folder] if folder else [])):
        found = base / origin.hf
        if (found / "config.json").is_file() or (found.suffix == ".gguf" and found.is_file()):
            return origin.model_copy(update={"hf": str((base / origin.hf).resolve())})
    return origin
