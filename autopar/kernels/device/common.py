"""What launches have in common: dtypes, devices, shared memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may take, by compute capability (CUDA C++ programming guide, table "technical
specifications per compute capability": 163, 99, 99, 227 and 227 KiB)."""


@triton.jit
def tanh(x):
    """From an exponential that cannot overflow."""
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):
    """From an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


_TYPES = {torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's dtype for sums: float32, float64 for float64."""
    return _TYPES.get(dtype, tl.float32)


def precision(dtype: torch.dtype) -> str:
    """How matrix products of float32 are rounded: as torch's own are told to."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on a device."""
    if device.type != "cuda":
        return SHARED_MEMORY[80]
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@cache
def programs(device: torch.device) -> int:
    """Programs that keep a device busy where each walks over many rows: four a multiprocessor."""
    if device.type != "cuda":
        return 8
    return 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)
