"""The annotated program as data: from a program's text where there is one, else from what the plan keeps of its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.plan.edges import Edge, edges
from autopar.plan.plan import Choice, NodeFacts, PlanDocument, Read

HEAD = re.compile(r"(\S+)(?: × (\d+))? \{")
LINE = re.compile(r"  %(\S+?): (.*?) = (.*)")
OPERAND = re.compile(r"%([\w.]+)")
STORED = ("parameter", "buffer", "constant", "input")


@dataclass(frozen=True)
class Line:
    """One node. ``code`` is its right-hand side; ``kind`` one of input, parameter, buffer, constant,
    placeholder (one of these), call, item, operator."""

    name: str
    type: str
    code: str
    kind: str
    reads: tuple[Read, ...]
    choice: Choice | None
    edges: tuple[Edge, ...]
    facts: NodeFacts | None

    @property
    def seconds(self) -> float:
        return self.facts.forward + self.facts.backward if self.facts else 0.0


@dataclass(frozen=True)
class Graph:
    """One graph: ``count`` is how often a block stands in the program, 0 where that is not known."""

    name: str
    count: int
    lines: tuple[Line, ...]
    returns: str = ""


def graphs(document: PlanDocument, program: str | None) -> list[Graph]:
    """Outer graph first."""
    return list(_from_text(document, program)) if program else list(_from_plan(document))


def _from_text(document: PlanDocument, program: str) -> Iterator[Graph]:
    name, count, lines, returns = "", 0, [], ""
    for row in program.splitlines():
        if head := HEAD.fullmatch(row):
            name, count, lines, returns = head[1], int(head[2] or 1), [], ""
        elif found := LINE.fullmatch(row):
            lines.append(_line(document, name, found[1], found[2], found[3]))
        elif row.startswith("  return"):
            returns = row.strip()
        elif row == "}":
            yield Graph(name, count, tuple(lines), returns)


def _line(document: PlanDocument, graph: str, name: str, type: str, code: str) -> Line:
    choices = document.plan.choices.get(graph, {})
    choice = choices.get(name)
    facts = document.nodes.get(graph, {}).get(name)
    reads = facts.reads if facts else tuple(Read(node=n) for n in OPERAND.findall(code))
    return Line(name, type, code, _kind(code), reads, choice, tuple(edges(choice, reads, choices)), facts)


def _kind(code: str) -> str:
    first = code.split(" ", 1)[0]
    if first in STORED:
        return first
    operator = code.split("(", 1)[0]
    return "item" if operator == "getitem" else "operator" if "." in operator else "call"


def _from_plan(document: PlanDocument) -> Iterator[Graph]:
    """Placeholders have choices but no facts, so all that a plan tells of them is a name and a placement."""
    calls = [f.op for f in document.nodes.get("program", {}).values()]
    for name, choices in document.plan.choices.items():
        nodes = document.nodes.get(name, {})
        lines = tuple(_known(node, choices, nodes.get(node)) for node in choices)
        yield Graph(name, 1 if name == "program" else calls.count(name), lines)


def _known(name: str, choices: Mapping[str, Choice], facts: NodeFacts | None) -> Line:
    choice = choices[name]
    if facts is None:
        return Line(name, "", "", "operator" if choice.inputs else "placeholder", (), choice, (), None)
    code = f"{facts.op}({', '.join(f'%{r.node}' for r in facts.reads)})"
    return Line(
        name, facts.type, code, _kind(code), facts.reads, choice, tuple(edges(choice, facts.reads, choices)), facts
    )
