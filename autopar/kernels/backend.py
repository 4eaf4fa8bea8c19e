"""Where a kernel runs: Triton on GPUs, a reference in plain torch elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache

import torch

from autopar.errors import KernelError

_interpreting = False


@cache
def installed() -> bool:
    """Whether Triton is there; it is imported when a kernel is launched, not before."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


def on_triton(x: torch.Tensor, products: bool = False) -> bool:
    """Whether a kernel for ``x`` is the Triton one: ``x`` lives on a GPU, or kernels are being interpreted.

    ``products``: it multiplies matrices. Triton's interpreter keeps bfloat16 as integers and multiplies these (3.9,
    `InterpreterBuilder.create_dot`); raises `KernelError` rather than return that.
    """
    if _interpreting and products and x.dtype == torch.bfloat16:
        raise KernelError("kernels: Triton's interpreter cannot multiply matrices of bfloat16; use float16")
    return _interpreting or (x.is_cuda and installed())


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run Triton kernels on CPU tensors, in Triton's interpreter: slow, for tests.

    The variable ``TRITON_INTERPRET=1`` must have been set before anything imported Triton; raises `KernelError` if not.
    """
    global _interpreting
    if not installed():
        raise KernelError("kernels: Triton is not installed; `pip install triton` to interpret its kernels")
    if os.environ.get("TRITON_INTERPRET") != "1" or not _interprets():
        raise KernelError("kernels: set TRITON_INTERPRET=1 before Triton is imported to interpret its kernels")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def _interprets() -> bool:
    from triton.language.standard import sigmoid  # made by @triton.jit when Triton was imported
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(sigmoid, InterpretedFunction)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()
