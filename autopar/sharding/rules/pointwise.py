"""Pointwise operators, with broadcasting: any dim may be split; the linear ones pass partial sums on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.ir.ops import operands
from autopar.sharding.call import arguments, broadcast, frozen, input_shapes, letters, shape, term
from autopar.sharding.example import Spec, example, integers, tensor, truths
from autopar.sharding.rule import rule

aten = torch.ops.aten

# Operators linear in a single operand, in all operands together, in each of two operands.
_SINGLE = {"neg", "positive", "real", "imag"}
_JOINT = {"add", "sub", "rsub"}
_EACH = {"mul", "multiply"}


def base_name(target: Any) -> str:
    """``add`` of ``aten.add_.Tensor``."""
    return target._schema.name.split("::")[1].rstrip("_")


def _marks(node: fx.Node) -> tuple[list[str], str]:
    """The tags of operands and output."""
    name, count, bound = base_name(node.target), len(operands(node)), arguments(node)
    none = [""] * count, ""
    if name in _SINGLE or (name in _EACH and count == 1):
        return ["~"] * count, "~"
    if name in _JOINT:
        return (["~"] * count, "~") if count == 2 else none
    if name in _EACH:
        return ["~1", "~2"], "~"
    if name in ("div", "divide", "true_divide"):
        keeps = isinstance(bound["self"], fx.Node) and bound.get("rounding_mode") is None
        return (["~", ""][:count], "~") if keeps else none
    if name == "where":
        values = [bound["self"], bound["other"]]
        linear = all(isinstance(v, fx.Node) or v == 0 for v in values)
        return (["", *["~"] * (count - 1)], "~") if linear and count > 1 else none
    if name == "masked_fill":
        return (["~", ""], "~") if bound["value"] in (0, False) else none
    return none


@rule(
    torch.Tag.pointwise,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.true_divide.Tensor,
    aten.multiply.Tensor,
    aten.subtract.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.min.other,
    aten.max.other,
    aten.softplus.default,
    aten.prelu.default,
    aten.clamp.default,
    aten.relu6.default,
    aten.elu.default,
    aten.selu.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.floor_divide.default,
    aten.complex.default,
    aten.polar.default,
    aten.real.default,
    aten.imag.default,
    aten.fill.Scalar,
    examples=[
        example(aten.polar.default, tensor(4, 6, positive=True), tensor(4, 6)),
        example(aten.real.default, Spec((4, 6), torch.complex128)),
        example(aten.mul.Tensor, Spec((4, 6), torch.complex128), Spec((1, 6), torch.complex128)),
        example(aten.add.Tensor, tensor(2, 4, 6), tensor(6), alpha=2),
        example(aten.add.Tensor, tensor(2, 1, 6), tensor(4, 1)),
        example(aten.add.Tensor, tensor(2, 6), 1.5),
        example(aten.mul.Tensor, tensor(2, 4, 6), tensor(2, 1, 6), patterns={"a2": {(2, 4)}}),
        example(aten.mul.Tensor, tensor(2, 6), 0.5),
        example(aten.mul.Tensor, tensor(4, 6), tensor()),
        example(aten.div.Tensor, tensor(4, 6), tensor(6)),
        example(aten.div.Tensor_mode, tensor(4, 6), tensor(6), rounding_mode="floor"),
        example(aten.sub.Tensor, tensor(4, 6), tensor(4, 6)),
        example(aten.rsub.Scalar, tensor(4, 6), 2.0),
        example(aten.neg.default, tensor(4, 6)),
        example(aten.gelu.default, tensor(4, 6), approximate="tanh"),
        example(aten.silu.default, tensor(4, 6)),
        example(aten.pow.Tensor_Scalar, tensor(4, 6), 2),
        example(aten.rsqrt.default, tensor(4, 6, positive=True)),
        example(aten.where.self, truths(4, 6), tensor(6), tensor(4, 1)),
        example(aten.where.ScalarOther, truths(4, 6), tensor(4, 6), 0.0),
        example(aten.where.ScalarOther, truths(4, 6), tensor(4, 6), -3.0),
        example(aten.masked_fill.Scalar, tensor(4, 6), truths(1, 6), -9.0),
        example(aten.masked_fill.Scalar, tensor(4, 6), truths(1, 6), 0.0),
        example(aten.le.Tensor, integers(4, 1, high=9), integers(6, high=9)),
        example(aten.__and__.Tensor, truths(4, 1), truths(6)),
        example(aten.prelu.default, tensor(4, 1), tensor(1)),
        example(aten.addcmul.default, tensor(4, 6), tensor(4, 6), tensor(6), value=2.0),
        example(aten.softplus.default, tensor(4, 6)),
    ],
)
def pointwise(node: fx.Node) -> str:
    """``prelu`` alone is no broadcast: its weight belongs to dim 1."""
    names = letters(len(shape(node)))
    out = ["1" if n == 1 else x for n, x in zip(shape(node), names, strict=True)]
    marks, made = _marks(node)
    terms = [term(broadcast(s, names), m) for s, m in zip(input_shapes(node), marks, strict=True)]
    if base_name(node.target) == "prelu" and input_shapes(node)[1] != (1,):
        terms[1] = names[1]
    return f"{', '.join(terms)} -> {term(out, made)}"


def _linear_cast(node: fx.Node) -> bool:
    """Rounding to another float type aside, a cast is linear unless it truncates."""
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return target.is_floating_point or (target == source and target != torch.bool)


@rule(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.to.prim_Device,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.bernoulli.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    examples=[
        example(aten.to.dtype, tensor(4, 6), torch.float64),
        example(aten.to.dtype, integers(4, 6, high=5), torch.float64),
        example(aten.to.dtype, tensor(4, 6), torch.int64),
        example(aten.type_as.default, tensor(4, 6), tensor(2, 5)),
        example(aten.type_as.default, tensor(4, 6), tensor(4, 6)),
        example(aten.contiguous.default, tensor(4, 6)),
        example(aten.clone.default, tensor(4, 6)),
        example(aten.dropout.default, tensor(4, 6), 0.0, True),
        example(aten.dropout.default, tensor(4, 6), 0.5, False),
        example(aten.zeros_like.default, tensor(4, 6)),
        example(aten.full_like.default, tensor(4, 6), 2.0),
    ],
)
def copies(node: fx.Node) -> str:
    """One tensor in, one of its shape out. A real dropout is not linear: partial sums would need one mask. A second
    operand gives its type alone, but has to be somewhere: split along where it has the same shape."""
    names, bound, name = letters(len(shape(node))), arguments(node), base_name(node.target)
    if "dropout" in name:
        linear = not bound["train"] or bound["p"] == 0
        names = letters(len(names)) if name == "dropout" else frozen(names, range(len(names)))
    else:
        linear = not name.endswith("_like") and name != "bernoulli" and _linear_cast(node)
    mark = "~" if linear else ""
    others = [
        term(names) if s == shape(node) else term(f"x{i}!" for i in range(len(s))) for s in input_shapes(node)[1:]
    ]
    return f"{', '.join([term(names, mark), *others])} -> {term(names, mark)}"
