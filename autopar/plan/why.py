"""Why one node or parameter is placed as it is: its strategy, its neighbours', and what its edges move."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fnmatch import fnmatchcase

from autopar.errors import PlanError
from autopar.plan.edges import Edge, edges
from autopar.plan.names import starred
from autopar.plan.plan import Choice, NodeFacts, PlanDocument
from autopar.plan.text import zero_of
from autopar.spec.quantity import show_seconds

NEAR = 5  # names that are proposed for a misspelled one
LISTED = 24  # families of parameters told of one by one; more of them only by their number
ZERO = (
    "every replica holds all of it",
    "the optimizer's state of it is split over the replicas",
    "its gradient and the optimizer's state of it are split over the replicas",
    "it is split over the replicas, with its gradient and the optimizer's state",
)
MEANING = {"R": "whole on every device", "P": "a partial sum on every device"}


def why(document: PlanDocument, name: str) -> str:
    """What the plan says of a node (``block_0.linear_2`` or a bare ``linear_2``) or of a parameter (its name or a glob).

    Raises `PlanError` naming the nearest names where there is none."""
    nodes = nodes_of(document, name)
    if nodes:
        return "\n\n".join("\n".join(_node(document, graph, node)) for graph, node in nodes)
    names = [p for p in document.plan.placements if p == name or fnmatchcase(p, name)]
    if names:
        return "\n".join(_parameters(document, names))
    raise PlanError(f"why: the plan has no node and no parameter {name!r}{_near(document, name)}")


def nodes_of(document: PlanDocument, name: str) -> list[tuple[str, str]]:
    """The graph and name of every node that is meant."""
    name = name.removeprefix("%")
    graph, _, node = name.partition(".")
    choices = document.plan.choices
    if node in choices.get(graph, {}):
        return [(graph, node)]
    return [(graph, name) for graph, nodes in choices.items() if name in nodes]


def _near(document: PlanDocument, name: str) -> str:
    if not document.plan.choices:
        return "; it holds no placements: nothing is split"
    known = [
        n if graph == "program" else f"{graph}.{n}" for graph, nodes in document.plan.choices.items() for n in nodes
    ]
    bare = {n.rpartition(".")[2]: n for n in reversed(known)}
    wanted = name.removeprefix("%")
    pool = [*bare, *known, *document.plan.placements]
    found = [bare.get(n, n) for n in difflib.get_close_matches(wanted, pool, n=2 * NEAR, cutoff=0.5)]
    near = list(dict.fromkeys(found))[:NEAR]
    graphs = ", ".join(document.plan.choices)
    return f"; near it: {', '.join(near)}" if near else f"; nodes are named as GRAPH.NODE (graphs here: {graphs})"


def _node(document: PlanDocument, graph: str, node: str) -> Iterator[str]:
    choices, facts = document.plan.choices[graph], document.nodes.get(graph, {})
    choice, own = choices[node], facts.get(node, NodeFacts())
    calls = sum(f.op == graph for f in document.nodes.get("program", {}).values())
    times = f", one of the nodes of a block that stands {calls} times" if calls else ""
    yield f"{graph}.{node}{f': {own.op}' if own.op else ''}{f' → {own.type}' if own.type else ''}{times}"
    yield f"  made        {', '.join(map(_meaning, choice.outputs))}"
    if choice.special:
        yield f"  carried out by {choice.special}: the plain operator on the parts alone would be wrong"
    if own.forward or own.backward:
        yield f"  computing   {show_seconds(own.forward)} forward, {show_seconds(own.backward)} backward for one micro-batch"
    if not facts:
        yield from _bare(choice)
        return
    for edge in edges(choice, own.reads, choices):
        yield f"  reads       %{edge.read.node}: {_edge(edge)}{_shared(edge, node, choices, facts)}"
    readers = list(_readers(node, choices, facts))
    for reader, edge in readers:
        yield f"  read by     %{reader}: {_edge(edge)}"
    yield from _verdict(node, choice, own, choices, readers)


def _bare(choice: Choice) -> Iterator[str]:
    if choice.inputs:
        yield f"  reads       operands placed {', '.join(choice.inputs)}"
    yield "  its neighbours are not in this plan file; plan the job again to have them"


def _meaning(placement: str) -> str:
    if placement in MEANING:
        return f"{placement} ({MEANING[placement]})"
    dim = placement.removeprefix("S(").rstrip(")").partition("|")[0]
    return f"{placement} (split along dim {dim} over tp)"


def _edge(edge: Edge) -> str:
    if not edge.moves:
        return f"{edge.made}, read as it is"
    way = f"{edge.made} → {edge.wanted}" if edge.made != edge.wanted else edge.made
    return f"{way}: {edge.how()}" if edge.how() else f"{way}, at no cost"


def _readers(node: str, choices: dict[str, Choice], facts: dict[str, NodeFacts]) -> Iterator[tuple[str, Edge]]:
    for reader, known in facts.items():
        if any(read.node == node for read in known.reads):
            for edge in edges(choices.get(reader), known.reads, choices):
                if edge.read.node == node:
                    yield reader, edge


def _shared(edge: Edge, node: str, choices: dict[str, Choice], facts: dict[str, NodeFacts]) -> str:
    """The other readers that one move serves."""
    if not edge.moves:
        return ""
    same = [r for r, other in _readers(edge.read.node, choices, facts) if other.key == edge.key and r != node]
    return f" (one move, shared with {', '.join(f'%{r}' for r in dict.fromkeys(same))})" if same else ""


def _verdict(
    node: str, choice: Choice, own: NodeFacts, choices: dict[str, Choice], readers: list[tuple[str, Edge]]
) -> Iterator[str]:
    """What the choice costs in moves, in and out; every move once."""
    into = {e.key: e for e in edges(choice, own.reads, choices) if e.moves}
    out = {e.key: e for _, e in readers if e.moves}
    talk = sum(e.read.forward_seconds + e.read.backward_seconds for e in (*into.values(), *out.values()))
    compute = own.forward + own.backward
    if talk:
        share = f" ({show_seconds(compute)} of computing)" if compute else ""
        yield f"  its moves   {show_seconds(talk)} for one micro-batch, in and out{share}"
    elif own.reads or readers:
        yield "  its moves   none that costs time: it reads and is read as its neighbours leave and want it"


def _parameters(document: PlanDocument, names: list[str]) -> Iterator[str]:
    plan = document.plan
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found.setdefault((starred(name), plan.placements[name]), []).append(name)
    for (family, placement), members in list(found.items())[:LISTED]:
        times = f" × {len(members)}" if len(members) > 1 else ""
        yield f"{family if times else members[0]}{times}: {_meaning(placement.partition('@')[0])}"
        yield from _readings(document, members[0])
    if len(found) > LISTED:
        yield f"… and {len(found) - LISTED} more kinds"
    over = f"dp {plan.mesh.dp}" + (f" and cp {plan.mesh.cp}" if plan.mesh.cp > 1 else "")
    yield f"  over {over}: {zero_of(plan)}, {ZERO[plan.zero]}"


def _readings(document: PlanDocument, name: str) -> Iterator[str]:
    """Who reads a parameter: nodes of the program, or of the block that it is given to."""
    spelled = "_" + name.replace(".", "_")
    outer = document.plan.choices.get("program", {})
    facts = document.nodes.get("program", {})
    own = [n for n, choice in outer.items() if not choice.inputs and n not in facts and f"_{n}".endswith(spelled)]
    for node in own:
        for reader, edge in _readers(node, outer, facts):
            block = facts[reader].op
            if block not in document.plan.choices:
                yield f"  read by     program.{reader}: {_edge(edge)}"
                continue
            place = list(document.plan.choices[block])[edge.position]
            for inner, way in _readers(place, document.plan.choices[block], document.nodes.get(block, {})):
                yield f"  read by     {block}.{inner}: {_edge(way)}"
