"""The example batch: its sizes, its stand-in on the meta device, and which of its dims are symbols."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from autopar.errors import TraceError

BATCH, SEQUENCE = 3, 12
"""Example sizes while tracing; any two numbers of at least 2 that no model would treat apart. Symbols stay symbols."""


def sizes_of(example: dict[str, Any]) -> dict[str, int]:
    """``batch`` (dim 0 of the tensors) and, where there is one, ``sequence``: dim 1 of the first integer matrix."""
    tensors = [v for v in pytree.tree_leaves(example) if isinstance(v, torch.Tensor) and v.dim() > 0]
    if not tensors:
        raise TraceError("the batch holds no tensor; give a mapping of names to tensors with the batch as first dim")
    sizes = {"batch": int(tensors[0].shape[0])}
    two = [t for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    if two:
        sizes["sequence"] = int(two[0].shape[1])
    return sizes


def meaning_of(value: torch.Tensor, dim: int, sizes: dict[str, int]) -> str | None:
    """Whether a dim of an input is the batch's or the sequence's: by its place and its size in the example."""
    if dim == 0 and value.shape[0] == sizes["batch"]:
        return "batch"
    if dim > 0 and value.shape[dim] == sizes.get("sequence") and not value.is_floating_point():
        return "sequence"
    return None


def meta_inputs(example: dict[str, Any], sizes: dict[str, int], *, symbolic: bool) -> tuple[dict[str, Any], Any]:
    """The batch on the meta device, and export's dynamic shapes (None where the example's own sizes are fixed)."""

    def marks(value: Any) -> Any:
        dims = {d: meaning_of(value, d, sizes) for d in range(value.dim())} if isinstance(value, torch.Tensor) else {}
        return {d: torch.export.Dim.DYNAMIC for d, meaning in dims.items() if meaning} if dims else None

    wanted = {"batch": BATCH, "sequence": SEQUENCE} if symbolic else sizes
    return resized(example, sizes, wanted), pytree.tree_map(marks, example) if symbolic else None


def resized(example: dict[str, Any], sizes: dict[str, int], wanted: dict[str, int]) -> dict[str, Any]:
    """Meta tensors of the example's kind at other sizes."""

    def made(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        meanings = [meaning_of(value, d, sizes) for d in range(value.dim())]
        shape = [wanted[m] if m else int(size) for m, size in zip(meanings, value.shape, strict=True)]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return pytree.tree_map(made, example)


def symbols(graph: fx.Graph, sizes: dict[str, int]) -> dict[str, int]:
    """Every symbol of the program by name → its size in the example: ``s77`` → 3."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "input":
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found[str(size.node.expr)] = sizes["batch" if dim == 0 else "sequence"]
    return found
