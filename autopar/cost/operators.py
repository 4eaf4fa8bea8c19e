"""The work of one operator call on one device: FLOPs, bytes moved, and what autograd keeps for its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autopar.cost.mixture import is_mixture, mixture
from autopar.cost.values import flows, is_view, numel, op_name, reads, tensor, tensors
from autopar.ir.context import ALL_TO_ALL, ContextAttention
from autopar.sharding.placement import Placement, local_shape

Shape = tuple[int, ...]

PRODUCTS = {  # operator → positions (among its tensor operands) of the two factors
    "linear": (0, 1), "fp8_linear": (0, 1), "fp8_linear_delayed": (0, 1), "linear_cross_entropy": (0, 1),
    "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1),
    "addmm": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "einsum": (0, 1),
    "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1), "convolution": (0, 1),
    "conv_transpose1d": (0, 1), "conv_transpose2d": (0, 1), "conv_transpose3d": (0, 1), "bilinear": (0, 1),
}  # fmt: skip
ATTENTION_BACKWARD = 2.5  # five matrix products for two: Dao et al. 2022, FlashAttention, algorithm 4
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
OVER_CP = ("own_part", "scatter_parts", "gather_parts", "gather_parts_sum", "reduce_scatter_parts", "exchange_parts",
           "all_reduce", "all_reduce_both")  # fmt: skip
KEEPS_NOTHING = frozenset(
    [
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
        *OVER_CP,
    ]
)
INDEXING = frozenset(
    ["embedding", "index", "gather", "index_select", "take_along_dim", "nll_loss", "scatter", "index_add"]
)


@dataclass(frozen=True)
class Kept:
    """What autograd saves: positions of operands and outputs, of operands it keeps something of the same shape for
    (``like``, or ``ratio`` times as much), and bytes beside them (masks, statistics; of the whole tensors, not the local
    ones)."""

    operands: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    extra: float = 0.0
    like: tuple[int, ...] = ()
    ratio: float = 1.0  # of each operand in ``like``


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
    return is_attention(node) or is_mixture(node) or op_name(node) in PRODUCTS


def products(node: fx.Node, given: list[Shape], made: list[Shape]) -> float:
    """FLOPs (2 per multiply-add) of a product's forward at these shapes; attention as written, not halved."""
    name = op_name(node)
    if is_attention(node):
        q, k, v = given[:3]
        return 2.0 * numel(q[:-1]) * k[-2] * (q[-1] + v[-1])
    if is_mixture(node):
        return mixture(node, given).flops
    a, b = PRODUCTS[name]
    if name == "linear_cross_entropy":
        return 2.0 * numel(given[a]) * given[b][0]
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


def is_causal(node: fx.Node) -> bool:
    """Whether a fused attention call masks the future itself (a flag, not a mask)."""
    if op_name(node) == "flex_attention" or isinstance(node.target, ContextAttention):
        return node.kwargs.get("causal") is True
    if op_name(node) == "flash_attention":
        return node.kwargs.get("causal") is True or (len(node.args) > 8 and node.args[8] is True)
    return node.kwargs.get("is_causal") is True or (len(node.args) > 5 and node.args[5] is True)


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
        if isinstance(node.target, ContextAttention) and node.target.kind == ALL_TO_ALL:
            return Kept((3,) if "mask" in node.kwargs else (), (), 4.0 * rows, (0, 1, 2, 0))  # with the heads split
        return Kept(tuple(range(min(len(given), 4))), (0,), 4.0 * rows)
    if is_mixture(node):
        return mixture_keeps(node)
    if name == "linear_cross_entropy":
        return Kept((0, 2), (), 4.0 * tensor(given[0]).shape[0])  # each row's log-sum-exp; logits are made again
    if name == "rotary":
        return Kept((1, 2))
    if name in ("add_rms_norm", "add_layer_norm"):
        return Kept((), (1,))
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


def mixture_keeps(node: fx.Node) -> Kept:
    """Operands; of the first products as much as the pairs' share of the weights they come from; where each pair is, and
    where each expert's end."""
    given = reads(node)
    made = mixture(node, [tuple(tensor(v).shape) for v in given])
    weights = tuple(range(4, 4 + made.first))
    return Kept((0, 1), (), 8.0 * (made.pairs + made.experts), weights, made.tokens / made.hidden)


def two_factors(name: str, node: fx.Node) -> Kept:
    given = reads(node)
    if len(given) < 2:
        return Kept()
    a, b = flows(given[0]), flows(given[1])
    if name == "mul":
        return Kept(tuple(sorted({1 for _ in [0] if a} | {0 for _ in [0] if b})))
    return Kept((0, 1) if b else (1,))
