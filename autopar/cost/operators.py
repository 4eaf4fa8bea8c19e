"""The work of one operator call on one device: FLOPs, bytes moved, and what autograd keeps for its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autopar.cost.precision import Precision
from autopar.cost.values import flows, is_view, numel, op_name, parameter, reads, tensor, tensors
from autopar.sharding.placement import Placement, local_shape

Shape = tuple[int, ...]

PRODUCTS = {  # operator → positions (among its tensor operands) of the two factors
    "linear": (0, 1), "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1),
    "addmm": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "einsum": (0, 1),
    "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1), "convolution": (0, 1),
    "conv_transpose1d": (0, 1), "conv_transpose2d": (0, 1), "conv_transpose3d": (0, 1), "bilinear": (0, 1),
}  # fmt: skip
ATTENTION_BACKWARD = 2.5  # five matrix products for two: Dao et al. 2022, FlashAttention, algorithm 4
CAUSAL = 0.5  # a fused causal kernel skips the masked half: Dao 2023, FlashAttention-2, section 3.1
NO_GRADIENT_WORK = frozenset(
    [
        "add",
        "sub",
        "neg",
        "sum",
        "mean",
        "cat",
        "stack",
        "to",
        "clone",
        "contiguous",
        "reshape",
        "flatten",
        "pad",
        "type_as",
    ]
)
KEEPS_OUTPUT = frozenset(
    [
        "softmax",
        "log_softmax",
        "sigmoid",
        "tanh",
        "exp",
        "sqrt",
        "rsqrt",
        "relu",
        "reciprocal",
        "logsigmoid",
        "cumsum",
        "expm1",
        "tan",
        "elu",
        "logsumexp",
    ]
)
KEEPS_NOTHING = NO_GRADIENT_WORK | frozenset(
    [
        "sub",
        "rsub",
        "add",
        "dropout",
        "one_hot",
        "zeros_like",
        "ones_like",
        "full_like",
        "avg_pool1d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "repeat",
        "repeat_interleave",
        "roll",
        "flip",
        "tril",
        "triu",
        "lift_fresh_copy",
        "copy",
        "round",
        "floor",
        "ceil",
        "sign",
        "cumsum",
        "index_select",
        "gather",
    ]
)
INDEXING = frozenset(
    ["embedding", "index", "gather", "index_select", "take_along_dim", "nll_loss", "scatter", "index_add"]
)


@dataclass(frozen=True)
class Work:
    """Work of one call on one device. ``kind``: matmul, attention, vector (memory-bound) or free. FLOPs and bytes of the forward,
    of the gradients of activations, and of the gradients of weights."""

    kind: str
    flops: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bytes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Kept:
    """What autograd saves: positions of operands and outputs, of operands it keeps something of the same shape for
    (``like``), and bytes beside them (masks, statistics; of the whole tensors, not the local ones)."""

    operands: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    extra: float = 0.0
    like: tuple[int, ...] = ()


FREE = Work("free")


def local_shapes(
    node: fx.Node, inputs: tuple[Placement, ...], outputs: tuple[Placement, ...], degree: int
) -> tuple[list[Shape], list[Shape]]:
    """Shapes of the operands and outputs on one device."""
    given = [local_shape(p, tuple(tensor(v).shape), degree) for v, p in zip(reads(node), inputs, strict=True)]
    made = [local_shape(p, tuple(t.shape), degree) for t, p in zip(tensors(node), outputs, strict=False)]
    return given, made


def is_attention(node: fx.Node) -> bool:
    """A fused attention call: query, key and value as its first operands."""
    return "attention" in op_name(node) and len(reads(node)) >= 3 and all(tensor(v).dim() >= 3 for v in reads(node)[:3])


def is_product(node: fx.Node) -> bool:
    return is_attention(node) or op_name(node) in PRODUCTS


def products(node: fx.Node, given: list[Shape], made: list[Shape]) -> float:
    """FLOPs (2 per multiply-add) of a product's forward at these shapes; attention as written, not halved."""
    name = op_name(node)
    if is_attention(node):
        q, k, v = given[:3]
        return 2.0 * numel(q[:-1]) * k[-2] * (q[-1] + v[-1])
    a, b = PRODUCTS[name]
    if name.startswith("conv"):
        return 2.0 * numel(made[0]) * numel(given[b][1:])
    if name == "einsum":
        return 2.0 * einsum_size(str(node.args[0]), given)
    return 2.0 * numel(made[0]) * given[a][-1]


def einsum_size(equation: str, shapes: list[Shape]) -> float:
    """The product of the lengths of all indices; an ellipsis counts with the first operand that has one."""
    sizes: dict[str, int] = {}
    for part, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=False):
        letters = list(part.replace("...", "." * (len(shape) - len(part.replace("...", "")))))
        for i, (letter, size) in enumerate(zip(letters, shape, strict=False)):
            key = f".{i}" if letter == "." else letter
            sizes[key] = max(sizes.get(key, 1), size)
    return float(numel(tuple(sizes.values())))


def work(
    node: fx.Node, inputs: tuple[Placement, ...], outputs: tuple[Placement, ...], degree: int, precision: Precision
) -> Work:
    """What one device does for a node under these placements."""
    if node.op != "call_function" or not tensors(node) or is_view(node) or skipped_dropout(node):
        return FREE
    given, made = local_shapes(node, inputs, outputs, degree)
    sizes = [numel(s) * precision.itemsize(tensor(v).dtype) for s, v in zip(given, reads(node), strict=True)]
    results = [numel(s) * precision.itemsize(t.dtype) for s, t in zip(made, tensors(node), strict=False)]
    dtype = precision.running(tensors(node)[0].dtype)
    if is_product(node):
        return product_work(node, given, made, sizes, sum(results), dtype)
    return vector_work(node, sizes, results, dtype)


def product_work(
    node: fx.Node, given: list[Shape], made: list[Shape], sizes: list[int], result: float, dtype: torch.dtype
) -> Work:
    flops, moved, wanted = products(node, given, made), float(sum(sizes)) + result, reads(node)
    if is_attention(node):
        flops *= CAUSAL if is_causal(node) else 1.0
        back = ATTENTION_BACKWARD * flops if any(flows(v) for v in wanted[:3]) else 0.0
        return Work("attention", (flops, back, 0.0), (moved, 2 * moved if back else 0.0, 0.0), dtype)
    f, b = [0.0, 0.0], [0.0, 0.0]
    for position in PRODUCTS[op_name(node)]:
        if position < len(wanted) and flows(wanted[position]):
            side = 0 if parameter(wanted[position]) is None else 1
            f[side] += flops
            b[side] += moved
    for position, v in enumerate(wanted):
        if position not in PRODUCTS[op_name(node)] and flows(v):
            b[1] += result  # the gradient of a bias: a sum over the output's
    return Work("matmul", (flops, f[0], f[1]), (moved, b[0], b[1]), dtype)


def is_causal(node: fx.Node) -> bool:
    """Whether a fused attention call masks the future itself (a flag, not a mask)."""
    return node.kwargs.get("is_causal") is True or (len(node.args) > 5 and node.args[5] is True)


def vector_work(node: fx.Node, sizes: list[int], results: list[int], dtype: torch.dtype) -> Work:
    name, result = op_name(node), float(sum(results))
    wanted = reads(node)
    if name == "embedding":
        back = 2.0 * sizes[0] + result if flows(wanted[0]) else 0.0
        return Work("vector", bytes=(2 * result, 0.0, back), dtype=dtype)
    moved = float(sum(sizes)) + result
    if name == "cross_entropy_loss":
        moved += 2.0 * sizes[0]  # its log-softmax is written and read again
    if not any(flows((node, i)) for i in range(len(results))) or name in NO_GRADIENT_WORK - {"mean", "sum"}:
        return Work("vector", bytes=(moved, 0.0, 0.0), dtype=dtype)
    kept = kept_by(node)
    saved = sum(sizes[i] for i in kept.operands) + sum(results[i] for i in kept.outputs)
    back = [0.0, 0.0]
    for size, v in zip(sizes, wanted, strict=True):
        if flows(v):
            back[0 if parameter(v) is None else 1] += size + (result if name != "cross_entropy_loss" else size)
    back[0] += saved
    return Work("vector", bytes=(moved, back[0], back[1]), dtype=dtype)


def skipped_dropout(node: fx.Node) -> bool:
    """A dropout that returns its input: probability 0, or not training."""
    if "dropout" not in op_name(node):
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    train = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True)
    return bool(p == 0 or train is False)


# ------------------------------------------------------------------ what autograd keeps


def kept_by(node: fx.Node) -> Kept:
    """What a node keeps until its backward.

    Source: torch's ``derivatives.yaml``. An operator that is not known keeps its floating operands.
    """
    if node.op != "call_function" or is_view(node) or not any(flows((node, i)) for i in range(len(tensors(node)))):
        return Kept()
    name, given = op_name(node), reads(node)
    if is_attention(node):
        rows = numel(tuple(tensor(given[0]).shape[:-1]))
        return Kept(tuple(range(min(len(given), 4))), (0,), 4.0 * rows)
    if name in PRODUCTS:
        a, b = PRODUCTS[name]
        pairs = [(a, b), (b, a)] if max(a, b) < len(given) else []
        return Kept(tuple(sorted({keep for keep, other in pairs if flows(given[other])})))
    if "dropout" in name:
        return Kept() if skipped_dropout(node) else Kept(extra=float(tensors(node)[0].numel()))  # a boolean mask
    if name in KEEPS_OUTPUT:
        return Kept(outputs=(0,))
    if name in INDEXING:
        return Kept(tuple(i for i, v in enumerate(given) if i and not tensor(v).is_floating_point()))
    if name in KEEPS_NOTHING:
        return Kept()
    if name in ("layer_norm", "native_layer_norm", "rms_norm", "fused_rms_norm", "group_norm"):
        rows = numel(tuple(tensor(given[0]).shape[:-1]))
        return Kept((0,), (), 4.0 * rows * (1 if "rms" in name else 2))
    if name == "cross_entropy_loss":
        return Kept(like=(0,))  # its log-softmax
    if name in ("mul", "div", "true_divide"):
        return two_factors(name, node)
    if name in ("where", "masked_fill", "masked_scatter"):
        return Kept(tuple(i for i, v in enumerate(given) if tensor(v).dtype == torch.bool))
    return Kept(tuple(i for i, v in enumerate(given) if tensor(v).is_floating_point()))


def two_factors(name: str, node: fx.Node) -> Kept:
    given = reads(node)
    if len(given) < 2:
        return Kept()
    a, b = flows(given[0]), flows(given[1])
    if name == "mul":
        return Kept(tuple(sorted({1 for _ in [0] if a} | {0 for _ in [0] if b})))
    return Kept((0, 1) if b else (1,))
