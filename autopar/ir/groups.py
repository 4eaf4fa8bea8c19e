"""Which operators belong together when it is said what may be recomputed: the attention core, norms, activations …"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import fx

from autopar.ir.attention import Core, cores
from autopar.ir.program import Program

GROUPS = {
    "attention": "the attention core: scores, mask, softmax, dropout and the mixture of values, or the fused operator",
    "softmax": "softmaxes alone",
    "dropout": "dropouts alone",
    "rotary": "what lies between the projections and the attention core: rotary embeddings, scales, repeated heads",
    "norm": "layer norms and RMS norms, written out or not",
    "activation": "the nonlinearity of the feed-forward and its gate",
    "cast": "changes of dtype",
    "sum": "residual sums and biases that are added apart",
    "product": "linear layers and matrix products outside of attention",
    "communication": "collectives over tp",
    "other": "everything else",
}
"""Every group and what is in it. An operator may be in several: a softmax is in the attention core, too."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = words("linear fp8_linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d embedding")
NONLINEAR = words("silu gelu relu tanh sigmoid elu leaky_relu softplus hardtanh glu mish relu6 erf silu_mul gelu_mul")
NORMS = words("layer_norm rms_norm group_norm batch_norm add_rms_norm add_layer_norm")
STATISTICS = words("add mean pow mul square to rsqrt sqrt sub div var reciprocal")
REACH = 6
"""How many operators a norm or a nonlinearity that is written out extends to either side of its root or its curve."""


def operator_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; the name of any other target."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return str(getattr(target, "__name__", target)).lower().removesuffix("function")  # a model's own autograd function


def groups(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """The groups of every operator of a graph; ``other`` where none fits."""
    found: dict[fx.Node, set[str]] = {n: set() for n in graph.nodes if n.op == "call_function"}
    attention = cores(graph)
    for node in (n for c in attention for n in c.nodes):
        found[node].add("attention")
    for node in (n for c in attention for n in before(c)):
        found[node].add("rotary")
    for node, mine in found.items():
        name = operator_name(node)
        if name in NORMS:
            mine.add("norm")
        if name in ("rsqrt", "sqrt") or name == "pow" and node.args[1:] == (-0.5,):
            for other in written(node, STATISTICS):
                found[other].add("norm")
        if name in NONLINEAR and not mine:
            for other in written(node, frozenset(["add", "mul", "pow", "to", "div", "sub"])):
                found[other].add("activation")
    for node, mine in found.items():
        mine |= plain(operator_name(node), mine)
    return {n: frozenset(mine or {"other"}) for n, mine in found.items()}


def plain(name: str, known: Iterable[str]) -> set[str]:
    """The groups that the operator alone tells; a sum or a product inside of another group is only in that one."""
    found = {"softmax"} & {name.replace("safe_", "")}
    found |= {"dropout"} if "dropout" in name else set()
    found |= {"cast"} if name == "to" else set()
    if not known:
        found |= {"rotary"} if name == "rotary" else set()
        found |= {"activation"} if name in NONLINEAR else set()
        found |= {"product"} if name in PRODUCTS else set()
        found |= {"sum"} if name == "add" else set()
    return found


def before(core: Core) -> set[fx.Node]:
    """What makes a core's queries, keys and values of the projections."""
    found: set[fx.Node] = set()
    stack = list(core.inputs)
    while stack:
        node = stack.pop()
        name = operator_name(node) if node.op == "call_function" else ""
        if name and name not in PRODUCTS | NORMS and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def written(node: fx.Node, names: frozenset[str]) -> set[fx.Node]:
    """A node and the operators around it that a norm or an activation written out consists of."""
    found, up, down = {node}, {node}, {node}
    for _ in range(REACH):
        up = {s for n in up for s in n.all_input_nodes if s.op == "call_function" and operator_name(s) in names}
        up = {s for s in up if not (operator_name(s) == "add" and len(s.all_input_nodes) > 1 and joins(s))}
        found |= up
    for _ in range(REACH):
        down = {u for n in down for u in n.users if u.op == "call_function" and operator_name(u) in ("mul", "to")}
        found |= down
    return found


def joins(node: fx.Node) -> bool:
    """Whether a sum adds two whole activations: the residual stream, which no norm's statistics go through."""
    return all(operator_name(s) in PRODUCTS | {"add", "dropout"} or s.op == "placeholder" for s in node.all_input_nodes)


def allowed(program: Program, name: str, graph: fx.Graph) -> frozenset[str]:
    """The names of a graph's operators that may run again, and of values whose collectives may (``x>R`` of ``x``)."""
    wanted = program.recompute
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    if wanted is None:
        return frozenset(n.name for n in nodes) | {"communication"}
    known = groups(graph)
    paths = prefixes(program, name)
    found = {n.name for n in nodes if any(w in known[n] or under(paths, n, w) for w in wanted)}
    return frozenset(found | ({"communication"} & set(wanted)))


def prefixes(program: Program, name: str) -> list[str]:
    """The paths of a block's instances; the outer graph's own."""
    return [str(c.meta.get("path", "")) for c in program.calls() if str(c.target) == name] or [""]


def under(paths: list[str], node: fx.Node, glob: str) -> bool:
    """Whether a node was made by a module whose name matches, or by one inside of it."""
    own = str(node.meta.get("path", ""))
    for path in paths:
        parts = ".".join(p for p in (path, own) if p).split(".")
        if any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1)):
            return True
    return any(fnmatchcase(".".join(own.split(".")[:i]), glob) for i in range(1, own.count(".") + 2))
