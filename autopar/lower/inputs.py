"""What every entry of the batch must be, for the manifest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.lower.declare import dtype_name


def input_entry(node: fx.Node) -> dict[str, Any]:
    """What a batch entry must be. ``high``: integers are below it (rows of the table they are looked up in, classes)."""
    found: dict[str, Any] = {
        "shape": list(node.meta["val"].shape),
        "dtype": dtype_name(node.meta["val"].dtype),
        "batched": bool(node.meta["dims"]) and "batch" in node.meta["dims"][0],
    }
    high = limit(node)
    return found if high is None else {**found, "high": high}


def limit(node: fx.Node) -> int | None:
    """Rows of the tables an integer input is looked up in, or classes it is a label of, through views and shifts."""
    if node.meta["val"].is_floating_point():
        return None
    aten = torch.ops.aten
    through = {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.slice.Tensor,
        aten.pad.default,
        aten.contiguous.default,
    }
    for user in node.users:
        if user.target is aten.embedding.default and user.args[1] is node:
            return int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        if "linear_cross_entropy" in str(user.target) and user.args[2] is node:
            return int(user.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
        if user.target is aten.cross_entropy_loss.default and user.args[1] is node:
            logits = user.args[0].meta["val"].shape  # type: ignore[union-attr]
            return int(logits[1] if len(logits) > 1 else logits[0])
        if user.target in through and (found := limit(user)) is not None:
            return found
    return None
