"""The activations of MLPs; the gated ones apply theirs to the gate."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021, Primer)."""
    return torch.square(F.relu(x))


_FUNCTIONS = {
    "relu": F.relu,
    "relu2": _relu2,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
    "reglu": F.relu,
}


def activate(name: str, x: Tensor) -> Tensor:
    """The activation ``name`` of a DecoderSpec, elementwise (of a gated one: what it does to the gate)."""
    return _FUNCTIONS[name](x)
