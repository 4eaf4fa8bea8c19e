"""The dtype in which a parameter is read: what its devices need to gather of it, where they keep a share in a wider one."""

from __future__ import annotations

import torch
from torch import fx

HALF = (torch.bfloat16, torch.float16)


def read_dtype(place: fx.Node) -> str | None:
    """The half precision that every reader of a parameter's placeholder casts it to first; None where one reads it as it is."""
    cast = {u.args[1] if u.target is torch.ops.aten.to.dtype else None for u in place.users}
    if len(cast) != 1:
        return None
    found = next(iter(cast))
    return str(found).removeprefix("torch.") if found in HALF and found != place.meta["val"].dtype else None
