"""A family of models, as data: the defaults of its declarative members and the roles of the modules inside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from autopar.errors import SpecError, suggestion
from autopar.spec import library
from autopar.spec.base import Spec, Texts, build
from autopar.spec.source import read


class Family(Spec):
    """``roles`` maps a role to globs of module paths, of our own modules and of the Hugging Face types in ``covers``.

    ``extends`` names a family whose roles hold here too.
    """

    extends: str | None = None
    covers: Texts = ()
    defaults: dict[str, Any] = {}
    roles: dict[str, Texts] = {}

    def role(self, path: str) -> str | None:
        """The role of the module at ``path`` (`model.layers.0.self_attn.q_proj` → `query`), or None."""
        dotted = f".{path}"  # so that '*.head' also finds a head at the root
        return next((role for role, globs in self.roles.items() if any(fnmatchcase(dotted, g) for g in globs)), None)


def families() -> list[str]:
    """The names of all families, sorted."""
    return library.names("families")


@cache
def load_family(name: str, where: str = "model") -> Family:
    """The family of that name; SpecError with the nearest name where there is none."""
    file = library.lookup("families", name)
    if file is None:
        known = [f for f in families() if load_family(f).defaults]
        raise SpecError(
            f"{where}: unknown family '{name}'{suggestion(name, known)} (families here: {', '.join(known)})"
        )
    family = build(Family, read(file), "family")
    if family.extends is None:
        return family
    base = load_family(family.extends, str(file))
    roles = {r: (*base.roles.get(r, ()), *family.roles.get(r, ())) for r in {**base.roles, **family.roles}}
    return family.model_copy(update={"roles": roles})


def family_of(model_type: str) -> Family | None:
    """The family of that name, or that covers a Hugging Face model type (`qwen2` → llama's), or None."""
    known = families()
    if model_type in known:
        return load_family(model_type)
    return next((f for f in map(load_family, known) if model_type in f.covers), None)


def roles(names: Iterable[str], model_type: str | None = None) -> dict[str, str]:
    """The role of every parameter or module in ``names`` that has one, by the family of the model.

    ``model_type``: a Hugging Face type or a family's name. Without one, or with one that no family covers, it is the
    family that gives most names a role.
    """
    names = list(names)
    family = family_of(model_type) if model_type is not None else None
    candidates = [family] if family else [load_family(name) for name in families()]
    paths = {name: _module(name) for name in names}
    found = []
    for candidate in candidates:
        known = {path: candidate.role(path) for path in set(paths.values())}
        found.append({name: role for name, path in paths.items() if (role := known[path])})
    return max(found, key=len, default={})


def _module(name: str) -> str:
    """The module path of a parameter's name, without `weight` or `bias`, all instances of a block as its first."""
    path, _, last = name.rpartition(".")
    return re.sub(r"\.\d+(?=\.|$)", ".0", path if last in ("weight", "bias") else name)


def all_roles() -> list[str]:
    """Every role that some family names, sorted."""
    return sorted({role for f in map(load_family, families()) for role in f.roles})
