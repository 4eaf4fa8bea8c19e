"""Passes: discovered by entry point, run one after another on copies, verified before and after."""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar

import pydantic

from autopar.errors import PassError, suggestion
from autopar.ir.adapters import Adapter
from autopar.ir.program import Program, symbolic_sizes
from autopar.ir.specialize import annotate, example_sizes
from autopar.ir.verify import verify
from autopar.spec.base import complaint

GROUP = "autopar.passes"
FIRST = "canonicalize"


class Numerics(enum.Enum):
    """What a pass promises about the values a program computes."""

    EXACT = "the same bits"
    CLOSE = "the same mathematics, other rounding"
    CHANGES = "a different model"


class Pass(pydantic.BaseModel, ABC):
    """One rewrite. Its fields are its options: the job's keys, the error messages and the Python arguments alike."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    numerics: ClassVar[Numerics]

    @abstractmethod
    def rewrite(self, program: Program) -> None:
        """Change ``program`` (a copy of the caller's) in place. Raises `PassError` for targets that are not there."""

    def merge(self, program: Program, adapter: Adapter) -> None:
        """Fold what this pass added into the program's own weights, in place, where the method allows it."""
        raise PassError(f"{self.name}: its parameters cannot be folded into the model's weights")


@cache
def discover() -> dict[str, type[Pass]]:
    """Every pass of every installed package in the entry-point group ``autopar.passes``, by name."""
    found: dict[str, type[Pass]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        for module in modules(entry.value):
            for value in vars(module).values():
                if defines_pass(value, module.__name__):
                    other = found.setdefault(value.name, value)
                    if other is not value:
                        raise PassError(
                            f"two passes are called {value.name!r}: {other.__module__} and {value.__module__}"
                        )
    return found


def defines_pass(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module and hasattr(value, "name")


def modules(package: str) -> Iterable[Any]:
    """A package and all modules under it."""
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.walk_packages(getattr(root, "__path__", []), f"{package}."):
        yield importlib.import_module(info.name)


def load(entry: Pass | Mapping[str, Any]) -> Pass:
    """A pass from a job's entry ``{name: {option: value}}``; a pass stays itself."""
    if isinstance(entry, Pass):
        return entry
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise PassError(f"passes: one entry is one pass, {{name: {{options}}}}; got {entry!r}")
    (name, options), known = next(iter(entry.items())), discover()
    options = {} if options is None else options
    if name not in known:
        raise PassError(f"passes: unknown pass {name!r}{suggestion(name, known)}; known: {', '.join(sorted(known))}")
    if not isinstance(options, Mapping):
        raise PassError(f"{name}: its options must be a mapping of {fields(known[name])}, not {options!r}")
    try:
        return known[name](**options)
    except pydantic.ValidationError as problem:
        raise PassError(explained(name, known[name], problem)) from None


def explained(name: str, kind: type[Pass], problem: pydantic.ValidationError) -> str:
    first = problem.errors()[0]
    where = first["loc"]
    if first["type"] == "extra_forbidden":
        option = ".".join(map(str, where))
        return f"{name}: unknown option {option!r}{suggestion(option, kind.model_fields)}; options: {fields(kind)}"
    if first["type"] == "value_error":
        return ": ".join([name, *map(str, where), complaint(first)])
    part = f"an entry of {where[0]}" if len(where) > 1 and isinstance(where[1], int) else ".".join(map(str, where))
    return f"{name}: {part} {complaint(first)}"


def fields(kind: type[Pass]) -> str:
    return ", ".join(kind.model_fields) or "none"


def rewrite(program: Program, passes: Iterable[Pass | Mapping[str, Any]] = ()) -> Program:
    """``program`` after ``passes``, in order, on a copy; what tracing leaves behind is cleaned up first.

    Raises `PassError` for an unknown pass, option or target.
    """
    wanted = [load(entry) for entry in passes]
    seen: dict[str, Pass] = {}
    for item in wanted:
        if seen.setdefault(item.name, item) != item:
            raise PassError(f"passes: {item.name} is there twice with different options: {seen[item.name]} and {item}")
    if not any(line.startswith(FIRST) for line in program.history) and FIRST in discover():
        wanted.insert(0, discover()[FIRST]())
    for item in wanted:
        program = applied(item, program)
    return program


def rewritten(item: Pass, program: Program) -> None:
    """The rewrite itself; what is wrong begins with the pass's name."""
    try:
        item.rewrite(program)
    except PassError as problem:
        if str(problem).startswith(f"{item.name}: "):
            raise
        raise PassError(f"{item.name}: {problem}") from None


def applied(item: Pass, program: Program) -> Program:
    """One pass on a copy, with its checks and its line of history."""
    verify(program)
    new, start = program.clone(), time.perf_counter()
    with symbolic_sizes():
        rewritten(item, new)
        annotate(new, example_sizes(new))
    verify(new)
    options = ", ".join(f"{k}={v!r}" for k, v in item.model_dump(exclude_defaults=True).items())
    new.history.append(f"{item.name}({options}) in {time.perf_counter() - start:.3f} s")
    if program.respecialize is not None and not program.sizes:
        again = program.respecialize
        new.respecialize = lambda _program, sizes: applied(item, again(program, sizes))
    return new
