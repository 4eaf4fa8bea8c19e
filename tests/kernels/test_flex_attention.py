"""flex_attention: the reference that CPUs run against torch's own flex_attention, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels import flash_attention, flex_attention
from autopar.kernels.flex import checked, through_flex


def operands(
    length: int = 10, keys: int = 10, heads: int = 4, kv: int = 2, width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = ((2, heads, length, width), (2, kv, keys, width), (2, kv, keys, width))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in (q, k, v))  # type: ignore[return-value]


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 9, 9]])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "both sides": {"window": 4},
    "offset": {"causal": True, "offset": 3},
    "prefix": {"causal": True, "prefix": torch.tensor([4, 0])},
    "documents": {"causal": True, "documents": DOCUMENTS},
    "documents and prefix": {"causal": True, "documents": DOCUMENTS, "prefix": torch.tensor([6, 2])},
    "alibi": {"causal": True, "slopes": SLOPES},
    "soft cap": {"softcap": 2.0},
    "all at once": {
        "causal": True,
        "window": 5,
        "slopes": SLOPES,
        "softcap": 3.0,
        "scale": 0.5,
        "documents": DOCUMENTS,
    },
    "seen": {"mask": random(2, 1, 10, 10) > 0.4},
    "seen by heads": {"mask": random(1, 4, 10, 10) > 0.4, "causal": True},
    "padding": {"mask": torch.arange(10) < torch.tensor([7, 10]).view(2, 1, 1, 1), "causal": True},
    "a row that sees nothing": {"mask": (torch.arange(10) != 4).view(1, 1, 10, 1).expand(1, 1, 10, 10)},
    "added": {"mask": random(1, 4, 1, 10)},
    "added after the cap": {"mask": 10 * random(2, 4, 10, 10), "softcap": 1.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_cpus_run_is_torchs_flex_attention(kind: str, heads: tuple[int, int]) -> None:
    q, k, v = operands(heads=heads[0], kv=heads[1])
    with torch.no_grad():
        theirs = through_flex(q, k, v, checked(q, k, v, **KINDS[kind]), compiled=False)
    torch.testing.assert_close(flex_attention(q, k, v, **KINDS[kind]), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_fewer_queries_than_keys() -> None:
    q, k, v = operands(length=3, keys=10)
    options: dict[str, Any] = {"causal": True, "offset": 7, "window": 4, "slopes": SLOPES}
    with torch.no_grad():
        theirs = through_flex(q, k, v, checked(q, k, v, **options), compiled=False)
    torch.testing.assert_close(flex_attention(q, k, v, **options), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["causal", "documents and prefix", "all at once", "a row that sees nothing", "added"])
def test_gradients_are_the_derivatives(kind: str) -> None:
    q, k, v = (x[..., :4].clone().requires_grad_() for x in operands())
    assert torch.autograd.gradcheck(lambda *x: flex_attention(*x, **KINDS[kind]), (q, k, v))


@pytest.mark.parametrize("kind", ["full", "causal", "window", "offset", "prefix", "alibi", "soft cap"])
def test_what_both_kernels_have_words_for_means_the_same(kind: str) -> None:
    q, k, v = operands()
    torch.testing.assert_close(flex_attention(q, k, v, **KINDS[kind]), flash_attention(q, k, v, **KINDS[kind])[0])


def test_shapes_are_known_without_values_and_wrong_ones_are_refused() -> None:
    q, k, v = operands()
    made = flex_attention(q.to("meta"), k.to("meta"), v[..., :3].to("meta"), causal=True, window=3)
    assert made.shape == (2, 4, 10, 3) and made.is_meta
    with pytest.raises(KernelError, match="a mask broadcasts to"):
        flex_attention(q, k, v, torch.ones(10, 10, dtype=torch.bool))
    with pytest.raises(KernelError, match="one document number for each token"):
        flex_attention(q, k, v, documents=torch.zeros(2, 9))
    with pytest.raises(KernelError, match="a prefix goes with causal=True"):
        flex_attention(q, k, v, prefix=torch.tensor([1, 2]))
    with pytest.raises(KernelError, match="heads divide the query's"):
        flex_attention(q[:, :3], k, v)
