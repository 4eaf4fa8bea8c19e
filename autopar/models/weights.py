"""A reference's tensors as ours and ours as the reference's, by the table of a family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from autopar.errors import CheckpointError
from autopar.spec.family import Counterpart, Family, load_family, numbered
from autopar.spec.model import DecoderSpec

SUFFIXES = (".weight", ".bias", "")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """One of our tensors, or entry ``index`` of a stack of ours."""

    name: str
    index: int | None = None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        return shapes[self.name] if self.index is None else shapes[self.name][1:]


@dataclass(frozen=True)
class Held:
    """What one tensor of the reference holds: pieces of ours, row after row; stored (in, out) where ``transposed``."""

    pieces: tuple[Piece, ...]
    transposed: bool


class Table:
    """The family's table for one spec. ``shapes``: our tensors' shapes by name."""

    def __init__(self, spec: DecoderSpec, shapes: Shapes) -> None:
        self.family: Family = load_family(spec.family)
        self.shapes = shapes
        dumped = spec.model_dump()
        self.entries = {
            pattern: counterpart
            for pattern, counterpart in self.family.reference.items()
            if all(dumped.get(field) == value for field, value in counterpart.only.items())
        }
        if not self.entries:
            raise CheckpointError(f"family '{spec.family}' has no table of the reference's names (`reference:`)")

    def held(self, name: str) -> Held | None:
        """What the reference's tensor ``name`` holds of ours; None where the table has no such name."""
        for full in (name, f"{self.family.prefix}.{name}"):
            for suffix in SUFFIXES:
                if not full.endswith(suffix):
                    continue
                path = full.removesuffix(suffix) if suffix else full
                for pattern, counterpart in self.entries.items():
                    match = re.fullmatch(numbered(pattern), path)
                    found = match and self._pieces(counterpart, match.groups(), suffix)
                    if found:
                        return Held(found, counterpart.transposed and suffix == ".weight")
        return None

    def ignored(self, name: str) -> bool:
        """Whether a tensor of the reference is no weight."""
        return any(fnmatchcase(f".{name}", glob) for glob in self.family.ignored)

    def _pieces(self, counterpart: Counterpart, numbers: tuple[str, ...], suffix: str) -> tuple[Piece, ...] | None:
        pieces = tuple(_piece(place, numbers, suffix) for place in counterpart.of)
        return pieces if all(self._fits(piece) for piece in pieces) else None

    def _fits(self, piece: Piece) -> bool:
        shape = self.shapes.get(piece.name)
        return shape is not None and (piece.index is None or (len(shape) == 3 and piece.index < shape[0]))

    def names(self, skipped: frozenset[str] = frozenset()) -> list[str]:
        """The reference's names that together hold every tensor of ours but ``skipped``, each once, in our order."""
        made: dict[str, None] = {}
        for ours in self.shapes:
            if ours in skipped:
                continue
            found = next(self._theirs(ours), None)
            if found is None:
                raise CheckpointError(f"the family's table has no name of the reference for {ours}")
            made.update(dict.fromkeys(found))
        return list(made)

    def _theirs(self, ours: str) -> Iterator[list[str]]:
        """The reference's names for one of our tensors, one list for each entry of the table that holds it."""
        for suffix in SUFFIXES:
            path = ours.removesuffix(suffix) if suffix and ours.endswith(suffix) else ours if not suffix else None
            for pattern, counterpart in self.entries.items() if path is not None else ():
                for place in counterpart.of:
                    stacked = place.endswith("[*]")
                    match = re.fullmatch(numbered(place.removesuffix("[*]")), path)  # type: ignore[arg-type]
                    if match is None:
                        continue
                    count = range(self.shapes[ours][0]) if stacked else (None,)
                    named = [_filled(pattern, (*match.groups(), *(() if i is None else (str(i),)))) for i in count]
                    suffixed = [name + (".weight" if stacked else suffix) for name in named]
                    if all(self.held(name) is not None for name in suffixed):
                        yield suffixed

    # ------------------------------------------------------------------ tensors

    def split(self, name: str, tensor: Tensor) -> dict[Piece, Tensor]:
        """Our pieces in the reference's tensor. CheckpointError where the shapes do not fit."""
        held = self.held(name)
        assert held is not None, name
        tensor = tensor.t() if held.transposed else tensor
        shapes = [piece.shape(self.shapes) for piece in held.pieces]
        dim = _rows(tensor)
        wanted = list(shapes[0])
        wanted[dim] = sum(shape[dim] for shape in shapes)
        if list(tensor.shape) != wanted:
            raise CheckpointError(f"{name} is {_text(tensor.shape)}, the model needs {_text(wanted)}")
        parts = tensor.split([shape[dim] for shape in shapes], dim) if len(shapes) > 1 else (tensor,)
        return dict(zip(held.pieces, parts, strict=True))

    def joined(self, name: str, ours: Mapping[str, Tensor]) -> Tensor:
        """The reference's tensor ``name`` made of ours."""
        held = self.held(name)
        assert held is not None, name
        parts = [ours[p.name] if p.index is None else ours[p.name][p.index] for p in held.pieces]
        whole = torch.cat(parts, _rows(parts[0])) if len(parts) > 1 else parts[0]
        return (whole.t() if held.transposed else whole).contiguous()


def ours_of(spec: DecoderSpec, shapes: Shapes, tensors: Iterable[tuple[str, Tensor]], where: str) -> dict[str, Tensor]:
    """Our tensors from the reference's. CheckpointError that names what is missing, unknown, or of another shape.

    A head that the spec ties to the embedding may be missing; where it is there, it must equal it.
    """
    table = Table(spec, shapes)
    pieces: dict[Piece, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors:
        if table.held(name) is None:
            unknown += [] if table.ignored(name) else [name]
        else:
            pieces |= table.split(name, tensor)
    found = {name: tensor for name, shape in shapes.items() if (tensor := _assembled(name, shape, pieces)) is not None}
    if spec.tied:
        head, embedding = found.setdefault("head.weight", found.get("embedding.weight")), found.get("embedding.weight")  # type: ignore[arg-type]
        if embedding is not None and not torch.equal(head, embedding):
            raise CheckpointError(f"{where}: the head differs from the embedding, to which the model's config ties it")
    missing = [name for name in shapes if found.get(name) is None]
    lines = [f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    if lines:
        raise CheckpointError(f"{where} does not fit family '{spec.family}'; {'; '.join(lines)}")
    return found


def _assembled(name: str, shape: tuple[int, ...], pieces: Mapping[Piece, Tensor]) -> Tensor | None:
    whole = pieces.get(Piece(name))
    if whole is not None:
        return whole
    entries = [pieces.get(Piece(name, i)) for i in range(shape[0])] if len(shape) == 3 else []
    return torch.stack(entries) if entries and all(e is not None for e in entries) else None  # type: ignore[arg-type]


def _piece(place: str, numbers: tuple[str, ...], suffix: str) -> Piece:
    if not place.endswith("[*]"):
        return Piece(_filled(place, numbers) + suffix)
    return Piece(_filled(place.removesuffix("[*]"), numbers[:-1]), int(numbers[-1]))


def _filled(pattern: str, numbers: tuple[str, ...]) -> str:
    left = iter(numbers)
    return re.sub(r"\*", lambda _: next(left), pattern)


def _rows(tensor: Tensor) -> int:
    """The dim of a weight's or bias's output features."""
    return 0 if tensor.dim() < 3 else tensor.dim() - 2


def _text(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
