"""What kernels become on a device, without one: registers, spills, shared memory, tensor-core instructions.

Kernels are launched on meta tensors; each launch is caught and compiled for the wanted compute capability instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopar.errors import KernelError
from autopar.kernels.backend import installed

TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync)\b")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: the function, its arguments by name, its options (warps, stages)."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a launch. ``spilled``: bytes of registers a thread keeps in memory; ``shared`` in bytes."""

    name: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: tuple[str, ...]


def launches(run: Callable[[], Any]) -> list[Launch]:
    """The launches that ``run`` makes on meta tensors; none of them happens."""
    found: list[Launch] = []
    with _caught(found):
        run()
    return found


@contextlib.contextmanager
def _caught(found: list[Launch]) -> Iterator[None]:
    if not installed():
        raise KernelError("kernels: Triton is not installed; `pip install triton` to compile its kernels")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("kernels: unset TRITON_INTERPRET to compile kernels; interpreted ones are not")
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {k: v for k, v in named.items() if k in self.arg_names}
        found.append(Launch(self, arguments, {k: v for k, v in named.items() if k not in self.arg_names}))

    before = JITFunction.run
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = before  # type: ignore[method-assign]


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for a compute capability (80, 90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialized(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**launch.options, "enable_fp_fusion": True}
    )
    registers, spilled = usage(made.asm["cubin"])
    found = tuple(sorted(set(TENSOR_CORES.findall(made.asm["ptx"]))))
    return Compiled(launch.kernel.__name__, registers, spilled, made.metadata.shared, found)


def specialized(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and attributes of the arguments as Triton's own launcher finds them: ones are constants, pointers and
    multiples of 16 are known to be aligned."""
    from triton.runtime.jit import mangle_type

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of memory it uses beside them, as cuobjdump prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
