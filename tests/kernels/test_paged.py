"""Attention over pages against attention over the same keys in a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar import kernels
from autopar.errors import KernelError
from tests.kernels.checks import EXACT, PRODUCTS, draw, error, everywhere, running


def pages(
    lengths: list[int], page: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache in which the pages of the sequences lie mixed; what is in no sequence is infinite."""
    most = max(-(-n // page) for n in lengths)
    order = torch.randperm(most * len(lengths) + 2, generator=torch.Generator().manual_seed(1))
    table = order[: most * len(lengths)].view(len(lengths), most).int()
    keys, values = (draw(len(order), page, kv_heads, width, seed=i, dtype=dtype) for i in (0, 1))
    return keys, values, table


def exact(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: list[int],
    counts: list[int],
    window: int,
    cap: float,
) -> Tensor:
    out, begin = [], 0
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        q = query[begin : begin + count].double().transpose(0, 1)
        k, v = (x[table[s]].flatten(0, 1)[:length].double().transpose(0, 1) for x in (keys, values))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        scores = q @ k.mT / query.shape[-1] ** 0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        far = torch.arange(length - count, length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((far < 0) | ((far >= window) if window else False), -torch.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += count
    return torch.cat(out)


def both(
    where: str, lengths: list[int], counts: list[int], window: int = 0, cap: float = 0.0, width: int = 20,
    dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (4, 2), page: int = 16,
) -> float:  # fmt: skip
    keys, values, table = pages(lengths, page, heads[1], width, dtype)
    query = draw(sum(counts), heads[0], width, seed=2, dtype=dtype)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    with running(where):
        made = kernels.paged_attention(
            query, keys, values, table, torch.tensor(lengths, dtype=torch.int32), starts, window=window, softcap=cap
        )
    return error(made, exact(query, keys, values, table, lengths, counts, window, cap))


@everywhere
def test_decoding_one_token_of_each_sequence(where: str) -> None:
    assert both(where, [1, 37, 64, 5], [1, 1, 1, 1]) < EXACT


@everywhere
def test_prefill_in_chunks_beside_decoding(where: str) -> None:
    assert both(where, [40, 23, 7], [9, 1, 7]) < EXACT


@everywhere
def test_a_window_and_a_soft_cap(where: str) -> None:
    assert both(where, [70, 12], [20, 3], window=11) < EXACT
    assert both(where, [70, 12], [1, 1], window=11) < EXACT
    assert both(where, [30, 12], [4, 1], cap=1.5) < EXACT


@everywhere
def test_many_keys_are_shared_out_over_programs(where: str) -> None:
    assert both(where, [530], [1], heads=(2, 1), width=8) < EXACT


@everywhere
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_head_sizes_in_half_precision(where: str, width: int) -> None:
    assert both(where, [33], [2], width=width, dtype=torch.float16, heads=(8, 1), page=8) < PRODUCTS[torch.float16]


def test_operands_of_other_shapes_are_refused() -> None:
    keys, values, table = pages([8], 4, 2, 8, torch.float32)
    with pytest.raises(KernelError, match=r"lengths \(2,\)"):
        kernels.paged_attention(
            draw(1, 4, 8, dtype=torch.float32), keys, values, table, torch.ones(2), torch.tensor([0, 1])
        )
