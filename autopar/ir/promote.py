"""A model in float64 throughout: explicit casts to float32 become casts to float64, dropout is off.

transformers' norms and rotary embeddings cast to float32 whatever the model's dtype, so a model moved to float64 is good
to 1e-8 only. A proof runs (and traces) both sides under this mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

F = torch.nn.functional
LOWER = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
DROPOUTS = {F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout}
CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class Promoted(TorchFunctionMode):
    """While active: no function makes a floating tensor below float64, and nothing is dropped."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in CASTS:
            return args[0].double()
        if func in DROPOUTS:
            return args[0]
        if func is F.scaled_dot_product_attention:
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        args = tuple(promoted(a) for a in args)
        return func(*args, **{k: promoted(v) for k, v in kwargs.items()})


def promoted(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOWER else value
