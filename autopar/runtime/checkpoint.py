"""Sharded checkpoints in the original names that load under any plan, and that a crash cannot damage."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards

from autopar.errors import CheckpointError, RuntimeFault
from autopar.runtime import carried, materialize
from autopar.runtime.parameters import Held, Shard
from autopar.runtime.pieces import Pieces
from autopar.sharding.placement import R

if TYPE_CHECKING:
    from autopar.runtime.engine import Engine

KEEP = 2  # checkpoints kept: the newest, and one to go back to
STATE = "state.json"
LATEST = "latest"


def save(engine: Engine, root: Path, extra: dict[str, Any] | None = None, *, trainable_only: bool = False) -> Path:
    """Write ``root/step-N`` and point ``root/latest`` to it. Collective. With ``trainable_only`` frozen parameters are left
    out: an adapter's checkpoint, which is loaded over the same base weights.

    Everything is written into a new folder that is renamed when complete: a rank that dies, or a disk that fills, at
    any moment leaves the previous checkpoint as it was. Raises RuntimeFault on all ranks if writing fails on any.
    """
    world, step = engine.world, engine.steps
    target, partial = _free(root, step), root / f".step-{step}.partial"
    _on_first(engine, lambda: _fresh(partial))
    try:
        with quiet():
            tensors = dict(_tensors(engine, chosen(engine, trainable_only)))
            write_shards(tensors, checkpoint_id=partial, no_dist=world.mesh is None)
    except CheckpointException as error:  # raised on every rank when any fails
        _on_first(engine, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise RuntimeFault(
            f"{target}: the checkpoint could not be written ({_cause(error)}); the previous one is kept"
        ) from None
    extra = {**({"trainable_only": True} if trainable_only else {}), **(extra or {})}
    state = {"step": step, "updates": _updates(engine), "optimizer": engine.optimizer.options.name, **extra}
    if engine.scale:
        state["scale"] = engine.scale.state()
    world.barrier()
    _on_first(engine, lambda: _publish(partial, target, state))
    return target


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Fill parameters, optimizer state and what stages carry from a checkpoint; returns its ``state.json``. Collective.

    Raises CheckpointError naming the tensors that are missing, of another shape, or unknown to the model.
    """
    folder = locate(path)
    state, metadata = read_state(folder), metadata_of(folder)
    ours = engine.optimizer.options.name
    if state["optimizer"] != ours:
        raise CheckpointError(f"{folder}: holds the state of {state['optimizer']}, the job's optimizer is {ours}")
    only = bool(state.get("trainable_only"))
    _check(folder, metadata, _expected(engine, only))
    with quiet():
        read_shards(
            dict(_tensors(engine, chosen(engine, only))), checkpoint_id=folder, no_dist=engine.world.mesh is None
        )
    _copy_tied(engine)
    skipped = state.get("scale", {}).get("skipped", 0)
    if engine.scale and "scale" in state:
        engine.scale.load(state["scale"])
    elif skipped:  # saved by a float16 run, read by one that has no loss scale: its steps count as done
        skipped = 0
    engine.optimizer.updates = state["step"] - skipped
    for held, moments in zip(engine.optimizer.held, engine.optimizer.state, strict=True):
        moments["step"].fill_(state["updates"][held.name])
    return state


def locate(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the one its ``latest`` names."""
    if (path / STATE).exists():
        return path
    if not (path / LATEST).exists():
        raise CheckpointError(f"{path}: no checkpoint there (neither {STATE} nor {LATEST})")
    folder = path / (path / LATEST).read_text().strip()
    if not (folder / STATE).exists():
        raise CheckpointError(f"{path}: its {LATEST} names {folder.name}, which is not a whole checkpoint")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint: the step, updates per parameter, and what the caller of `save` added."""
    try:
        return json.loads((folder / STATE).read_text())
    except ValueError:
        raise CheckpointError(f"{folder / STATE}: damaged") from None


def _tensors(engine: Engine, held: list[Held]) -> Iterator[tuple[str, Pieces]]:
    """Every tensor under its name in the checkpoint; of tied copies on this rank the first."""
    moments = {id(h): s for h, s in zip(engine.optimizer.held, engine.optimizer.state, strict=True)}
    seen: set[str] = set()
    for h in held:
        if h.name in seen:
            continue
        seen.add(h.name)
        yield f"model.{h.name}", Pieces(h.shard.shape, h.local, h.shard.pieces(h.local))
        if id(h) in moments:
            for key in engine.optimizer.moments:
                tensor = moments[id(h)][key]
                yield f"optim.{h.name}.{key}", Pieces(h.shard.shape, tensor, h.shard.pieces(tensor))
    for state in engine.states:
        whole = Shard(state.entry.shape, R, 0, 1)
        yield f"state.{state.entry.name}", Pieces(whole.shape, state.tensor, whole.pieces(state.tensor))


def chosen(engine: Engine, trainable_only: bool) -> list[Held]:
    return [h for h in engine.held if h.entry.trainable or not trainable_only]


def _expected(engine: Engine, trainable_only: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything that a checkpoint of this model holds, over all stages."""
    wanted: dict[str, tuple[int, ...]] = {}
    for stage in engine.manifest.stages:
        for item in stage.parameters:
            if trainable_only and not item.trainable:
                continue
            name = engine.manifest.canonical(item.name)
            wanted[f"model.{name}"] = item.shape
            if item.trainable:
                wanted |= {f"optim.{name}.{key}": item.shape for key in engine.optimizer.moments}
    return wanted | {f"state.{name}": shape for name, shape in carried.expected(engine.manifest).items()}


def _check(folder: Path, metadata: Metadata, wanted: dict[str, tuple[int, ...]]) -> None:
    there = {n: tuple(m.size) for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    missing = [n for n in wanted if n not in there]
    wrong = [f"{n} is {there[n]}, the model needs {s}" for n, s in wanted.items() if n in there and there[n] != s]
    unexpected = [n for n in there if n not in wanted]
    materialize.report(f"{folder}: its tensors", missing, wrong, unexpected)


def metadata_of(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({_cause(error)})") from None


def _copy_tied(engine: Engine) -> None:
    """Later copies of a tied tensor on this rank take what was read into the first, moments included."""
    first: dict[str, Held] = {}
    moments = {id(h): s for h, s in zip(engine.optimizer.held, engine.optimizer.state, strict=True)}
    for h in engine.held:
        source = first.setdefault(h.name, h)
        if source is not h:
            h.local.copy_(source.local)
            for key in engine.optimizer.moments if id(h) in moments else ():
                moments[id(h)][key].copy_(moments[id(source)][key])


def _updates(engine: Engine) -> dict[str, int]:
    """Canonical name → updates of that parameter, of all ranks."""
    own = {h.name: int(s["step"]) for h, s in zip(engine.optimizer.held, engine.optimizer.state, strict=True)}
    return {n: u for part in engine.world.everyone(own) for n, u in part.items()}


def _on_first(engine: Engine, action: Any) -> None:
    """Rank 0 acts, all wait; if it fails, all raise the same RuntimeFault."""
    error = ""
    if engine.world.first:
        try:
            action()
        except OSError as caught:
            error = str(caught)
    if error := engine.world.first_error(error):
        raise RuntimeFault(f"the checkpoint could not be written ({error}); the previous one is kept")


def _free(root: Path, step: int) -> Path:
    """``step-N``, or ``step-N-1``, … where a checkpoint of this step exists: none is ever written over."""
    names = [f"step-{step}", *(f"step-{step}-{again}" for again in range(1, 1000))]
    return next(root / name for name in names if not (root / name).exists())


@contextmanager
def quiet() -> Iterator[None]:
    """Without DCP's remark that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _publish(partial: Path, target: Path, state: dict[str, Any]) -> None:
    """Complete the new folder, give it its name, let ``latest`` name it, and only then remove old ones."""
    _write(partial / STATE, json.dumps(state))
    _sync(partial)
    os.rename(partial, target)
    _sync(target.parent)
    _write(target.parent / f".{LATEST}.partial", target.name)
    os.replace(target.parent / f".{LATEST}.partial", target.parent / LATEST)
    _sync(target.parent)
    steps = sorted(target.parent.glob("step-*"), key=lambda p: [int(part) for part in p.name.split("-")[1:]])
    for old in [p for p in steps if p != target][: max(0, len(steps) - KEEP)]:
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
