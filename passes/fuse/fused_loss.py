"""fused_loss: the output layer and the cross-entropy of its logits in one kernel that never holds the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autopar import kernels  # noqa: F401 (registers the operator)
from autopar.ir.ops import Linear, argument, view
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.fuse.parts import CASTS, COPIES, aten, cast_to, clean, is_node, maker, number, place, value

SHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
SUM = 2
"""aten's number of the reduction."""


class Unlike(Exception):  # noqa: N818
    """This is no output layer and loss that the kernel can express: why."""


@dataclass(frozen=True)
class Found:
    """Logits are ``cap · tanh(factor · linear / cap)``, or without a cap ``factor · linear``."""

    linear: Linear
    factor: float
    cap: float


class FusedLoss(Pass):
    """``cross_entropy(linear(x), labels)``, summed, becomes one kernel: of the size of the logits, (tokens, vocabulary), nothing
    is kept, forward or backward. A scale or a soft cap of the logits goes along.

    The vocabulary may be split over devices as before: what is summed up are two numbers a token. A loss that the kernel cannot
    express, or logits that are read elsewhere, stay, with a line in the history.
    """

    name: ClassVar[str] = "fused_loss"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        for name, graph in program.graphs():
            for node in list(graph.nodes):
                if is_node(node, aten.cross_entropy_loss.default):
                    try:
                        fuse(graph, node, found(node))
                    except Unlike as why:
                        program.history.append(
                            f"{self.name}: the loss in {place(name, node)} is left as written: {why}"
                        )
        clean(program)


def found(loss: fx.Node) -> Found:
    """The output layer above a loss. Raises `Unlike`."""
    logits, labels = loss.args[0], loss.args[1]
    if argument(loss, 2) is not None or argument(loss, 5):
        raise Unlike("its classes are weighted or its labels smoothed")
    if argument(loss, 3) != SUM:
        raise Unlike("it is no sum over the tokens")
    if value(logits).dim() != 2 or value(labels).is_floating_point():
        raise Unlike(
            f"its logits have {value(logits).dim()} dims, not (tokens, classes), or its labels are probabilities"
        )
    return layer(logits)  # type: ignore[arg-type]


def layer(node: fx.Node) -> Found:
    """From logits up to the linear layer, through views, casts, scales and a soft cap."""
    classes, factor, cap = str(value(node).shape[-1]), 1.0, 0.0
    while True:
        if len(node.users) > 1:
            raise Unlike(f"its logits are read elsewhere too ({node.name})")
        seen = view(node)
        if isinstance(seen, Linear) and is_node(node, aten.linear.default):
            return Found(seen, factor, cap)
        args: Any = node.args
        if is_node(node, *SHAPES, *CASTS, *COPIES) and str(value(args[0]).shape[-1]) == classes:
            pass
        elif is_node(node, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) and number(args[1]):
            factor *= float(args[1]) if "mul" in str(node.target) else 1.0 / float(args[1])
        elif is_node(node, aten.tanh.default) and not cap:
            cap = factor
        else:
            raise Unlike(f"its logits are no linear layer's own ({node.name})")
        node = args[0]


def fuse(graph: fx.Graph, loss: fx.Node, what: Found) -> None:
    with graph.inserting_before(loss):
        make = maker(graph, what.linear.node)
        rows, width = value(loss.args[0]).shape[0], value(what.linear.x).shape[-1]
        x, weight, bias = what.linear.x, what.linear.weight, what.linear.bias
        if value(x).dim() != 2:
            x = make(aten.reshape.default, x, [rows, width])
        if abs(what.factor - 1.0) > 1e-12:  # a cap c divides by c and multiplies by c again
            x = make(aten.mul.Tensor, x, what.factor)
            bias = None if bias is None else make(aten.mul.Tensor, bias, what.factor)
        made = make(
            torch.ops.autopar.linear_cross_entropy.default,
            x, weight, loss.args[1], bias, argument(loss, 4), abs(what.cap),
        )  # fmt: skip
        made = cast_to(make, made, value(loss).dtype)
    loss.replace_all_uses_with(made)
