"""A static program cut into stages: which outer nodes each stage runs, what it receives and what it sends."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from autopar.errors import PlanError
from autopar.ir.program import Program

LOSS = ("loss_sum", "count")


@dataclass
class StageGraph:
    """One stage of the outer graph, its nodes still the program's own.

    ``nodes`` in program order, placeholders included; ``receives`` and ``sends`` are values that cross its borders.
    """

    index: int
    nodes: list[fx.Node]
    calls: list[fx.Node]
    receives: list[fx.Node] = field(default_factory=list)
    sends: list[fx.Node] = field(default_factory=list)


def homes(program: Program, ranges: list[tuple[int, int]]) -> dict[fx.Node, int]:
    """The stage of every outer node: that of the last block call before it."""
    stage_of = {i: s for s, (a, b) in enumerate(ranges) for i in range(a, b + 1)}
    calls = program.calls()
    expected = list(range(len(calls)))
    covered = [i for a, b in ranges for i in range(a, b + 1)]
    if covered != expected:
        raise PlanError(f"the plan's stages cover the blocks {ranges}, the program has {len(calls)}")
    found: dict[fx.Node, int] = {}
    here = 0
    for node in program.graph.nodes:
        if node.op == "call_module":
            here = stage_of[calls.index(node)]
            found[node] = here
        elif "getitem" in str(node.target) and node.args[0].op == "call_module":  # type: ignore[union-attr]
            found[node] = found[node.args[0]]  # type: ignore[index]
        else:
            found[node] = here
    found[program.graph.output_node()] = len(ranges) - 1
    return found


def free_nodes(program: Program) -> set[fx.Node]:
    """Values that depend on batch inputs, buffers and constants alone: every stage may compute them for itself."""
    free: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.meta["kind"] != "parameter":
                free.add(node)
        elif node.op == "call_function" and all(n in free for n in node.all_input_nodes) and not random(node):
            free.add(node)
    return free


def copies(program: Program) -> set[fx.Node]:
    """Views and casts of parameters alone: every stage that reads one makes it of its own parameter, which is smaller to
    keep equal (once a step) than a weight is to send (with every micro-batch)."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        given = node.all_input_nodes if node.op == "call_function" else []
        of_parameters = all(n in found or n.op == "placeholder" and n.meta["kind"] == "parameter" for n in given)
        if given and of_parameters and not random(node) and not changes_in_place(node):
            found.add(node)
    return found


def trains_beside(stage: StageGraph, program: Program) -> bool:
    """Whether gradients flow through something that depends on nothing the stage receives but on trained parameters, beyond
    views and casts of a single one: not in a stage that receives nothing."""
    reached, own = set(stage.receives), copies(program)
    for node in stage.nodes if reached else ():
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            continue
        alone = node in own and len(node.all_input_nodes) == 1
        if node.op in ("call_function", "call_module") and not alone and flowing(node):
            return True
    return False


def flowing(node: fx.Node) -> bool:
    flag = node.meta.get("requires_grad", False)
    return any(flag) if isinstance(flag, (tuple, list)) else bool(flag)


def random(node: fx.Node) -> bool:
    """Whether a node draws random numbers (it must then run once, in one place)."""
    tags = getattr(node.target, "tags", ())
    return any("nondeterministic" in str(t) for t in tags)


def cut(program: Program, ranges: list[tuple[int, int]]) -> list[StageGraph]:
    """The program's stages. Raises `PlanError` if ``ranges`` are not its block calls, in order."""
    home, free = homes(program, ranges), free_nodes(program) | copies(program)
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    last = len(ranges) - 1
    own: list[set[fx.Node]] = [set() for _ in ranges]
    for node in program.graph.nodes:
        if node.op == "output":
            own[last].add(node)
        elif node.op != "placeholder" and (node not in free or counts(node)):
            own[home[node]].add(node)
    received: list[set[fx.Node]] = [set() for _ in ranges]
    for stage, nodes in enumerate(own):
        for node in list(nodes):
            require(node, stage, home, free, own, received)
        attach_changes(program, stage, home, free, own, received)
    stages = []
    for stage, nodes in enumerate(own):
        ordered = sorted(nodes, key=order.__getitem__)
        sends = received[stage + 1] if stage < last else set()
        stages.append(
            StageGraph(
                stage,
                ordered,
                [n for n in ordered if n.op == "call_module"],
                sorted(received[stage], key=order.__getitem__),
                sorted(sends, key=order.__getitem__),
            )
        )
    return stages


def attach_changes(
    program: Program,
    stage: int,
    home: dict[fx.Node, int],
    free: set[fx.Node],
    own: list[set[fx.Node]],
    received: list[set[fx.Node]],
) -> None:
    """In-place changes of values the stage computes for itself: nobody reads them, yet they must happen."""
    changes = [n for n in program.graph.nodes if n in free and changes_in_place(n)]
    again = True
    while again:
        again = False
        for node in changes:
            if node not in own[stage] and memory_of(node) in own[stage]:
                own[stage].add(node)
                require(node, stage, home, free, own, received)
                again = True


def counts(node: fx.Node) -> bool:
    """Whether a node changes a buffer of the model (batch norm's count of batches): it runs where it stands."""
    return changes_in_place(node) and memory_of(node).op == "placeholder"


def changes_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def memory_of(node: fx.Node) -> fx.Node:
    """The value whose memory a node is a view of, or changes."""
    schema = getattr(node.target, "_schema", None)
    while schema is not None and any(r.alias_info is not None for r in schema.returns):
        node = node.args[0]  # type: ignore[assignment]
        schema = getattr(node.target, "_schema", None)
    return node


def require(
    node: fx.Node,
    stage: int,
    home: dict[fx.Node, int],
    free: set[fx.Node],
    own: list[set[fx.Node]],
    received: list[set[fx.Node]],
) -> None:
    """Bring everything ``node`` reads to ``stage``: recomputed, held, or received from the stages before."""
    for source in node.all_input_nodes:
        if source.op == "placeholder" or source in free:
            if source not in own[stage]:
                own[stage].add(source)
                require(source, stage, home, free, own, received)
        elif home[source] < stage:
            for s in range(home[source] + 1, stage + 1):
                received[s].add(source)
        elif source not in own[stage]:
            raise PlanError(f"{node.name} in stage {stage} reads {source.name} of the later stage {home[source]}")
