"""Where named specs come from: the folders of every installed package in the entry-point group ``autopar.specs``."""

from __future__ import annotations

import functools
from importlib import metadata, util
from pathlib import Path

from autopar.errors import SpecError, suggestion
from autopar.spec.quantity import short

GROUP = "autopar.specs"
SUFFIX = ".yaml"
_SINGULAR = {"families": "family"}


@functools.cache
def folders() -> tuple[Path, ...]:
    """The data folders, in the order of their packages' names. No package is imported."""
    found: dict[Path, None] = {}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: e.value):
        spec = util.find_spec(entry.value)
        if spec is None or not spec.submodule_search_locations:
            raise SpecError(f"the entry point '{entry.name}' of {GROUP} names '{entry.value}', which is no package")
        found.update(dict.fromkeys(Path(place).resolve() for place in spec.submodule_search_locations))
    return tuple(found)


def names(kind: str) -> list[str]:
    """The names of all specs of a kind (``clusters``, ``models``, ``families``, ``jobs``), sorted."""
    return sorted({path.stem for folder in folders() for path in (folder / kind).glob(f"*{SUFFIX}")})


def lookup(kind: str, name: str) -> Path | None:
    """The file of a named spec, or None. Two files of one name are an error that names both."""
    found = [path for folder in folders() for path in (folder / kind).glob(f"*{SUFFIX}") if path.stem == name]
    if len(found) > 1:
        raise SpecError(f"two {kind} are named '{name}': {' and '.join(map(str, found))}")
    return found[0] if found else None


def find(kind: str, name: str, where: str = "") -> Path:
    """The file of a named spec; unknown names are an error with the nearest known name."""
    path = lookup(kind, name)
    if path is not None:
        return path
    known = names(kind)
    near = suggestion(name, known) or f" (there are: {', '.join(known)})"
    prefix = f"{where}: " if where else ""
    noun = _SINGULAR.get(kind, kind.removesuffix("s"))
    raise SpecError(f"{prefix}unknown {noun} {short(name)}{near}")
