"""What passes do to programs: find layers by role or name, add parameters, freeze, treat some instances of a block apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import fx

from autopar.errors import PassError, suggestion
from autopar.ir.adapters import trained
from autopar.ir.initial import Initial
from autopar.ir.ops import Embedding, Linear, view
from autopar.ir.program import OUTER, Advance, Parameter, Program, copy_graph

KINDS = {Linear: "linear layer", Embedding: "embedding"}


@dataclass(frozen=True)
class Layer:
    """A linear layer or embedding of a graph. ``path`` is relative to the block; ``paths`` the instances' full ones."""

    graph: str
    path: str
    paths: tuple[str, ...]
    view: Linear | Embedding


def layers(program: Program, kinds: tuple[type, ...] = (Linear, Embedding)) -> list[Layer]:
    """Every layer that reads a parameter called ``<path>.weight``, in program order."""
    found = []
    for name, graph in program.graphs():
        prefixes = [""] if name == OUTER else [f"{c.meta['path']}." for c in program.calls() if c.target == name]
        for node in graph.nodes:
            seen = view(node) if node.op == "call_function" else None
            if isinstance(seen, kinds) and (parameter := parameter_of(seen.weight)) is not None:
                path = own_path(program, node, parameter.meta["name"].removesuffix(".weight"))
                found.append(Layer(name, path, tuple(f"{p}{path}" for p in prefixes), seen))  # type: ignore[arg-type]
    return found


def own_path(program: Program, node: fx.Node, path: str) -> str:
    """The module a layer is: that of its parameter, or, where the parameter is tied, the one that reads it here."""
    here = str(node.meta.get("path", ""))
    tied = program.parameters.get(f"{here}.weight")
    return here if tied is not None and tied.alias_of == f"{path}.weight" else path


def parameter_of(node: fx.Node) -> fx.Node | None:
    """The parameter behind a weight, through transposes and casts."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    named = node.op == "placeholder" and node.meta["kind"] == "parameter" and node.meta["name"].endswith(".weight")
    return node if named else None


def matches(program: Program, path: str, target: str) -> bool:
    """Whether a module is meant by a target: its role, or a glob of its whole path or of the path's end."""
    return program.roles.get(path) == target or fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")


def select(
    program: Program, who: str, targets: Iterable[str], kinds: tuple[type, ...] = (Linear, Embedding)
) -> list[Layer]:
    """The layers that the targets mean; blocks of which only some instances are meant are treated apart first.

    Raises `PassError` that names a target nobody answers to, and what there is.
    """
    everything = layers(program, kinds)
    wanted = {p for layer in everything for p in layer.paths if any(matches(program, p, t) for t in targets)}
    for target in targets:
        if not any(matches(program, p, target) for layer in everything for p in layer.paths):
            raise PassError(unknown(program, who, target, everything, kinds))
    for name in list(program.blocks):
        separate_unlike(program, name, everything, wanted)
    return [layer for layer in layers(program, kinds) if set(layer.paths) <= wanted]


def unknown(program: Program, who: str, target: str, everything: list[Layer], kinds: tuple[type, ...]) -> str:
    paths = [p for layer in everything for p in layer.paths]
    roles = list(dict.fromkeys(program.roles[p] for p in paths if p in program.roles))
    names = list(dict.fromkeys(p.rsplit(".", 1)[-1] for p in paths))
    here = f"roles here: {', '.join(roles)}; " if roles else ""
    what = " or ".join(KINDS[k] for k in kinds)
    return (
        f"{who}: no {what} has the role or the name '{target}'{suggestion(target, [*roles, *names])} "
        f"({here}names: {', '.join(names[:12])})"
    )


def separate_unlike(program: Program, name: str, everything: list[Layer], wanted: set[str]) -> None:
    """Give instances of a block that are meant in another way a graph of their own."""
    calls = [c for c in program.calls() if c.target == name]
    groups: dict[frozenset[str], list[fx.Node]] = {}
    for i, call in enumerate(calls):
        meant = frozenset(layer.path for layer in everything if layer.graph == name and layer.paths[i] in wanted)
        groups.setdefault(meant, []).append(call)
    for group in list(groups.values())[1:]:
        separate(program, name, group)


def separate(program: Program, name: str, calls: list[fx.Node]) -> str:
    """A copy of a block's graph for some of its calls; returns its name."""
    new = f"block_{len(program.blocks)}"
    program.blocks[new] = copy_graph(program.blocks[name])
    for call in calls:
        call.target = new
    return new


# ------------------------------------------------------------------ parameters


def add_parameter(
    program: Program,
    graph: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    initial: Initial | Callable[[str], Initial],
) -> fx.Node:
    """A new trainable parameter: ``name`` in the outer graph, ``<instance>.name`` of every instance of a block.

    ``initial`` may be made of the instance's path. Returns the placeholder in ``graph``. Values are real where the
    program's own are, else made when weights are written.
    """
    make = initial if callable(initial) else lambda _path: initial
    if graph == OUTER:
        return outer_parameter(program, name, shape, dtype, make(""))
    for call in program.calls():
        if call.target == graph:
            path = str(call.meta["path"])
            new = outer_parameter(program, f"{path}.{name}", shape, dtype, make(path))
            call.args = (*call.args, new)
    return placeholder(program.blocks[graph], name, shape, dtype, program)


def add_state(
    program: Program, graph: str, name: str, shape: tuple[int, ...], initial: Initial, advance: Advance
) -> fx.Node:
    """As `add_parameter`, a float32 buffer that operators write into and ``advance`` carries from step to step. A name that
    the graph has already is that buffer: two readers share it."""
    inner = program.graph if graph == OUTER else program.blocks[graph]
    there = next((n for n in inner.nodes if n.op == "placeholder" and n.meta["name"] == name), None)
    if there is not None:
        return there
    if graph == OUTER:
        return outer_state(program, name, shape, initial, advance)
    for call in program.calls():
        if call.target == graph:
            new = outer_state(program, f"{call.meta['path']}.{name}", shape, initial, advance)
            call.args = (*call.args, new)
    return placeholder(inner, name, shape, torch.float32, program, kind="buffer")


def outer_state(program: Program, name: str, shape: tuple[int, ...], initial: Initial, advance: Advance) -> fx.Node:
    program.buffers[name] = Parameter(name, shape, torch.float32, trainable=False, persistent=False, advance=advance)
    program.initial[name] = initial
    program.tensors[name] = initial.make(name, shape, torch.float32)
    return placeholder(program.graph, name, shape, torch.float32, program, kind="buffer")


def outer_parameter(
    program: Program, name: str, shape: tuple[int, ...], dtype: torch.dtype, initial: Initial
) -> fx.Node:
    if name in program.parameters:
        raise PassError(f"the model has a parameter {name!r} already")
    program.parameters[name] = Parameter(name, shape, dtype)
    program.initial[name] = initial
    real = any(not t.is_meta for n, t in program.tensors.items() if n in program.parameters)
    value = (
        first_value(program, name, shape, dtype, initial) if real else torch.empty(shape, dtype=dtype, device="meta")
    )
    program.tensors[name] = torch.nn.Parameter(value)
    return placeholder(program.graph, name, shape, dtype, program)


def first_value(
    program: Program, name: str, shape: tuple[int, ...], dtype: torch.dtype, initial: Initial
) -> torch.Tensor:
    if initial.kind == "norms":
        return initial.measured(program.tensors[initial.of]).to(dtype)
    return initial.make(name, shape, dtype)


def placeholder(
    graph: fx.Graph, name: str, shape: tuple[int, ...], dtype: torch.dtype, program: Program, kind: str = "parameter"
) -> fx.Node:
    """A parameter or buffer placeholder after the others of a graph."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        new = graph.placeholder(name.replace(".", "_"))
    new.target = new.name  # the argument's name in generated code; fx makes only the node's a unique identifier
    mode = next((m for n in graph.nodes if (m := getattr(n.meta.get("val"), "fake_mode", None)) is not None), None)
    new.meta.update(kind=kind, name=name, path="", requires_grad=kind == "parameter", carried=kind == "buffer")
    with mode or contextlib.nullcontext():
        new.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    return new


def freeze(program: Program) -> None:
    """Every parameter that no pass added and no adapter trains takes no gradient any more."""
    kept = program.initial.keys() | trained(program)
    for name, parameter in program.parameters.items():
        if name not in kept and parameter.trainable:
            program.parameters[name] = replace(parameter, trainable=False)


def unfreeze(program: Program, names: Iterable[str]) -> None:
    """These parameters take gradients (again)."""
    for name in names:
        program.parameters[name] = replace(program.parameters[name], trainable=True)
        if not program.tensors[name].requires_grad:
            program.tensors[name] = torch.nn.Parameter(program.tensors[name].detach())
