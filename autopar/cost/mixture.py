"""The work of a mixture of experts: a few matrix products for the tokens of each expert.

How tokens fall on experts is not known before they are there: every expert is taken to get as many as the others, which is
what a balanced router comes to and what published runs report (Fedus et al. 2022, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autopar.cost.values import flows, op_name, parameter, reads, tensor
from autopar.sharding.call import arguments

Shape = tuple[int, ...]
Product = tuple[int, int, int, int]


def is_mixture(node: fx.Node) -> bool:
    return op_name(node) == "routed_experts"


@dataclass(frozen=True)
class Mixture:
    """One call on one device: experts there, the tokens of each, hidden and inner width, and the matrices up to the
    activation (2 with a gate)."""

    experts: int
    tokens: int
    hidden: int
    ffn: int
    first: int

    @property
    def pairs(self) -> int:
        """(token, expert) pairs that are computed."""
        return self.experts * self.tokens

    @property
    def flops(self) -> float:
        """FLOPs of the forward: 2 for each entry of an expert's matrices and token."""
        return 2.0 * self.pairs * self.hidden * self.ffn * (self.first + 1)

    @property
    def products(self) -> list[Product]:
        """(count, rows, columns, depth) of the forward's products."""
        into = (self.experts * self.first, self.tokens, self.ffn, self.hidden)
        return [into, (self.experts, self.tokens, self.hidden, self.ffn)]


def scratch(node: fx.Node, given: list[Shape], itemsize: int) -> tuple[float, float]:
    """Bytes that a call takes for itself while it runs, forward and backward: gathered rows, the activation, rows before
    they are summed; then the gradients of all of these (`autopar.kernels.experts`)."""
    made = mixture(node, given)
    every = given[2][0] * given[2][1]  # pairs, here or not: rows are summed in the tokens' order
    forward = made.pairs * (2 * made.hidden + made.ffn) + every * made.hidden
    backward = made.pairs * (3 * made.hidden + (made.first + 2) * made.ffn) + every * made.hidden
    return float(itemsize * forward), float(itemsize * backward)


def mixture(node: fx.Node, given: list[Shape]) -> Mixture:
    """The call with operands of these shapes on one device, in the order of `reads`."""
    names = [name for name, value in arguments(node).items() if isinstance(value, fx.Node)]
    shape = dict(zip(names, given, strict=True))
    every = tensor(reads(node)[names.index("numbers")]).shape[0]
    tokens, top = shape["chosen"]
    experts, ffn, hidden = shape["up"]
    return Mixture(experts, max(1, tokens * top // every), hidden, ffn, 2 if "gate" in shape else 1)


def trained(node: fx.Node) -> tuple[bool, bool]:
    """Whether gradients flow to the activations, and to the weights."""
    given = [v for v in reads(node) if flows(v)]
    return any(parameter(v) is None for v in given), any(parameter(v) is not None for v in given)
