"""Values for a stage's parameters and buffers, shard by shard: no rank ever holds more than one whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.errors import AutoparError, CheckpointError
from autopar.runtime.gguf import converted
from autopar.runtime.manifest import Manifest, ParameterEntry, StageEntry, TensorEntry
from autopar.runtime.parameters import plain, rows_of
from autopar.runtime.seeded import Seeded
from autopar.runtime.sources import Chain, Files, Source
from autopar.runtime.world import World
from autopar.sharding.placement import local_shape

LISTED = 8  # tensors named in one message


def source_of(folder: Path, manifest: Manifest, build: Callable[[], nn.Module] | None = None) -> Source:
    """Where a build folder's values come from. See `chain`."""
    return chain(folder, manifest.weights, build)


def chain(folder: Path, weights: list[dict[str, Any]], build: Callable[[], nn.Module] | None = None) -> Source:
    """The sources that a manifest's ``weights`` list; for each tensor the first that has it gives it.

    ``{"files": path}``, ``{"gguf": path}`` (both take ``"ignore": [globs]``, files also ``"prefix"``, see `Files`; paths
    are relative to the folder) and
    ``{"seed": n}`` (needs ``build``; with ``"buffers_only": true`` it gives no parameters).
    """
    seeds = [e for e in weights if "seed" in e]
    if seeds and build is None:
        raise AutoparError(f"{folder}: weights come from a seed: that needs `build`, a function that makes the model")
    made = [Seeded(build, e["seed"], buffers_only=e.get("buffers_only", False)) for e in seeds if build is not None]
    names = made[0].names if made else frozenset()
    sources: list[Source] = []
    for entry in weights:
        if "seed" in entry:
            sources.append(made.pop(0))
        elif "files" in entry:
            sources.append(Files(folder / entry["files"], entry.get("ignore", ()), names, entry.get("prefix", "")))
        elif "gguf" in entry:
            sources.append(Files(converted(folder / entry["gguf"], folder, build), entry.get("ignore", ()), names))
        else:
            raise AutoparError(f"{folder}/manifest.json: weights {entry} name neither files, gguf nor seed")
    if not sources:
        raise AutoparError(f"{folder}: manifest.json lists no weights; pass `source` to say where values come from")
    return Chain(*sources)


def check(manifest: Manifest, source: Source) -> None:
    """CheckpointError that names every tensor of the model that is missing, of another shape, or unexpected.

    Looks at all stages, not only those of this rank, so all ranks raise the same error.
    """
    items = [e for s in manifest.stages for e in (*s.parameters, *s.buffers)]
    missing, wrong = [], []
    for item in items:
        name = find(manifest, source, item)
        if name is None:
            missing.append(item.name)
        elif (shape := source.shape(name)) != item.shape:
            wrong.append(f"{item.name} is {_text(shape)}, the model needs {_text(item.shape)}")
    known = {n for item in items for n in manifest.names(manifest.canonical(item.name))}
    report("the weights", missing, wrong, source.unexpected(known))


def report(what: str, missing: list[str], wrong: list[str], unexpected: list[str]) -> None:
    """Raise a CheckpointError with everything that does not fit, if anything does not."""
    lines = [
        f"{title}: {', '.join(dict.fromkeys(names[:LISTED]))}{f' and {len(names) - LISTED} more' if len(names) > LISTED else ''}"
        for title, names in (("missing", missing), ("of another shape", wrong), ("unknown to the model", unexpected))
        if names
    ]
    if lines:
        raise CheckpointError(f"{what} do not fit the model; " + "; ".join(lines))


def find(manifest: Manifest, source: Source, item: TensorEntry) -> str | None:
    """The name under which the source has a tensor: its own, or one it is tied to."""
    names = [item.name, *manifest.names(manifest.canonical(item.name))]
    return next((n for n in names if source.shape(n) is not None), None)


def verify_module(entry: StageEntry, module: nn.Module, tp: int) -> None:
    """The emitted module and the manifest must agree; a difference is a fault of the emitter."""
    made = dict(module.named_parameters()) | dict(module.named_buffers())
    listed = {e.path: e for e in (*entry.parameters, *entry.buffers)}
    odd = sorted(made.keys() ^ listed.keys())
    assert not odd, f"{entry.module}: in the module or in the manifest only: {odd}"
    for path, item in listed.items():
        expected = local_shape(item.place, item.shape, tp)
        assert tuple(made[path].shape) == expected, f"{entry.module}.{path}: {tuple(made[path].shape)}, not {expected}"
        assert made[path].dtype == item.torch_dtype, f"{entry.module}.{path}: {made[path].dtype}, not {item.dtype}"


@torch.no_grad()
def fill(entry: StageEntry, module: nn.Module, manifest: Manifest, source: Source, world: World) -> None:
    """Give every parameter and buffer of a (meta) module its value on this rank's device. Call `check` before."""
    module.to_empty(device=world.device)
    for item in (*entry.parameters, *entry.buffers):
        target = _get(module, item)
        name = find(manifest, source, item)
        assert name is not None, item.name
        value = source.read(name, item.place, world.rank("tp"), world.shape.tp)
        rows = rows_of(target)
        plain(target).copy_(value if rows is None else value.narrow(0, *rows))


def _get(module: nn.Module, item: TensorEntry) -> torch.Tensor:
    return module.get_parameter(item.path) if isinstance(item, ParameterEntry) else module.get_buffer(item.path)


def _text(shape: tuple[int, ...] | None) -> str:
    return " × ".join(map(str, shape)) if shape else "a scalar"
