"""A shrunk mixture stays one: fewer, smaller experts, the same rules."""

from __future__ import annotations

from autopar.models.shrink import EXPERTS, shrink


def test_experts_shrink_with_their_model():
    moe = {
        "experts": 64,
        "top": 8,
        "ffn": 1024,
        "shared": 2048,
        "shared_gate": True,
        "normalize": False,
        "dense_layers": 3,
    }
    given = dict(family="mixtral", layers=32, hidden=2048, ffn=8192, heads=16, vocab=32000, moe=moe)
    small = shrink(given).decoder
    assert (small.moe.experts, small.moe.top, small.moe.dense_layers) == (EXPERTS, EXPERTS // 2, 1)
    assert small.moe.ffn * 32 <= 1024 * 2 and small.moe.shared == 2 * small.moe.ffn
    assert small.moe.shared_gate and not small.moe.normalize
