"""The kernels that one operator call runs on one device: FLOPs, bytes moved, the shape of a matrix product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.cost.mixture import is_mixture, mixture, trained
from autopar.cost.operators import (
    ATTENTION_BACKWARD,
    PRODUCTS,
    Shape,
    is_attention,
    is_causal,
    is_product,
    kept_by,
    local_shapes,
    products,
    skipped_dropout,
)
from autopar.cost.precision import Precision
from autopar.cost.values import Value, flows, is_view, numel, op_name, parameter, reads, tensor, tensors
from autopar.ir.context import ALL_TO_ALL, RING, ContextAttention
from autopar.sharding.placement import Placement

FORWARD, INPUTS, WEIGHTS = 0, 1, 2
"""Sides: the forward, the gradients of activations, the gradients of weights."""
Product = tuple[int, int, int, int]
"""A matrix product: how many of them, rows, columns, depth."""

FREE_BACKWARD = frozenset(
    ["add", "sum", "cat", "stack", "clone", "contiguous", "reshape", "flatten", "pad", "type_as", "repeat_interleave"]
)
"""Operators whose gradient is the output's own, a view of it, or one sum that their operands' shapes ask for."""
POW_BACKWARD = 7
"""Passes over a tensor of ``x ** n`` backward: x ** (n - 1), times n, times the gradient (torch's derivatives.yaml)."""
CUTS = frozenset(["slice", "select", "narrow", "diagonal", "unfold"])
PARTS = frozenset(["split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk"])


@dataclass(frozen=True)
class Call:
    """One kernel. ``kind``: matmul, attention or vector (bound by memory). ``dtype``: where it computes in another than
    its operator."""

    side: int
    kind: str
    flops: float = 0.0
    bytes: float = 0.0
    product: Product | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Work:
    """All kernels of one operator call, forward and backward, and the dtype they compute in."""

    calls: tuple[Call, ...] = ()
    dtype: torch.dtype = torch.float32

    def flops(self, side: int) -> float:
        return sum(c.flops for c in self.calls if c.side == side)

    def bytes(self, side: int) -> float:
        return sum(c.bytes for c in self.calls if c.side == side)


NOTHING = Work()


@dataclass(frozen=True)
class Local:
    """One call as one device sees it: shapes and bytes of its operands and outputs."""

    node: fx.Node
    given: list[Shape]
    made: list[Shape]
    sizes: list[int]
    results: list[int]

    @property
    def reads(self) -> list[Value]:
        return reads(self.node)

    @property
    def result(self) -> float:
        return float(sum(self.results))

    @property
    def moved(self) -> float:
        return float(sum(self.sizes)) + self.result


def work(
    node: fx.Node, inputs: tuple[Placement, ...], outputs: tuple[Placement, ...], degree: int, precision: Precision
) -> Work:
    """What one device does for a node under these placements."""
    if node.op != "call_function" or not tensors(node) or skipped_dropout(node) or copies_parameter(node):
        return NOTHING
    given, made = local_shapes(node, inputs, outputs, degree)
    sizes = [numel(s) * precision.itemsize(tensor(v).dtype) for s, v in zip(given, reads(node), strict=True)]
    results = [numel(s) * precision.itemsize(t.dtype) for s, t in zip(made, tensors(node), strict=False)]
    call = Local(node, given, made, sizes, results)
    if is_view(node):
        return Work(view_calls(call))
    dtype = precision.running(tensors(node)[0].dtype)
    if is_attention(node):
        return Work(attention_calls(call), dtype)
    if is_mixture(node):
        return Work(mixture_calls(call), dtype)
    return Work(product_calls(call) if is_product(node) else vector_calls(call), dtype)


def copies_parameter(node: fx.Node) -> bool:
    """A cast of a parameter: what it takes depends on how parameters are sharded (`memory.handled_bytes`)."""
    return op_name(node) == "to" and parameter((node, 0)) is not None


# ------------------------------------------------------------------ products


def attention_calls(call: Local) -> tuple[Call, ...]:
    """A fused attention kernel; its backward recomputes the scores."""
    flops, moved = products(call.node, call.given, call.made) * executed(call), call.moved
    target = call.node.target
    if isinstance(target, ContextAttention):  # every device's queries meet all keys
        flops, moved = flops * target.degree, moved * target.degree
    found = [Call(FORWARD, "attention", flops, moved)]
    if any(flows(v) for v in call.reads[:3]):
        found.append(Call(INPUTS, "attention", ATTENTION_BACKWARD * flops, 2 * moved))
    if isinstance(target, ContextAttention) and target.kind == ALL_TO_ALL:  # what is sent is laid out anew, and back
        found += [Call(side, "vector", 0.0, 4 * call.moved) for side in {c.side for c in found}]
    return tuple(found)


TILE = 128  # rows of queries that a flash kernel works on at a time (Dao 2023, section 3.3)


def executed(call: Local) -> float:
    """The share of the scores that a causal kernel computes: half, and the other half of the tiles on the diagonal."""
    if not is_causal(call.node):
        return 1.0
    target = call.node.target
    if isinstance(target, ContextAttention) and target.kind == RING and not target.zigzag:
        return 1.0 - 0.5 / target.degree  # the last device's queries see all keys
    return min(1.0, 0.5 + 0.5 * TILE / max(call.given[1][-2], 1))


def product_calls(call: Local) -> tuple[Call, ...]:
    """Forward, and a product for the gradient of each factor that has one; a bias' gradient is a sum."""
    name, wanted = op_name(call.node), call.reads
    flops, shape = products(call.node, call.given, call.made), product_shape(call)
    found = [Call(FORWARD, "matmul", flops, call.moved, shape)]
    for i, position in enumerate(PRODUCTS[name]):
        if position < len(wanted) and flows(wanted[position]):
            found.append(Call(side_of(wanted[position]), "matmul", flops, call.moved, turned(shape, i)))
    if name == "linear_cross_entropy" and len(found) > 1:
        found.append(Call(INPUTS, "matmul", flops, call.moved, shape))  # the logits are made again
    if name == "fp8_linear":  # both factors are rounded before a product; the gradient of the weights stays as it is
        found = [c if c.side == WEIGHTS else replace(c, dtype="float8") for c in found]
        found += [Call(c.side, "vector", 0.0, call.moved) for c in found if c.dtype]
    if name == "fp8_linear_delayed":  # every product takes rounded factors, and the largest of each is looked for
        found = [replace(c, dtype="float8") for c in found]
        found += [Call(c.side, "vector", 0.0, 2 * call.moved) for c in found]
    for position, v in enumerate(wanted):
        if position not in PRODUCTS[name] and flows(v):
            found.append(Call(side_of(v), "vector", 0.0, call.result))
    return tuple(found)


def mixture_calls(call: Local) -> tuple[Call, ...]:
    """Tokens gathered, products of each expert, the activation between them, tokens summed; backward twice the products."""
    made, size = mixture(call.node, call.given), call.sizes[0] / max(numel(call.given[0]), 1)
    rows, middle = made.pairs * made.hidden * size, made.pairs * made.ffn * size
    found = [Call(FORWARD, "vector", 0.0, 2 * rows), Call(FORWARD, "vector", 0.0, (made.first + 1) * middle)]
    found.append(Call(FORWARD, "vector", 0.0, 2 * rows + call.result))
    wanted = [side for side, w in zip((INPUTS, WEIGHTS), trained(call.node), strict=True) if w]
    for product in made.products:
        count, m, n, k = product
        flops, moved = 2.0 * count * m * n * k, size * count * (m * k + n * k + m * n)
        found.append(Call(FORWARD, "matmul", flops, moved, product))
        found += [Call(s, "matmul", flops, moved, turned(product, s - INPUTS)) for s in wanted]
    if wanted:
        found.append(Call(INPUTS, "vector", 0.0, 3 * rows + (2 * made.first + 2) * middle))
    return tuple(found)


def product_shape(call: Local) -> Product | None:
    """(count, rows, columns, depth) of a product's forward; None where it is no plain matrix product."""
    name, made = op_name(call.node), call.made[0]
    if name == "linear_cross_entropy":
        return 1, call.given[0][0], call.given[1][0], call.given[0][1]
    if name.startswith("conv") or name in ("einsum", "bilinear") or not made:
        return None
    a, b = (call.given[i] for i in PRODUCTS[name])
    depth = a[-1]
    if name in ("linear", "fp8_linear", "fp8_linear_delayed"):
        return 1, numel(a) // max(depth, 1), numel(b) // max(depth, 1), depth
    if len(b) < 2 or len(made) < 2:
        return 1, numel(made), 1, depth
    rows, columns = (numel(made) // max(made[-1], 1), made[-1]) if len(b) == 2 else (made[-2], made[-1])
    return numel(made) // max(rows * columns, 1), rows, columns, depth


def turned(shape: Product | None, factor: int) -> Product | None:
    """The product that makes the gradient of the first or the second factor."""
    if shape is None:
        return None
    count, rows, columns, depth = shape
    return (count, rows, depth, columns) if factor == 0 else (count, depth, columns, rows)


def side_of(v: Value) -> int:
    return INPUTS if parameter(v) is None else WEIGHTS


# ------------------------------------------------------------------ what is bound by memory


def view_calls(call: Local) -> tuple[Call, ...]:
    """A view costs nothing forward. Backward, a cut-out part is copied into zeros, parts are put together, what was
    expanded is summed (torch's derivatives.yaml)."""
    name, given = op_name(call.node), call.reads
    if not given or not flows(given[0]) or not any(flows((call.node, i)) for i in range(len(call.results))):
        return ()
    whole, part = float(call.sizes[0]), call.result
    if name in CUTS and part < whole:
        moved = whole + 2 * part
    elif name in PARTS:
        moved = 2 * whole
    elif name in ("expand", "expand_as", "broadcast_to") and part > whole:
        moved = whole + part
    else:
        return ()
    return (Call(side_of(given[0]), "vector", 0.0, moved),)


def vector_calls(call: Local) -> tuple[Call, ...]:
    """An operator bound by memory: every operand read, every output written; backward by what torch runs for it."""
    name = op_name(call.node)
    if name == "embedding":
        return embedding_calls(call)
    moved = call.moved
    if name == "cross_entropy_loss":
        moved += 2.0 * call.sizes[0]  # its log-softmax is written and read again
    if "dropout" in name:
        moved += mask(call)
    found = [Call(FORWARD, "vector", 0.0, moved)]
    if any(flows((call.node, i)) for i in range(len(call.results))):
        gradients = norm_calls if "norm" in name else all_gradient_calls
        found += gradients(call, name)
    return tuple(found)


def all_gradient_calls(call: Local, name: str) -> list[Call]:
    return [c for i in range(len(call.reads)) if flows(call.reads[i]) for c in gradient_calls(call, name, i)]


def norm_calls(call: Local, name: str) -> list[Call]:
    """A fused norm's backward: one kernel for its input, one for its weight and bias, each reading input and gradient."""
    read, found = float(call.sizes[0]) + call.result, []
    if flows(call.reads[0]):
        found.append(Call(side_of(call.reads[0]), "vector", 0.0, read + call.sizes[0]))
    if any(flows(v) for v in call.reads[1:]):
        found.append(Call(WEIGHTS, "vector", 0.0, read))
    return found


def embedding_calls(call: Local) -> tuple[Call, ...]:
    found = [Call(FORWARD, "vector", 0.0, 2 * call.result)]
    if flows(call.reads[0]):
        found.append(Call(side_of(call.reads[0]), "vector", 0.0, 2.0 * call.sizes[0] + call.result))
    return tuple(found)


def mask(call: Local) -> float:
    """Bytes of a dropout's boolean mask."""
    return float(numel(call.made[0]))


def gradient_calls(call: Local, name: str, position: int) -> list[Call]:
    """The gradient of one operand: the output's gradient and what was saved are read, the operand's is written; what was
    broadcast is summed."""
    size, result, side = float(call.sizes[position]), call.result, side_of(call.reads[position])
    broadcast = numel(call.given[position]) < numel(call.made[0]) and name not in ("cat", "stack", "sum", "mean")
    if name in FREE_BACKWARD or (name == "sub" and position == 0):
        return [Call(side, "vector", 0.0, result + size)] if broadcast and name not in ("pad", "repeat") else []
    if name == "cross_entropy_loss":
        return [Call(side, "vector", 0.0, 3 * size)]  # its log-softmax read, the gradient written, then scaled in place
    if name == "pow":
        return [Call(side, "vector", 0.0, POW_BACKWARD * size)]
    if name == "mean":
        return [Call(side, "vector", 0.0, size + result)]
    read = result + saved_bytes(call, name, position)
    if not broadcast:
        return [Call(side, "vector", 0.0, read + size)]
    return [Call(side, "vector", 0.0, read + result), Call(side, "vector", 0.0, result + size)]


def saved_bytes(call: Local, name: str, position: int) -> float:
    """Bytes of saved tensors that the gradient of one operand reads."""
    if "dropout" in name:
        return mask(call)
    kept = kept_by(call.node)
    if name in ("mul", "div", "true_divide"):
        return float(sum(call.sizes[i] for i in kept.operands if i != position or name != "mul"))
    return float(sum(call.sizes[i] for i in kept.operands) + sum(call.results[i] for i in kept.outputs))
