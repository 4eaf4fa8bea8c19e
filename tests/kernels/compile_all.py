"""Compiles every kernel for sm_80 and sm_90 without a GPU and prints what ptxas made of it; run by test_compiled."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from autopar.kernels import attention, report
from autopar.kernels.device import adamw, attention_launch, glu, loss, norm, paged, rotary

BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def flash(width: int, batch: int = 2, **options: Any) -> Callable[[], Any]:
    """Forward and backward at 4,096 tokens, 8 query heads over 2 key heads."""
    names = (
        "slopes",
        "prefix",
        "query_starts",
        "key_starts",
        "scale",
        "causal",
        "window",
        "softcap",
        "offset",
        "longest",
    )
    given = {"causal": False, "window": 0, "softcap": 0.0, "offset": 0, "longest": 0} | options
    query, key = meta(batch, 8, 4096, width), meta(batch, 2, 4096, width)

    def run() -> None:
        shape = attention.checked(query, key, key, *(given.get(n) for n in names))
        out, lse = attention.outputs(query, key)
        attention_launch.forward(query, key, key, shape, out, lse)
        attention_launch.backward(out, None, query, key, key, out, lse, shape)

    return run


def norms(width: int, centered: bool) -> Callable[[], Any]:
    x, weight = meta(4096, width), meta(width)

    def run() -> None:
        norm.forward(x, x, weight, weight if centered else None, 1e-6, centered)
        norm.backward(x, x, weight, 1e-6, centered, centered)

    return run


def gates() -> None:
    gate = meta(4096, 11008)
    for activation in ("silu", "gelu_tanh"):
        glu.forward(gate, gate, activation)
        glu.backward(gate, gate, gate, activation)


def losses() -> None:
    x, weight, labels = meta(4096, 4096), meta(128256, 4096), meta(4096, dtype=torch.int64)
    lse, _ = loss.forward(x, weight, labels, None, 0.0)
    loss.backward(lse, lse, x, weight, labels, None, 30.0, lse, True)


def turns() -> None:
    table = meta(1, 1, 4096, 128)
    rotary.turn(meta(2, 32, 4096, 128), table, table, False, False)
    rotary.turn(meta(2, 32, 4096, 192), table, table, True, True)


def pages(width: int) -> Callable[[], Any]:
    cache, number = meta(512, 16, 2, width), {"dtype": torch.int32}

    def run() -> None:
        table, lengths, starts = meta(4, 128, **number), meta(4, **number), meta(5, **number)  # type: ignore[arg-type]
        for longest in (1, 512):
            paged.attend(meta(4 * longest, 16, width), cache, cache, table, lengths, starts, 0.1, 0, 0.0, longest)

    return run


def step() -> None:
    wide = meta(1 << 20, dtype=torch.float32)
    adamw.step(wide, meta(1 << 20), wide, wide, 1, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, meta(1 << 20))


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for width in (64, 80, 96, 128, 256):
        yield f"attention {width}", flash(width, causal=True)
    starts = meta(3, dtype=torch.int32)
    packed = {"causal": True, "window": 1024, "query_starts": starts, "key_starts": starts, "longest": 2048}
    yield "attention 128, packed", flash(128, batch=1, **packed)
    slopes = meta(8, dtype=torch.float32)
    everything = {
        "causal": True,
        "window": 512,
        "softcap": 30.0,
        "slopes": slopes,
        "prefix": meta(2, dtype=torch.int32),
    }
    yield "attention 128, every option", flash(128, **everything)
    yield "rms norm", norms(8192, False)
    yield "layer norm", norms(4096, True)
    yield "gated units", gates
    yield "loss", losses
    yield "rotary", turns
    for width in (64, 80, 96, 128, 256):
        yield f"pages {width}", pages(width)
    yield "adamw", step


def main() -> None:
    for name, run in calls():
        for launch in report.launches(run):
            for capability in (80, 90):
                made = report.compiled(launch, capability)
                print(json.dumps({"call": name, "capability": capability, **dataclasses.asdict(made)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
