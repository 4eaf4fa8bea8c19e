"""The form of a block: its norms and their places, its activation, and how attention and MLP join the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autopar.compare.attention import cores_of
from autopar.compare.walk import before, passes, reaches, scales, source
from autopar.cost.values import op_name, tensors
from autopar.ir.functions import FunctionCall
from autopar.ir.ops import Linear, Norm, view

NONLINEAR = frozenset(
    ["gelu", "silu", "relu", "sigmoid", "tanh", "elu", "leaky_relu", "mish", "softplus", "hardswish", "glu"]
)


@dataclass(frozen=True)
class Normed:
    """One norm: ``kind``, its input, its result, its eps, whether it computes in float32 whatever the model's precision."""

    kind: str
    given: fx.Node
    out: fx.Node
    eps: float
    wide: bool


def norms(graph: fx.Graph) -> list[Normed]:
    """Native norms, and those written out with rsqrt."""
    found = []
    for node in graph.nodes:
        seen = view(node)
        if isinstance(seen, Norm):
            kind = "LayerNorm" if seen.kind == "layer_norm" else "RMSNorm"
            eps = next((a for a in reversed(node.args) if isinstance(a, float)), 1e-5)
            found.append(Normed(kind, seen.x, node, eps, True))
        elif node.op == "call_function" and op_name(node) == "rsqrt":
            found.append(_written(node))
    return found


def _written(rsqrt: fx.Node) -> Normed:
    added = rsqrt.all_input_nodes[0]
    eps = next((a for a in added.args if isinstance(a, (int, float))), 0.0)
    squares = source(added.all_input_nodes[0])  # the mean
    inner = source(squares.all_input_nodes[0])  # the square
    given = inner.all_input_nodes[0]
    out = rsqrt
    while True:  # times the input, cast, times the weight
        nexts = [u for u in out.users if passes(u) or op_name(u) == "mul"]
        if len(out.users) != 1 or not nexts:
            return Normed("RMSNorm", given, out, float(eps), tensors(rsqrt)[0].dtype != torch.bfloat16)
        out = nexts[0]


def linears(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if isinstance(view(n), Linear)]


def place(norm: Normed, graph: fx.Graph) -> str:
    """``pre``, ``post`` (of the stream), ``output`` (of what a sublayer adds) or ``heads`` (queries and keys)."""
    inside = {n for core in cores_of(graph) for n in core.nodes}
    if reaches(norm.out, lambda n: n in inside, lambda n: _turns(n) or not (_adds(n) or _multiplies(n))):
        return "heads"
    given = source(norm.given)
    if given.op == "placeholder" or op_name(given) == "add":
        carried = reaches(norm.out, _adds, lambda n: passes(n) or scales(n))
        return "pre" if not carried and reaches(norm.out, _multiplies, passes) else "post"
    return "output"


def _turns(node: fx.Node) -> bool:
    """The sum of a rotation, x · cos + swapped · sin: an add of two products."""
    return _adds(node) and all(op_name(source(o)) == "mul" for o in node.all_input_nodes)


def _adds(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) == "add" and len(node.all_input_nodes) == 2


def _multiplies(node: fx.Node) -> bool:
    return isinstance(view(node), Linear) or op_name(node) in ("bmm", "matmul", "mm")


def activation(graph: fx.Graph) -> tuple[str, fx.Node] | None:
    """The MLP's nonlinearity and its node."""
    inside = {n for core in cores_of(graph) for n in core.nodes}
    for node in graph.nodes:
        if node.op != "call_function" or node in inside:
            continue
        if isinstance(node.target, FunctionCall):
            return node.target.__name__, node
        if op_name(node) in NONLINEAR and _from_product(node):
            return _spelled(node), node
    return None


def _from_product(node: fx.Node) -> bool:
    """Whether a value comes from a projection and does not choose experts."""
    return any(_multiplies(n) for n in before([node])) and not reaches(
        node, lambda n: op_name(n) == "topk", lambda n: not _multiplies(n)
    )


def _spelled(node: fx.Node) -> str:
    name = op_name(node)
    squared = any(op_name(u) in ("pow", "square") for u in node.users)
    if name == "gelu" and node.kwargs.get("approximate") == "tanh":
        name = "gelu_tanh"
    if name == "tanh" and any(op_name(n) == "pow" for n in before([node])):
        name = "gelu_tanh"  # written out: x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2
    return f"{name}²" if squared and name == "relu" else name


def gated(node: fx.Node) -> bool:
    """Whether an activation's result is multiplied with a projection that the activation does not see."""
    for user in (*node.users, *(v for u in node.users if passes(u) for v in u.users)):
        others = [o for o in user.all_input_nodes if node not in before([o])] if op_name(user) == "mul" else []
        if any(any(_multiplies(n) for n in before([o])) and o not in before([node]) for o in others):
            return True
    return False


def form(graph: fx.Graph, act: fx.Node) -> str:
    """``sequential``, or ``parallel`` where the MLP does not see what attention added."""
    attended = [core.output for core in cores_of(graph)]
    if not attended:
        return "no attention"
    return "sequential" if before([act]) & set(attended) else "parallel"
