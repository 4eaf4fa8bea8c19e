"""A family of models, as data: its declarative members' defaults, the reference's names for our modules, and roles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from autopar.errors import SpecError, suggestion
from autopar.spec import library
from autopar.spec.base import Flag, Real, Spec, Texts, build
from autopar.spec.source import read


def _entry(value: object) -> object:
    return value if isinstance(value, dict) else {"of": value}


class Counterpart(Spec):
    """Our modules that one module of the reference holds, ``*`` for each number in its path, in order.

    More than one: their rows stand one after the other. ``name[*]``: one entry of a stack. ``transposed``: the reference
    stores weights (in, out). ``only``: fields of the spec for which the reference has such a module.
    """

    of: Texts
    transposed: Flag = False
    only: dict[str, Any] = {}


class Setting(Spec):
    """Where a config of the reference keeps a field: the first of ``keys`` (dotted) it has; ``values`` translates what it
    says (of a list, each entry), ``power`` is put on numbers."""

    keys: Annotated[Texts, Field(alias="key")]
    values: dict[str, Any] = {}
    power: Real = 1.0


class Rule(Spec):
    """``set`` fields where the reference's config has all these values; a key it lacks counts as false."""

    config: dict[str, Any]
    set: dict[str, Any]


def _setting(value: object) -> object:
    return value if isinstance(value, dict) else {"key": value}


class Family(Spec):
    """``roles`` maps a role to globs of module paths, of our own modules and of the Hugging Face types in ``covers``.

    ``extends`` names a family whose defaults and tables hold here too, under its own. ``reference`` maps module paths of
    the Hugging Face types in ``reads`` to ours: roles and weights both follow from it. ``config`` (our field, dotted →
    where their config has it) and ``when`` translate configs, ``refuses`` lists values (all of an entry) that no part of
    ours does. ``prefix``: what the base model is called in the model with
    its head. ``ignored``: globs of tensors in their checkpoints that are no weights.
    """

    extends: str | None = None
    covers: Texts = ()
    reads: Texts = ()
    architecture: str = ""
    prefix: str = ""
    ignored: Texts = ()
    defaults: dict[str, Any] = {}
    roles: dict[str, Texts] = {}
    reference: dict[str, Annotated[Counterpart, BeforeValidator(_entry)]] = {}
    config: dict[str, Annotated[Setting, BeforeValidator(_setting)]] = {}
    when: tuple[Rule, ...] = ()
    refuses: tuple[dict[str, Any], ...] = ()

    def role(self, path: str) -> str | None:
        """The role of the module at ``path`` (`model.layers.0.self_attn.q_proj` → `query`), or None."""
        for pattern, counterpart in self.reference.items():
            if re.fullmatch(numbered(pattern), path):
                found = [self._glob(place.replace("[*]", "").replace("*", "0")) for place in counterpart.of]
                return "_".join(role for role in found if role) or None
        return self._glob(path)

    def _glob(self, path: str) -> str | None:
        dotted = f".{path}"  # so that '*.head' also finds a head at the root
        return next((role for role, globs in self.roles.items() if any(fnmatchcase(dotted, g) for g in globs)), None)


def numbered(pattern: str) -> str:
    """A regular expression of a path with ``*`` for numbers, each a group."""
    return re.escape(pattern).replace(r"\*", r"(\d+)")


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
    return family if family.extends is None else _over(load_family(family.extends, str(file)), family)


def _over(base: Family, family: Family) -> Family:
    """The family with what it inherits."""
    roles = {r: (*base.roles.get(r, ()), *family.roles.get(r, ())) for r in {**base.roles, **family.roles}}
    own: dict[str, Any] = {
        "roles": roles,
        "defaults": _merged(base.defaults, family.defaults) if family.defaults else {},
        "reference": {**base.reference, **family.reference},
        "config": {**base.config, **family.config},
        "when": (*base.when, *family.when),
        "refuses": (*base.refuses, *family.refuses),
        "prefix": family.prefix or base.prefix,
        "ignored": (*base.ignored, *family.ignored),
    }
    return family.model_copy(update=own)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        k: _merged(base[k], v) for k, v in own.items() if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)
    }
    return {**base, **own, **nested}


def family_of(model_type: str) -> Family | None:
    """The family of that name, or that reads or covers a Hugging Face model type (`mistral` → llama's), or None."""
    known = families()
    if model_type in known:
        return load_family(model_type)
    loaded = [load_family(name) for name in known]
    return next((f for f in loaded if model_type in f.reads), None) or next(
        (f for f in loaded if model_type in f.covers), None
    )


def reader_of(model_type: str) -> str | None:
    """The name of the family that translates configs and weights of a Hugging Face model type, or None."""
    return next((name for name in families() if model_type in load_family(name).reads), None)


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
