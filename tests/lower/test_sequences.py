"""Attention over sequences that are split over cp, on real processes: every mask, both orders, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from autopar.lower import sequences
from autopar.plan.plan import MeshShape
from autopar.runtime.spawn import spawn
from autopar.runtime.world import World

RANKS, LENGTH = 4, 16


def case(name: str) -> tuple[dict[str, Any], int]:
    """Options of the attention, and its key heads."""
    generator = torch.Generator().manual_seed(3)
    slopes = torch.rand(4, generator=generator, dtype=torch.float64)
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=generator, dtype=torch.float64) < 0.6
    return {
        "whole": ({}, 4),
        "causal": ({"causal": True}, 4),
        "grouped": ({"causal": True, "scale": 0.3}, 2),
        "alibi": ({"causal": True, "slopes": slopes}, 4),
        "alibi both ways": ({"slopes": slopes}, 4),
        "window": ({"causal": True, "window": 5}, 4),
        "window both ways": ({"window": 3}, 4),
        "soft cap": ({"causal": True, "softcap": 2.0}, 4),
        "prefix": ({"causal": True, "prefix": torch.tensor([7, 2])}, 4),
        "seen": ({"mask": seen | torch.eye(LENGTH, dtype=torch.bool)}, 4),
        "some see nothing": ({"mask": seen & (torch.arange(LENGTH) > 2).view(1, 1, -1, 1)}, 2),
        "added": ({"mask": torch.rand(1, 4, LENGTH, LENGTH, generator=generator, dtype=torch.float64)}, 4),
        "padding": ({"mask": torch.arange(LENGTH).view(1, 1, 1, -1) < torch.tensor([9, 16]).view(2, 1, 1, 1)}, 2),
    }[name]  # fmt: skip


CASES = ("whole", "causal", "grouped", "alibi", "alibi both ways", "window", "window both ways", "soft cap", "prefix",
         "seen", "some see nothing", "added", "padding")  # fmt: skip


def operands(keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, h, LENGTH, 6, generator=generator, dtype=torch.float64) for h in (4, keys, keys, 4)]


def reference(options: dict[str, Any], keys: int) -> list[torch.Tensor]:
    from autopar import kernels

    *given, weight = operands(keys)
    q, k, v = (x.requires_grad_() for x in given)
    if "mask" in options:
        mask = options["mask"]
        k2, v2 = (x.repeat_interleave(4 // keys, 1) for x in (k, v))
        scores = q @ k2.mT * 6**-0.5
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        out = scores.softmax(-1).nan_to_num(0.0) if mask.dtype == torch.bool else scores.softmax(-1)
        out = out @ v2
        (out * weight).sum().backward()
        return [out.detach(), *(x.grad.nan_to_num(0.0) for x in (q, k, v))]
    out, _ = kernels.flash_attention(q, k, v, **options)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v))]


def of_rank(kind: str, zigzag: bool) -> dict[str, list[torch.Tensor]]:
    """What this rank computes of every case, in whole tensors."""
    torch.set_default_dtype(torch.float64)
    cp = World.join(MeshShape(cp=RANKS)).group("cp")
    assert cp is not None
    found = {}
    for name in CASES:
        options, keys = case(name)
        if kind == "all_to_all" and (keys % RANKS or "prefix" in name):
            continue
        *given, weight = operands(keys)
        q, k, v = (sequences.own_part(x, 2, cp, zigzag=zigzag).clone().requires_grad_() for x in given)
        if kind == "ring":
            mask = options.get("mask")
            if mask is not None and mask.shape[-2] > 1:
                options["mask"] = sequences.own_part(mask, 2, cp, zigzag=zigzag)
            out = sequences.ring_attention(q, k, v, cp, **options, zigzag=zigzag)
        else:
            out = sequences.all_to_all_attention(q, k, v, cp, flash="mask" not in options, **options, zigzag=zigzag)
        (out * sequences.own_part(weight, 2, cp, zigzag=zigzag)).sum().backward()
        parts = [out.detach(), *(x.grad for x in (q, k, v))]
        found[name] = [sequences.whole(p, 2, cp, None, zigzag) for p in parts]
    dist.barrier()
    return found


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("kind", ["ring", "all_to_all"])
def test_attention_over_cp_equals_attention_over_whole_sequences(kind: str, zigzag: bool) -> None:
    made = spawn(of_rank, RANKS, kind, zigzag)[0]
    assert set(made) == (set(CASES) if kind == "ring" else {n for n in CASES if case(n)[1] == 4} - {"prefix"})
    for name, found in made.items():
        for what, a, b in zip(("mixture", "query", "key", "value"), found, reference(*case(name)), strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12), f"{name}: {what} is off by {(a - b).abs().max():.2e}"


@pytest.mark.parametrize("pieces", [None, (8, 8)])
def test_the_zigzag_order_is_undone(pieces: tuple[int, ...] | None) -> None:
    x = torch.arange(16 * 3).view(16, 3)
    mixed = sequences.shuffled(x, 0, pieces, 2)
    assert not torch.equal(mixed, x)
    assert torch.equal(sequences.unshuffled(mixed, 0, pieces, 2), x)


def test_causal_attention_in_zigzag_order_is_the_same_work_on_every_device() -> None:
    shape = {"causal": True, "window": 0}

    def work(rank: int, zigzag: bool) -> list[float]:
        pairs = [sequences.pairs(rank, p, 8, 4, zigzag, shape, False) for p in range(4)]
        return [sum(q[2] * k[2] * (0.5 if causal else 1.0) for q, k, causal, *_ in step) for step in pairs]

    assert {sum(work(r, True)) for r in range(4)} == {128.0}
    assert [sum(work(r, False)) for r in range(4)] == [32.0, 96.0, 160.0, 224.0]
