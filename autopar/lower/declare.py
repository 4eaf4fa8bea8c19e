"""The lines that make a module's parameters and buffers, and the names of what they make."""

from __future__ import annotations

import torch
from torch import fx

from autopar.sharding.placement import Placement, local_shape


def attribute(place: fx.Node) -> str:
    return attribute_name(place.meta["name"])


def attribute_name(name: str) -> str:
    text = name.replace(".", "_")
    return text if text.isidentifier() else f"p_{text}"


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
