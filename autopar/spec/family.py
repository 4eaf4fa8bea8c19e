"""A family of models, as data: the defaults of its declarative members and the roles of the modules inside them."""

from __future__ import annotations

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
    """The family that covers a Hugging Face model type (`qwen2` → llama's), or None."""
    return next((f for f in map(load_family, families()) if model_type in f.covers), None)


def role_of(path: str, model_type: str | None = None) -> str | None:
    """The role of the module at ``path``.

    ``model_type``: a Hugging Face type or a family's name, whose globs alone count; None asks every family, and answers
    only where those that know the path agree.
    """
    if model_type is not None:
        family = family_of(model_type) or (load_family(model_type) if model_type in families() else None)
        return family.role(path) if family else None
    found = {role for f in map(load_family, families()) if (role := f.role(path))}
    return found.pop() if len(found) == 1 else None


def all_roles() -> list[str]:
    """Every role that some family names, sorted."""
    return sorted({role for f in map(load_family, families()) for role in f.roles})
