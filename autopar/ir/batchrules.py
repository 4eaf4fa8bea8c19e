"""What every kind of operator does to the rows of a batch: the rules of `autopar.ir.mixing`."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.ir.batchshapes import (
    aligned,
    broadcast,
    dims_of,
    embedding,
    expanded,
    index,
    inserted,
    interleaved,
    joined,
    padded,
    permuted,
    pieces,
    repeated,
    reshaped,
    scattered,
    selected,
    sliced,
)
from autopar.ir.functions import FunctionCall
from autopar.ir.mixing import FREE, Call, Mixing, Value

aten = torch.ops.aten
Rule = Callable[[Call], Any]


def rule_of(node: fx.Node) -> Rule:
    target = node.target
    if isinstance(target, FunctionCall):
        return pointwise if target.pointwise else unknown
    if not isinstance(target, torch._ops.OpOverload):
        return unknown
    name = target._schema.name.split("::")[-1].strip("_")
    if target._schema.name == "autopar::glu":
        return pointwise  # aten's of that name halves one operand
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in target.tags else unknown


def unknown(call: Call) -> Value:
    raise Mixing("it is not known what this does to the batch")


# ------------------------------------------------------------------ entry by entry


def pointwise(call: Call) -> Value:
    """Results from the same place of every operand, broadcast; totals and averages pass where it is linear in them."""
    kinds = {call.value(n).kind for n in call.node.all_input_nodes}
    if kinds & {"total", "average"}:
        return linear_in_totals(call)
    return aligned(call, call.rows(merged=True), call.out.dim())


SAME = ("to", "clone", "alias", "detach", "neg", "contiguous", "positive", "to_copy", "lift_fresh_copy")


def linear_in_totals(call: Call) -> Value:
    """Sums of two totals, and totals times or over what is free; a mean times the number of sequences is a total."""
    target = call.node.target
    name = target._schema.name.split("::")[-1].strip("_") if isinstance(target, torch._ops.OpOverload) else ""
    given = [call.value(a) if isinstance(a, fx.Node) else number(call, a) for a in call.node.args[:2]]
    kinds = [v.kind for v in given]
    if name in SAME:
        return given[0]
    if name in ("add", "sub", "rsub") and len(kinds) == 2 and kinds[0] == kinds[1]:
        return given[0]
    if name == "mul" and "free" in kinds:
        value, factor = given if kinds[1] == "free" else given[::-1]
        if not factor.counted or value.kind == "average":
            return Value("total") if factor.counted else value
    if name == "div" and kinds[1] == "free" and (not given[1].counted or kinds[0] == "total"):
        return Value("average") if given[1].counted else given[0]
    raise Mixing("not linear in a sum over the batch")


def number(call: Call, value: Any) -> Value:
    """A plain number; a multiple of the batch's size counts the batch."""
    return Value("free", counted=isinstance(value, (int, float)) and value != 0 and value % call.batch == 0)


# ------------------------------------------------------------------ along dims


def reduced(kind: str | None) -> Rule:
    """A reduction: along other dims rows stay; along the rows it is a total, an average, or mixes (None)."""

    def rule(call: Call) -> Value:
        rows = call.rows(merged=True)
        source, value = rows[0]
        if len(rows) != 1 or source is not call.node.args[0]:
            return unknown(call)
        dims = dims_of(call, "dim", source)
        if value.dim in dims:
            if kind is None:
                raise Mixing("over the batch")
            return Value(kind)
        keep = call.named("keepdim", False)
        return call.kept(value.dim if keep else value.dim - sum(d < value.dim for d in dims), value.outer)

    return rule


def along(name: str) -> Rule:
    """An operator that works along one dim (softmax, cumsum, sort, gather), and keeps the shape of the rest."""

    def rule(call: Call) -> Value:
        rows = call.rows()
        for source, value in rows:
            if value.dim in dims_of(call, name, source):
                raise Mixing("along the batch")
        return aligned(call, rows, len(call.shape(rows[0][0])))

    return rule


def loss(call: Call) -> Value:
    """A loss with ``reduction``: 0 none, 1 mean, 2 sum; classes in dim 1, so rows are dim 0."""
    rows = call.rows()
    if any(v.dim != 0 for _, v in rows) or call.value(call.named("weight")).kind != "free":
        raise Mixing("sequences are not in the first dim")
    reduction = call.named("reduction", 1)
    return call.kept(0) if reduction == 0 else Value("average" if reduction == 1 else "total")


# ------------------------------------------------------------------ products


def linear(call: Call) -> Value:
    """Rows of x; the weight and bias are the same for all."""
    (source, value), *others = call.rows(merged=True)
    if others or source is not call.node.args[0]:
        raise Mixing("a weight made from the batch")
    if value.dim == len(call.shape(source)) - 1:
        raise Mixing("contracts the batch")
    return call.kept(value.dim, value.outer)


def matmul(call: Call) -> Value:
    a, b = call.node.args[-2:] if call.node.target is aten.baddbmm.default else call.node.args[:2]
    left, right = len(call.shape(a)), len(call.shape(b))  # type: ignore[arg-type]
    places = set()
    for n, v in call.rows():
        rank = len(call.shape(n))
        if (n is a and v.dim == rank - 1) or (n is b and v.dim == max(rank - 2, 0)):
            raise Mixing("contracts the batch")
        after = v.dim - rank + call.out.dim()
        places.add(after if not (n is a and right == 1) else v.dim - rank + 1 + call.out.dim())
        if n is b and left == 1 and v.dim < rank - 2:
            places = {p + 1 for p in places}
    if len(places) != 1:
        raise Mixing("sequences meet along two dims")
    return call.kept(places.pop())


def addmm(call: Call) -> Value:
    rows = call.rows()
    if any(n is call.node.args[2] for n, _ in rows) or any(n is call.node.args[1] and v.dim == 1 for n, v in rows):
        raise Mixing("contracts the batch")
    return aligned(call, rows, 2)


def einsum(call: Call) -> Value:
    equation, operands = str(call.node.args[0]).replace(" ", ""), call.node.args[1]
    terms, _, out = equation.partition("->")
    letters = set()
    for term, n in zip(terms.split(","), operands, strict=True):  # type: ignore[arg-type]
        value = call.value(n)
        if value.kind == "rows":
            letters.add(spelled(term, len(call.shape(n)))[value.dim])  # type: ignore[arg-type]
        elif value.kind != "free":
            call.rows()
    result = spelled(out, call.out.dim())
    if "->" not in equation or len(letters) != 1 or (letter := letters.pop()) not in result:
        raise Mixing("contracts the batch")
    return call.kept(result.index(letter))


def spelled(term: str, rank: int) -> str:
    """A term with its ellipsis written out in capitals, aligned to the right."""
    missing = rank - len(term.replace("...", ""))
    return term.replace("...", string.ascii_uppercase[26 - missing :] if missing else "")


def attention(call: Call) -> Value:
    """Heads, keys and values of one sequence; rows anywhere before the last two dims."""
    rows = call.rows()
    if any(v.dim >= len(call.shape(n)) - 2 for n, v in rows):
        raise Mixing("attends over the batch")
    return aligned(call, rows, call.out.dim())


# ------------------------------------------------------------------ norms and images


def first_dim(call: Call) -> Value:
    """Convolutions, pools, group and instance norms: dim 0 is the batch of both argument and result, weights are free."""
    (source, value), *others = call.rows()
    if others or source is not call.node.args[0] or value.dim != 0 or len(call.shape(source)) < 3:
        raise Mixing("sequences are not in the first dim")
    return call.kept(0)


def batch_norm(call: Call) -> Value:
    if call.named("training"):
        raise Mixing("statistics over the batch")
    return call.kept(call.rows()[0][1].dim)


def trailing_norm(call: Call) -> Value:
    """Layer and RMS norms over the last dims."""
    source, value = call.rows(merged=True)[0]
    if value.dim >= len(call.shape(source)) - len(call.named("normalized_shape", (None,))):
        raise Mixing("normalizes over the batch")
    return call.kept(value.dim, value.outer)


def norm_of_sum(call: Call) -> tuple[Value, Value]:
    """The norm of a sum over the last dim, and that sum."""
    rows = call.rows(merged=True)
    rank = len(call.shape(rows[0][0]))
    if any(n not in call.node.args[:2] or v.dim == rank - 1 for n, v in rows):
        raise Mixing("normalizes over the batch")
    both = aligned(call, rows, rank)
    return both, both


def rotary(call: Call) -> Value:
    """Heads of one sequence; tables may be its own."""
    rows = call.rows()
    if any(v.dim == 3 for _, v in rows):
        raise Mixing("turns over the batch")
    return aligned(call, rows, 4)


def flash_attention(call: Call) -> tuple[Value, Value]:
    """Attention of one sequence, and its log-sum-exps."""
    rows = call.rows()
    if any(v.dim != 0 for _, v in rows) or call.named("query_starts") is not None:
        raise Mixing("attends over the batch")
    return call.kept(0), call.kept(0)


def flex_attention(call: Call) -> Value:
    """Attention of one sequence; its mask may be its own."""
    if any(v.dim != 0 for _, v in call.rows()):
        raise Mixing("attends over the batch")
    return call.kept(0)


def routed_experts(call: Call) -> Value:
    """Every token by itself; experts are the same for all."""
    rows = call.rows(merged=True)
    if any(n not in call.node.args[:3] or v.dim for n, v in rows):
        raise Mixing("experts made from the batch")
    return aligned(call, rows, 2)


def linear_loss(call: Call) -> Value:
    """A sum over rows."""
    rows = call.rows()
    if any(v.dim != 0 or n not in (call.node.args[0], call.node.args[2]) for n, v in rows):
        raise Mixing("sequences are not in the first dim")
    return Value("total")


RULES: dict[str, Rule] = {
    **dict.fromkeys(("sum",), reduced("total")),
    **dict.fromkeys(("mean",), reduced("average")),
    **dict.fromkeys(
        ("amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "prod", "any", "all")
        + ("logsumexp", "linalg_vector_norm", "norm"),
        reduced(None),
    ),
    **dict.fromkeys(
        ("softmax", "log_softmax", "safe_softmax", "cumsum", "cumprod", "sort", "topk", "gather", "flip", "glu")
        + ("logcumsumexp", "argsort", "cummax", "cummin", "index_select"),
        along("dim"),
    ),
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"), loss),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"), loss),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss"), loss),
    "linear": linear,
    "fp8_linear": linear,
    "fp8_linear_delayed": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "baddbmm"), matmul),
    "addmm": addmm,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"), first_dim),
    **dict.fromkeys(
        ("conv_transpose3d", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"), first_dim
    ),
    **dict.fromkeys(("avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), first_dim),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "group_norm", "pixel_shuffle"), first_dim),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "pixel_unshuffle"), first_dim),
    "batch_norm": batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm", "fused_rms_norm"), trailing_norm),
    **dict.fromkeys(("add_layer_norm", "add_rms_norm"), norm_of_sum),
    "rotary": rotary,
    "flash_attention": flash_attention,
    "flex_attention": flex_attention,
    "linear_cross_entropy": linear_loss,
    "routed_experts": routed_experts,
    **dict.fromkeys(("view", "reshape", "unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), reshaped),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "swapaxes", "movedim"), permuted),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expanded),
    "broadcast_tensors": broadcast,
    "repeat": repeated,
    "repeat_interleave": interleaved,
    "slice": sliced,
    **dict.fromkeys(("slice_scatter", "select_scatter"), inserted),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split"), pieces),
    "select": selected,
    **dict.fromkeys(("cat", "concat", "stack"), joined),
    **dict.fromkeys(("pad", "constant_pad_nd"), padded),
    "embedding": embedding,
    "index": index,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scattered),
    **dict.fromkeys(
        ("dropout", "native_dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone"), pointwise
    ),
    **dict.fromkeys(
        ("detach", "alias", "to", "to_copy", "type_as", "lift_fresh_copy", "masked_fill", "where"), pointwise
    ),
    **dict.fromkeys(("and", "or", "xor", "softplus", "copy", "tril", "triu", "rrelu_with_noise"), pointwise),
    **dict.fromkeys(("ones_like", "zeros_like", "empty_like", "full_like", "new_ones", "new_zeros"), lambda call: FREE),
    **dict.fromkeys(("new_full", "new_empty", "rand_like", "randn_like"), lambda call: FREE),
}
