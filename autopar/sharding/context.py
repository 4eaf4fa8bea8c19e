"""Splitting sequences over cp: which strategies a node has along it, and which values are whole there by nature.

Along cp only dims that grow with the sequence are split. Parameters, and what is made of them alone, are whole, and their
gradients stay partial sums: they are summed with those of the replicas. What is made of batch inputs, buffers and
constants alone (positions, masks, shifted labels) is computed whole, and each device cuts its part from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir.context import ALL_TO_ALL, RING, ContextAttention
from autopar.ir.ops import operands
from autopar.ir.program import OUTER, Program
from autopar.sharding.call import arguments, shape
from autopar.sharding.placement import Placement, R, S
from autopar.sharding.rule import strategies
from autopar.sharding.strategy import Strategy

SDPA = torch.ops.aten.scaled_dot_product_attention.default
FLASH = "autopar::flash_attention"
OPTIONS = ("scale", "causal", "window", "softcap", "longest", "dropout", "flash")
TENSORS = ("mask", "slopes", "prefix", "query_starts", "key_starts")


@dataclass(frozen=True)
class Nature:
    """Nodes of one graph that are whole along cp: ``free`` of the model's values, or ``weights`` and what is made of them."""

    free: frozenset[fx.Node]
    weights: frozenset[fx.Node]

    @property
    def whole(self) -> frozenset[fx.Node]:
        return self.free | self.weights


def nature(name: str, graph: fx.Graph) -> Nature:
    """What of a graph is whole along cp. In a block, what its callers hand in may be either: the solver decides."""
    free: set[fx.Node] = set()
    weights: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            kind = node.meta["kind"]
            if kind == "parameter":
                weights.add(node)
            elif kind != "input" or name == OUTER:
                free.add(node)
        elif node.op == "call_function":
            given = node.all_input_nodes
            if all(n in free for n in given):
                free.add(node)
            elif all(n in weights or n in free for n in given) and not grows(node):
                weights.add(node)
    return Nature(frozenset(free), frozenset(weights))


def dims_of(node: fx.Node, index: int = 0) -> tuple[frozenset[str], ...]:
    """For each dim of a node's output, which of batch and sequence its size depends on."""
    found = node.meta.get("dims", ())
    nested = isinstance(node.meta.get("val"), (tuple, list))
    return tuple(found[index]) if nested and found else tuple(found)


def grows(node: fx.Node) -> bool:
    """Whether some output of a node grows with the sequence."""
    value = node.meta.get("val")
    count = len(value) if isinstance(value, (tuple, list)) else 1
    return any("sequence" in d for i in range(count) for d in dims_of(node, i))


def splittable(node: fx.Node, placement: Placement, batch: int, index: int = 0) -> bool:
    """Whether a placement is a split of the sequence, of every sequence where several are laid end to end."""
    if not placement.sharded:
        return True
    depends = dims_of(node, index)[placement.dim]
    if "sequence" not in depends:
        return False
    if "batch" in depends and batch > 1:
        return len(placement.pieces) == batch and len(set(placement.pieces)) == 1
    return not placement.pieces


def fitted(placement: Placement, node: fx.Node, batch: int, index: int = 0) -> Placement:
    """A placement found at one micro-batch, at another: sequences laid end to end are split each."""
    if not placement.sharded:
        return placement
    value = node.meta["val"]
    size = (value[index] if isinstance(value, (tuple, list)) else value).shape[placement.dim]
    each = "batch" in dims_of(node, index)[placement.dim] and batch > 1
    return S(placement.dim, (size // batch,) * batch if each else ())


def options(
    node: fx.Node, degree: int, kind: str, nature: Nature, batch: int, patterns: Mapping[fx.Node, Any]
) -> list[Strategy]:
    """The strategies of an operator along cp. ``kind``: how attention is computed where it can be (`autopar.ir.context`)."""
    if node in nature.whole:
        return strategies(node, degree, patterns)[:1]
    special = attention(node, degree, kind)
    if special is not None:
        return [special]
    given = operands(node)

    def allowed(s: Strategy) -> bool:
        pairs = zip(given, s.inputs, strict=True)
        inside = all(splittable(n, p, batch) and not (p.sharded and n in nature.weights) for n, p in pairs)
        return inside and not s.special and all(splittable(node, p, batch, i) for i, p in enumerate(s.outputs))

    return [s for s in strategies(node, degree, patterns) if allowed(s)]


# ------------------------------------------------------------------ attention


def attention(node: fx.Node, degree: int, kind: str) -> Strategy | None:
    """The strategy of a fused attention call along cp; None where it is none, or cannot be split so.

    A ring takes everything but packed sequences and dropout; the all-to-all everything whose key heads divide.
    """
    bound = call(node)
    if bound is None or not same_sequence(bound):
        return None
    chosen = kind if can(bound, degree, kind) else RING if can(bound, degree, RING) else ALL_TO_ALL
    if not can(bound, degree, chosen):
        return None
    held = {"query": S(2), "key": S(2), "value": S(2)}
    if chosen == RING and bound.get("mask") is not None and shape(bound["mask"])[-2] != 1:
        held["mask"] = S(len(shape(bound["mask"])) - 2)
    inputs = tuple(held.get(name, R) for name in order(bound))
    outputs = (S(2), S(2)) if isinstance(node.meta["val"], (tuple, list)) else (S(2),)
    return Strategy(inputs, outputs, chosen)


def order(bound: Mapping[str, Any]) -> list[str]:
    """The names of a call's tensor operands in the order in which `ContextAttention` takes them."""
    return [n for n in ("query", "key", "value", *TENSORS) if isinstance(bound.get(n), fx.Node)]


def call(node: fx.Node) -> dict[str, Any] | None:
    """A fused attention call's operands and options by the names of `ContextAttention`; None for anything else, or where
    more is read of it than the mixture."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    bound = arguments(node)
    if node.target is SDPA:
        bound |= {"mask": bound["attn_mask"], "causal": bound["is_causal"], "dropout": bound["dropout_p"]}
    elif schema.name == FLASH and not bound["offset"] and all(u.args[1] == 0 for u in node.users):
        bound["flash"] = True
    else:
        return None
    found = {
        n: bound[n] for n in ("query", "key", "value", *TENSORS, *OPTIONS) if bound.get(n) not in (None, False, 0, 0.0)
    }
    return found if written(node, found) else None


def written(node: fx.Node, found: Mapping[str, Any]) -> bool:
    """Whether the call's operands stand in the order in which `order` names them (duplicates kept)."""
    return operands(node) == [found[n] for n in order(found)]


def same_sequence(bound: Mapping[str, Any]) -> bool:
    """Whether queries, keys and values are four-dimensional and of one sequence."""
    given = [bound[n] for n in ("query", "key", "value")]
    if any(len(shape(n)) != 4 or dims_of(n)[2] != frozenset({"sequence"}) for n in given):
        return False
    mask = bound.get("mask")
    return len({shape(n)[2] for n in given}) == 1 and not (mask is not None and mask.meta["requires_grad"])


def can(bound: Mapping[str, Any], degree: int, kind: str) -> bool:
    if kind == RING:
        return bound.get("query_starts") is None and not bound.get("dropout")
    return shape(bound["key"])[1] % degree == 0 and shape(bound["value"])[1] == shape(bound["key"])[1]


def zigzags(program: Program, degree: int) -> bool:
    """Whether sequences can be split in zigzag order: in twice as many chunks as there are devices."""
    lengths = {
        node.meta["val"].shape[d]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.meta["kind"] == "input"
        for d, depends in enumerate(dims_of(node))
        if depends == frozenset({"sequence"})
    }
    return all(n % (2 * degree) == 0 for n in lengths)


def target(strategy: Strategy, degree: int, zigzag: bool) -> ContextAttention:
    """The call that a special strategy along cp becomes."""
    return ContextAttention(strategy.special, degree, zigzag)
