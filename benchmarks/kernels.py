"""Kernels against the same written in torch, forward and backward: Triton's on a GPU, the references on a CPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import Row, Times, compared, options, report
from torch import Tensor

from autopar import kernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH, LENGTH, HEADS, KV_HEADS, HEAD, FFN, CLASSES = (
    (4, 4096, 32, 8, 128, 14336, 128256) if CUDA else (2, 256, 8, 2, 64, 1408, 8192)
)
WIDTH = HEADS * HEAD
Side = Callable[[], Tensor]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_()


def attention() -> tuple[Side, Side]:
    q, k, v = leaf(BATCH, HEADS, LENGTH, HEAD), leaf(BATCH, KV_HEADS, LENGTH, HEAD), leaf(BATCH, KV_HEADS, LENGTH, HEAD)
    theirs = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    return lambda: kernels.flash_attention(q, k, v, causal=True)[0], theirs


def norm() -> tuple[Side, Side]:
    x, weight = leaf(BATCH, LENGTH, WIDTH), leaf(WIDTH)

    def written() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    return lambda: kernels.rms_norm(x, weight, 1e-6), written


def rotary() -> tuple[Side, Side]:
    x, turn = leaf(BATCH, HEADS, LENGTH, HEAD), torch.rand(1, 1, LENGTH, HEAD, device=DEVICE)
    cos, sin = turn.cos().to(DTYPE), turn.sin().to(DTYPE)

    def written() -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return lambda: kernels.rotary(x, cos, sin), written


def gate() -> tuple[Side, Side]:
    gated, up = leaf(BATCH, LENGTH, FFN), leaf(BATCH, LENGTH, FFN)
    return lambda: kernels.glu(gated, up, "silu"), lambda: F.silu(gated) * up


def loss() -> tuple[Side, Side]:
    x, weight = leaf(BATCH * LENGTH, WIDTH), leaf(CLASSES, WIDTH)
    labels = torch.randint(CLASSES, (BATCH * LENGTH,), device=DEVICE)
    theirs = lambda: F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")  # noqa: E731
    return lambda: kernels.linear_cross_entropy(x, weight, labels), theirs


CASES = {
    "causal attention": attention, "RMS norm": norm, "rotary positions": rotary, "SwiGLU": gate, "output layer and loss": loss,
}  # fmt: skip


def measured(sides: dict[str, Side], rounds: int) -> Times:
    """Seconds of forward and backward of each side, in turn."""
    times: Times = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, run in sides.items():
            start = time.perf_counter()
            run().sum().backward()
            if CUDA:
                torch.cuda.synchronize()
            if i > 1:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> int:
    given = options(__doc__, rounds=20)
    print(f"forward and backward on {torch.cuda.get_device_name() if CUDA else 'the CPU'}, {DTYPE}")
    rows: list[Row] = []
    for name, make in CASES.items():
        torch.manual_seed(0)
        ours, theirs = make()
        times = measured({"ours": ours, "torch": theirs}, given.rounds)
        rows.append(compared(name, times, "ours", "torch", 3.0))
    return report(rows, given.check)


if __name__ == "__main__":
    sys.exit(main())
