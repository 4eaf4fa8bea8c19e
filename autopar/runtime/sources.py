"""Where values come from: a module at hand, safetensors files, or several places in turn. Always read in slices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch

from autopar.errors import CheckpointError
from autopar.sharding.placement import Placement, extents, local


class Source(Protocol):
    """Values of a model's tensors by original name."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the whole tensor, or None if this source does not have it."""
        ...

    def read(self, name: str, placement: Placement, rank: int, degree: int) -> torch.Tensor:
        """What ``rank`` of ``degree`` holds of it, on the CPU, in the source's own dtype."""
        ...

    def unexpected(self, known: set[str]) -> list[str]:
        """Tensors that this source has for a model and that the model does not know."""
        ...


class Tensors:
    """Values in this process: a ``state_dict``, or whatever a program holds. Meta tensors have no value."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = {n: t.detach() for n, t in tensors.items() if t.device.type != "meta" and not _fake(t)}

    @classmethod
    def of(cls, module: torch.nn.Module) -> Tensors:
        """All parameters (under each of their names) and buffers of a module."""
        named = dict(module.named_parameters(remove_duplicate=False))
        return cls(named | dict(module.named_buffers(remove_duplicate=False)))

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None

    def read(self, name: str, placement: Placement, rank: int, degree: int) -> torch.Tensor:
        return local(placement, self.tensors[name], rank, degree).cpu()

    def unexpected(self, known: set[str]) -> list[str]:
        return []


class Files:
    """A safetensors file, or a folder of them (with or without an index), read slice by slice.

    ``ignore``: globs of tensors in the files that the model need not know. ``model``: names that the whole model has,
    also those that the program does not read. ``prefix``: what a Hugging Face model calls its base model: names of the
    base model alone, as in a checkpoint saved without the head, are read as the whole model's, and the other way round.
    """

    def __init__(
        self, path: str | Path, ignore: Iterable[str] = (), model: frozenset[str] = frozenset(), prefix: str = ""
    ):
        self.path, self.ignore, self.model = Path(path), tuple(ignore), model
        where = _index(self.path)
        self.stored = {_renamed(name, where, model, prefix): name for name in where}
        self.where = {name: where[stored] for name, stored in self.stored.items()}
        self._open: dict[Path, Any] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._slice(name).get_shape()) if name in self.where else None

    def read(self, name: str, placement: Placement, rank: int, degree: int) -> torch.Tensor:
        data = self._slice(name)
        shape = tuple(data.get_shape())
        if not placement.sharded or not shape:
            return local(placement, self._file(name).get_tensor(self.stored[name]), rank, degree)
        before = (slice(None),) * placement.dim
        runs = extents(placement, shape, rank, degree)
        parts = [data[(*before, slice(start, start + length))] for start, _, length in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, placement.dim)

    def unexpected(self, known: set[str]) -> list[str]:
        foreign = [n for n in self.where if n not in known and n not in self.model]
        return [n for n in foreign if not any(fnmatchcase(n, glob) for glob in self.ignore)]

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        path = self.where[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(self.stored[name])


class Chain:
    """Several sources; the first that has a tensor gives it."""

    def __init__(self, *sources: Source):
        self.sources = sources

    def shape(self, name: str) -> tuple[int, ...] | None:
        return next((s for source in self.sources if (s := source.shape(name)) is not None), None)

    def read(self, name: str, placement: Placement, rank: int, degree: int) -> torch.Tensor:
        source = next(s for s in self.sources if s.shape(name) is not None)
        return source.read(name, placement, rank, degree)

    def unexpected(self, known: set[str]) -> list[str]:
        return [n for source in self.sources for n in source.unexpected(known)]


def _renamed(name: str, stored: Iterable[str], model: frozenset[str], prefix: str) -> str:
    """A stored name as the model's: transformers' rule for checkpoints with or without their base model's prefix."""
    if not prefix or not model:
        return name
    dotted = f"{prefix}."
    has, wants = any(n.startswith(dotted) for n in stored), any(n.startswith(dotted) for n in model)
    if wants and not has and name not in model:
        return dotted + name
    return name.removeprefix(dotted) if has and not wants else name


def _fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _index(path: Path) -> dict[str, Path]:
    """Tensor name → file."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder of weights")
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.exists():
            return _listed(path, index)
        files = sorted(path.glob("*.safetensors"))
    else:
        files = [path]
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file in this folder")
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as data:
                where |= dict.fromkeys(data.keys(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from None
    return where


def _listed(folder: Path, index: Path) -> dict[str, Path]:
    try:
        listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index}: not an index of safetensors files (no 'weight_map')") from None
    lacking = sorted({f for f in listed.values() if not (folder / f).exists()})
    if lacking:
        raise CheckpointError(f"{index}: names files that are not in {folder}: {', '.join(lacking)}")
    return {name: folder / file for name, file in listed.items()}
