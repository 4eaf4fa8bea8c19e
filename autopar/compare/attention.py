"""Attention as a graph has it: heads, keys and values, positions, what is added to the scores, in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.compare.walk import before, elements, narrowest, source
from autopar.cost.operators import is_attention
from autopar.cost.values import op_name, tensors
from autopar.ir.attention import PRODUCTS, SOFTMAX, Core, cores


@dataclass(frozen=True)
class Heads:
    """One attention: how many query heads, how many of keys, their sizes, and what lies between product and softmax."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_elements: int  # of keys and values together, for one token
    rotary: str  # "", "half" or "interleaved"
    rotated: int  # entries of a head that turn
    tables: int  # tables of cos and sin that it reads
    biased: bool  # each head adds a bias of its own to its scores
    soft_cap: bool
    fused: bool
    softmax: torch.dtype
    causal: fx.Node | bool | None  # the mask's node where it decides

    @property
    def text(self) -> str:
        """``grouped-query, 32 query and 8 key-value heads of 128``."""
        if self.kv_heads == self.heads:
            return f"multi-head, {self.heads} heads of {self.head_dim}"
        kind = "multi-query" if self.kv_heads == 1 else "grouped-query"
        return f"{kind}, {self.heads} query and {self.kv_heads} key-value heads of {self.head_dim}"


def attentions(graph: fx.Graph, tokens: int, batch: int) -> list[Heads]:
    """Every attention of a graph over ``tokens`` = batch · length tokens."""
    return [heads(core, tokens, batch) for core in cores_of(graph)]


def heads(core: Core, tokens: int, batch: int) -> Heads:
    query, key, value, softmax, masks = parts(core)
    shape = tensors(query)[0].shape
    width = shape[-1]
    count = elements(query) // (tokens * width)
    keys, values = narrowest(key) // tokens, narrowest(value) // tokens
    style, rotated, tables = rotation(query, width)
    inside = {n for n in core.nodes if n is not core.output}
    return Heads(
        heads=count,
        kv_heads=keys // width,
        head_dim=width,
        kv_elements=keys + values,
        rotary=style,
        rotated=rotated,
        tables=tables,
        biased=any(headed(m, count, batch) for m in masks),
        soft_cap=any(op_name(n) == "tanh" for n in inside),
        fused=is_attention(softmax),
        softmax=tensors(softmax)[0].dtype,
        causal=causality(softmax, masks),
    )


def cores_of(graph: fx.Graph) -> list[Core]:
    """The attention cores of a graph; a softmax over experts or classes between two products is none."""
    return [
        core
        for core in cores(graph)
        if fused(core) is not None or _square(next(n for n in core.nodes if n.target in SOFTMAX))
    ]


def fused(core: Core) -> fx.Node | None:
    """The fused call, where attention is one operator."""
    return next((n for n in core.nodes if n.op == "call_function" and is_attention(n)), None)


def _square(softmax: fx.Node) -> bool:
    shape = tensors(softmax)[0].shape
    return len(shape) >= 3 and shape[-1] == shape[-2]


def parts(core: Core) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, list[fx.Node]]:
    """Query, key, value, the softmax (or the fused call), and what is added to or masks the scores."""
    call = fused(core)
    if call is not None:
        query, key, value = call.all_input_nodes[:3]
        return query, key, value, call, [m for m in [_argument(call, 3, "attn_mask")] if isinstance(m, fx.Node)]
    softmax = next(n for n in core.nodes if n.target in SOFTMAX)
    first = next(n for n in core.nodes if n.target in PRODUCTS)
    operands = first.all_input_nodes
    query, key = operands[-2:]
    value = core.output.all_input_nodes[-1]
    between = [n for n in core.nodes if op_name(n) in ("add", "where", "masked_fill")]
    added = [o for n in between for o in n.all_input_nodes if o not in core.nodes]
    return query, key, value, softmax, [*added, *operands[:-2]]


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def rotation(query: fx.Node, width: int) -> tuple[str, int, int]:
    """How queries turn between their projection and the scores: style, entries of a head, tables they read."""
    nodes = {n for n in near(query) if n.op == "call_function"}
    if not any(op_name(n) == "neg" for n in nodes):
        return "", 0, 0
    strided = any(op_name(n) == "slice" and _step(n) == 2 for n in nodes)
    turned = [n for n in nodes if op_name(n) == "mul" and len(n.all_input_nodes) == 2]
    tables = {source(o) for n in turned for o in n.all_input_nodes}
    tables = {t for t in tables if t.meta.get("kind") != "parameter" and not _projected(t)}
    size = max((int(tensors(n)[0].shape[-1]) for n in turned), default=width)
    return ("interleaved" if strided else "half"), min(size, width) * max(1, len(tables) // 2), len(tables)


def _projected(node: fx.Node) -> bool:
    """Whether a value comes from tokens: tables come from positions alone."""
    return any(n.meta.get("kind") == "parameter" for n in before([node]))


def near(node: fx.Node) -> set[fx.Node]:
    """What a query is made of, back to its projection."""
    found, stack = set(), [node]
    while stack:
        here = stack.pop()
        if here not in found and op_name(here) not in ("linear", "matmul", "addmm", "mm"):
            found.add(here)
            stack += here.all_input_nodes
    return found


def headed(mask: fx.Node, heads: int, batch: int) -> bool:
    """Whether a mask differs from head to head."""
    shape = tuple(tensors(mask)[0].shape)
    if heads == 1 or len(shape) < 3:
        return False
    return shape[-3] == heads or (len(shape) == 3 and shape[0] == batch * heads)


def causality(softmax: fx.Node, masks: list[fx.Node]) -> fx.Node | bool | None:
    """True where a flag says causal; else the node of the mask that may be; None without any."""
    if is_attention(softmax) and _argument(softmax, 5, "is_causal") is True:
        return True
    square = [m for m in masks if tensors(m)[0].dim() >= 2 and tensors(m)[0].shape[-1] == tensors(m)[0].shape[-2]]
    return square[-1] if square else None


def _step(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("step", 1)
