"""The lines that make a module's parameters and buffers, and the names of what they make."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

import torch
from torch import fx, nn

from autopar.sharding.placement import Placement, local_shape

TAKEN = {*keyword.kwlist, *dir(nn.Module()), "tp", "cp", "recompute", "blocks", "body", "count", "attention_core"}
"""What an emitted module has or means already: none of its tensors may be called that."""


def attribute_names(graph: fx.Graph) -> dict[str, str]:
    """The attribute that holds each parameter, buffer and constant of a graph, by the tensor's name."""
    places = [n for n in graph.nodes if n.op == "placeholder" and n.meta["kind"] != "input"]
    return unlike(n.meta["name"] for n in places)


def unlike(names: Iterable[str]) -> dict[str, str]:
    """Names as Python attributes, unlike ones unlike: ``q.weight`` is ``q_weight``, and ``q_weight`` then ``q_weight_2``."""
    found: dict[str, str] = {}
    used = set(TAKEN)
    for name in dict.fromkeys(names):
        wish = re.sub(r"\W", "_", name)
        wish = wish if wish.isidentifier() else f"p_{wish}"
        text, count = wish, 1
        while text in used:
            count += 1
            text = f"{wish}_{count}"
        used.add(text)
        found[name] = text
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def declaration(name: str, node: fx.Node, where: Placement, degree: int, trainable: bool) -> str:
    """``self.q_weight = nn.Parameter(torch.empty(32, 64))  # (64, 64) S(0)``."""
    value = node.meta["val"]
    shape = local_shape(where, tuple(value.shape), degree)
    dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
    empty = f"torch.empty({', '.join(map(str, shape)) or '()'}{dtype})"
    note = f"  # {where} of {tuple(value.shape)}" if where.sharded else ""
    if node.meta["kind"] == "parameter":
        flag = "" if trainable else ", requires_grad=False"
        return f"self.{name} = nn.Parameter({empty}{flag}){note}"
    return f'self.register_buffer("{name}", {empty}, persistent=False){note}'
