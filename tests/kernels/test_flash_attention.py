"""Flash attention, forward and backward, against attention written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopar import kernels
from autopar.errors import KernelError
from tests.kernels.checks import EXACT, PRODUCTS, compared, draw, error, everywhere, running

SLOPES = 2.0 ** -torch.arange(1, 5).double()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "window on both sides": {"window": 9},
    "prefix": {"causal": True, "prefix": torch.tensor([40, 3])},
    "prefix and window": {"causal": True, "window": 9, "prefix": torch.tensor([20, 3])},
    "alibi": {"causal": True, "slopes": SLOPES},
    "soft cap": {"causal": True, "softcap": 1.5},
    "later queries": {"causal": True, "offset": 23},
    "earlier queries see nothing": {"causal": True, "offset": -20},
    "all": {"causal": True, "window": 30, "softcap": 2.0, "offset": 5, "scale": 0.3, "slopes": SLOPES},
}


def written(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None = None, prefix: Tensor | None = None,
    scale: float | None = None, causal: bool = False, window: int = 0, softcap: float = 0.0, offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition; the log-sum-exp of nothing is −∞ and its mixture zero."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    far = torch.arange(query.shape[2])[:, None] + offset - torch.arange(key.shape[2])
    seen = far >= 0 if causal else torch.ones_like(far, dtype=torch.bool)
    seen = seen & (far.abs() < window) if window else seen
    if prefix is not None:
        seen = seen | (torch.arange(key.shape[2]) < prefix.view(-1, 1, 1, 1))
    if slopes is not None:
        scores = scores - slopes.view(1, -1, 1, 1) * far
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores.detach(), -1, keepdim=True)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0))
    total = p.sum(-1)
    p = p / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return p @ value, total.log() + lse.squeeze(-1).masked_fill(lse.squeeze(-1) == -torch.inf, 0.0)


def finite(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The mixture, and exp(lse): a gradient through both, also where the log-sum-exp is −∞."""
    return pair[0], pair[1].clamp_min(-1e30).exp()


def operands(length: int, keys: int, width: int, dtype: torch.dtype = torch.float64, kv: int = 2) -> list[Tensor]:
    of_values = width if width != 20 else 12
    return [
        draw(2, 4, length, width, dtype=dtype),
        draw(2, kv, keys, width, seed=1, dtype=dtype),
        draw(2, kv, keys, of_values, seed=2, dtype=dtype),
    ]


@everywhere
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_forward_and_backward(where: str, options: dict[str, Any]) -> None:
    """Odd lengths, fewer key heads, values of another width, and gradients of the log-sum-exp."""
    made = compared(
        lambda *x: finite(kernels.flash_attention(*x, **options)), lambda *x: finite(written(*x, **options)),
        operands(37, 45, 20), where,
    )  # fmt: skip
    assert max(made) < EXACT


@everywhere
@pytest.mark.parametrize("options", ["plain", "causal", "window", "alibi", "prefix", "earlier queries see nothing"])
def test_without_a_gradient_of_the_log_sum_exp(where: str, options: str) -> None:
    """The way every model takes; on the CPU it is torch's own fused kernel."""
    given = OPTIONS[options]
    made = compared(
        lambda *x: kernels.flash_attention(*x, **given)[0],
        lambda *x: written(*x, **given)[0],
        operands(37, 45, 16),
        where,
    )
    assert max(made) < EXACT


@everywhere
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 50), (33, 1), (64, 64)], ids=str)
@pytest.mark.parametrize("kv", [1, 4])
def test_other_lengths_and_numbers_of_key_heads(where: str, length: int, keys: int, kv: int) -> None:
    given = {"causal": True, "offset": keys - length}
    made = compared(
        lambda *x: kernels.flash_attention(*x, **given)[0], lambda *x: written(*x, **given)[0],
        operands(length, keys, 16, kv=kv), where,
    )  # fmt: skip
    assert max(made if keys > 1 else (made[0], made[3])) < EXACT  # of one key, scores have no gradient


@everywhere
@pytest.mark.parametrize("options", ["causal", "alibi"])
@pytest.mark.parametrize("turned", [0, 1, 2, 3])
def test_operands_and_gradients_whose_last_dim_is_not_dense(where: str, options: str, turned: int) -> None:
    """Such as keys that were transposed twice; the last case is the gradient that comes in."""

    def made(attention: Any) -> Any:
        def call(*x: Tensor) -> Tensor:
            given = [t.mT.contiguous().mT if i == turned else t for i, t in enumerate(x)]
            out = attention(*given, **OPTIONS[options])[0]
            return out.mT.contiguous().mT if turned == 3 else out

        return call

    errors = compared(made(kernels.flash_attention), made(written), operands(24, 24, 16, kv=4), where)
    assert max(errors) < EXACT


@everywhere
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_head_sizes(where: str, width: int) -> None:
    for dtype in (torch.float64, torch.float16):
        q, k, v = (x[:1, :2] for x in operands(20, 37, width, dtype))
        made = compared(
            lambda *x: kernels.flash_attention(*x, causal=True, offset=17)[0],
            lambda *x: written(*x, causal=True, offset=17)[0],
            [q, k, v],
            where,
        )
        assert max(made) < (EXACT if dtype == torch.float64 else PRODUCTS[dtype])


@everywhere
@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_large_scores_stay_finite(where: str, dtype: torch.dtype) -> None:
    """Scores near 2,000, whose exponentials no dtype holds."""
    q, k, v = operands(20, 20, 16, dtype)
    made = compared(
        lambda q, k, v: kernels.flash_attention(q * 20, k * 20, v, causal=True)[0],
        lambda q, k, v: written(q * 20, k * 20, v, causal=True)[0], [q, k, v], where,
    )  # fmt: skip
    assert max(made) < (5e-3 if dtype == torch.float32 else 0.2)
    assert made[0] < 10 * PRODUCTS[dtype]


@everywhere
def test_queries_that_see_nothing_get_zeros_and_give_no_gradient(where: str) -> None:
    q, k, v = (x.requires_grad_() for x in operands(10, 12, 16))
    with running(where):
        out, lse = kernels.flash_attention(q, k, v, causal=True, offset=-4)
        out.sum().backward()
    assert not out[:, :, :4].any() and (lse[:, :, :4] == -torch.inf).all() and lse[:, :, 4:].isfinite().all()
    assert q.grad is not None and not q.grad[:, :, :4].any() and k.grad is not None and k.grad.isfinite().all()


@everywhere
@pytest.mark.parametrize("options", ["plain", "causal", "window", "window on both sides", "alibi", "packed all"])
def test_packed_sequences_attend_within_themselves(where: str, options: str) -> None:
    given = {**OPTIONS, "packed all": {**OPTIONS["all"], "offset": 0}}[options]
    ours, theirs = [0, 5, 5, 38, 50], [0, 20, 23, 60, 61]
    starts, key_starts = (torch.tensor(x, dtype=torch.int32) for x in (ours, theirs))
    q, k, v = draw(1, 4, 50, 16), draw(1, 2, 61, 16, seed=1), draw(1, 2, 61, 16, seed=2)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat(
            [
                written(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], **given)[0]
                for a, b, c, d in zip(ours, ours[1:], theirs, theirs[1:], strict=False)
            ],
            2,
        )

    made = compared(
        lambda *x: kernels.flash_attention(
            *x, query_starts=starts, key_starts=key_starts, longest=33, **given
        )[0],
        apart, [q, k, v], where,
    )  # fmt: skip
    assert max(made) < EXACT


@everywhere
def test_parts_of_the_keys_make_the_whole_as_a_ring_does(where: str) -> None:
    """Four parts of the keys, each with its own place; merged by their log-sum-exps. Backward part by part, from the merged
    result, and by autograd through the merging."""
    q, k, v = operands(24, 40, 16)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = written(*whole, causal=True, offset=16)
    grad = draw(*out.shape, seed=9)
    want = torch.autograd.grad(out, whole, grad)
    with running(where):
        parts = [(k[:, :, i : i + 10], v[:, :, i : i + 10], 16 - i) for i in range(0, 40, 10)]
        made = kernels.merge([kernels.flash_attention(q, a, b, causal=True, offset=o) for a, b, o in parts])
        back = [
            kernels.flash_attention_backward(grad, None, q, a, b, *made, causal=True, offset=o) for a, b, o in parts
        ]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        pieces = [(leaves[1][:, :, i : i + 10], leaves[2][:, :, i : i + 10], 16 - i) for i in range(0, 40, 10)]
        merged, _ = kernels.merge(
            [kernels.flash_attention(leaves[0], a, b, causal=True, offset=o) for a, b, o in pieces]
        )
        through = torch.autograd.grad(merged, leaves, grad)
    assert error(made[0], out) < EXACT and error(made[1], lse) < EXACT
    ring = sum(b[0] for b in back), torch.cat([b[1] for b in back], 2), torch.cat([b[2] for b in back], 2)
    assert max(error(a, b) for a, b in zip(ring, want, strict=True)) < EXACT  # type: ignore[arg-type]
    assert max(error(a, b) for a, b in zip(through, want, strict=True)) < EXACT


@everywhere
def test_heads_may_lie_behind_the_length_in_memory(where: str) -> None:
    made = compared(
        lambda *x: kernels.flash_attention(*(t.transpose(1, 2) for t in x), causal=True)[0],
        lambda *x: written(*(t.transpose(1, 2) for t in x), causal=True)[0],
        [draw(2, 9, 4, 16), draw(2, 9, 2, 16, seed=1), draw(2, 9, 2, 16, seed=2)],
        where,
    )
    assert max(made) < EXACT


def test_the_result_lies_as_the_output_projection_reads_it() -> None:
    out, _ = kernels.flash_attention(*operands(9, 9, 16))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": draw(2, 3, 8, 16), "value": draw(2, 3, 8, 16)}, "the key's heads divide the query's"),
        ({"slopes": draw(3)}, "one slope for each of 4 heads"),
        ({"prefix": torch.tensor([1, 2])}, "beside causal=True"),
        ({"query_starts": torch.tensor([0, 8])}, "packed sequences need both starts, a batch of 1"),
        ({"query": draw(4, 8, 16)}, r"operands are \(batch, heads, length, width\)"),
    ],
    ids=["heads", "slopes", "prefix", "starts", "dims"],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"query": draw(2, 4, 8, 16), "key": draw(2, 2, 8, 16), "value": draw(2, 2, 8, 16)}
    with pytest.raises(KernelError, match=message):
        kernels.flash_attention(**(given | change))


def test_the_interpreter_refuses_products_of_bfloat16() -> None:
    with running("triton"), pytest.raises(KernelError, match="bfloat16"):
        kernels.flash_attention(*operands(8, 8, 16, torch.bfloat16))
