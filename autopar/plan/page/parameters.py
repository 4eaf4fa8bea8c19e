"""Where parameters live: names that differ in a number alone share a row."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.plan.names import starred
from autopar.plan.page.html import Markup, number, section, table, tag
from autopar.plan.page.program import badge, finder
from autopar.plan.page.source import LINE
from autopar.plan.plan import PlanDocument


def families(placements: Mapping[str, str], types: Mapping[str, str]) -> dict[tuple[str, str, str], list[str]]:
    """(name with numbers as ``*``, type, placement) → names, in the order of the plan; a lone name keeps its number."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, placement in placements.items():
        found.setdefault((starred(name), types.get(name, ""), placement), []).append(name)
    return {(k[0] if len(v) > 1 else v[0], *k[1:]): v for k, v in found.items()}


def types_of(program: str | None) -> dict[str, str]:
    """Parameter name → ``f32[64, 64]``, from the program's text."""
    found = {}
    for row in (program or "").splitlines():
        if (line := LINE.fullmatch(row)) and line[3].startswith("parameter "):
            found.setdefault(line[3].removeprefix("parameter "), line[2])
    return found


def parameters(document: PlanDocument, program: str | None) -> Markup:
    placed = document.plan.placements
    if not placed:
        return section("parameters", "Parameters", "No parameter is placed: every device of a stage holds all of it.")
    types = types_of(program)
    rows = [
        tag(
            "tr",
            tag("td", tag("code", name), title=f"{names[0]} … {names[-1]}" if len(names) > 1 else None),
            number(f"× {len(names)}" if len(names) > 1 else ""),
            tag("td", type, cls="type"),
            tag("td", badge(where.split("@")[0]), tag("span", _along(where), cls="muted")),
        )
        for (name, type, where), names in families(placed, types).items()
    ]
    split = sum(where != "R" for where in placed.values())
    note = f"{len(placed):,} parameters, {split:,} of them split along tp. ZeRO {document.plan.zero} is over dp, on top of this."
    tools = finder("parameters", "find a parameter")
    found = table(["parameter", "count", "shape", "placement"], rows)
    return section("parameters", "Parameters", note, tag("div", tools, cls="tools"), found)


def _along(where: str) -> str:
    _, at, axis = where.partition("@")
    return f" along {axis}" if at else " whole on every device of tp"
