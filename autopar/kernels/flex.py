"""Attention by torch's flex_attention on GPUs, and by torch's fused operator elsewhere: `flex_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels.attention import Shape
from autopar.kernels.attention_reference import bias, plain, repeated
from autopar.kernels.backend import wide

SIGNATURE = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? slopes=None, Tensor? prefix=None, "
    "Tensor? documents=None, *, float? scale=None, bool causal=False, int window=0, float softcap=0.0, int offset=0"
)


@dataclass(frozen=True)
class Scores:
    """What is done to scores, and which keys a query sees; the options of `flex_attention`."""

    mask: Tensor | None
    slopes: Tensor | None
    prefix: Tensor | None
    documents: Tensor | None
    scale: float
    causal: bool
    window: int
    softcap: float
    offset: int

    @property
    def added(self) -> Tensor | None:
        """A mask that is added, not one that hides."""
        return self.mask if self.mask is not None and self.mask.dtype != torch.bool else None

    @property
    def seen(self) -> Tensor | None:
        return self.mask if self.mask is not None and self.mask.dtype == torch.bool else None


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    prefix: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    offset: int = 0,
) -> Tensor:
    """``softmax(cap(scale · q @ k.T) + slope · distance + mask) @ v``.

    Operands and ``slopes``, ``prefix``, ``scale``, ``causal``, ``window``, ``softcap``, ``offset`` are those of
    `flash_attention`. ``documents`` (batch, length): a query sees keys of its own number alone. ``mask`` (1 or batch, 1 or
    heads, 1 or length, keys): boolean, True where a key is seen, or added to the scores; it gets no gradient. A query that
    sees no key gets zeros.

    On a GPU one kernel that torch.compile makes of a score_mod and a block mask (`torch.nn.attention.flex_attention`); masks
    out of numbers (causal, window, prefix, documents) then take no memory of the size of the scores. torch 2.13's has no
    backward on CPUs: there, `scaled_dot_product_attention` with the same mask runs. Raises `KernelError` for operands of
    other shapes.
    """
    return torch.ops.autopar.flex_attention.default(
        query, key, value, mask, slopes, prefix, documents,
        scale=scale, causal=causal, window=window, softcap=softcap, offset=offset,
    )  # fmt: skip


def attention(query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    """The operator, made of operators that have gradients."""
    scores = checked(query, key, value, *tensors, **options)
    return through_flex(query, key, value, scores, True) if query.is_cuda else reference(query, key, value, scores)


_library = torch.library.Library("autopar", "FRAGMENT")
_library.define(f"flex_attention({SIGNATURE}) -> Tensor")
_library.impl("flex_attention", attention, "CompositeImplicitAutograd")


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    prefix: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    offset: int = 0,
) -> Scores:
    """The options together. Raises `KernelError` where they, or the operands, do not fit each other."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4 or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise KernelError(
            "flex_attention: operands are (batch, heads, length, width), and the key's heads divide the query's; "
            f"got {shapes}"
        )
    full = (*query.shape[:3], key.shape[2])
    if mask is not None and (mask.dim() != 4 or any(m not in (1, f) for m, f in zip(mask.shape, full, strict=True))):
        raise KernelError(f"flex_attention: a mask broadcasts to {full}; got {tuple(mask.shape)}")
    if documents is not None and (
        tuple(documents.shape) != (query.shape[0], query.shape[2]) or key.shape[2] != query.shape[2]
    ):
        raise KernelError(
            f"flex_attention: one document number for each token; got {tuple(documents.shape)} for {shapes}"
        )
    if prefix is not None and not causal:
        raise KernelError("flex_attention: a prefix goes with causal=True")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Scores(mask, slopes, prefix, documents, scale, causal, window, softcap, offset)


# ------------------------------------------------------------------ torch's kernel


def through_flex(query: Tensor, key: Tensor, value: Tensor, scores: Scores, compiled: bool) -> Tensor:
    """By torch's flex_attention; ``compiled``: as one kernel, else torch's own reference of it."""
    from torch.nn.attention import flex_attention as flex

    block_mask = None
    if hides(scores):
        make: Any = compiled_mask() if compiled else flex.create_block_mask
        of_batch = any(t is not None for t in (scores.prefix, scores.documents, scores.seen))
        heads = scores.seen is not None and scores.seen.shape[1] > 1
        sizes = query.shape[0] if of_batch else None, query.shape[1] if heads else None, query.shape[2], key.shape[2]
        block_mask = make(mask_mod(scores), *sizes, device=query.device)
    run: Any = compiled_attention() if compiled else flex.flex_attention
    grouped = query.shape[1] != key.shape[1]
    return run(query, key, value, score_mod(scores), block_mask, scale=scores.scale, enable_gqa=grouped)


@cache
def compiled_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def compiled_mask() -> Callable[..., Any]:
    """Compiled, it looks at blocks of the mask and never holds the whole."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def hides(scores: Scores) -> bool:
    return bool(scores.causal or scores.window or scores.documents is not None or scores.seen is not None)


def at(tensor: Tensor, *places: Any) -> Tensor:
    """An element, of a tensor whose dims may be 1 where it is the same all along."""
    return tensor[tuple(p if n > 1 else 0 for p, n in zip(places, tensor.shape, strict=True))]


def score_mod(scores: Scores) -> Callable[..., Tensor] | None:
    """How a score changes: soft cap, ALiBi, an added mask; in that order. None where it does not."""
    cap, slopes, added, offset = scores.softcap, scores.slopes, scores.added, scores.offset
    if not cap and slopes is None and added is None:
        return None

    def change(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if cap:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            score = score + slopes[h] * (column - row - offset)
        return score if added is None else score + at(added, b, h, row, column)

    return change


def mask_mod(scores: Scores) -> Callable[..., Tensor]:
    """Whether a query sees a key."""
    causal, window, offset = scores.causal, scores.window, scores.offset
    prefix, documents, seen = scores.prefix, scores.documents, scores.seen

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        far = row + offset - column
        near = far >= 0 if causal else far == far
        if window:
            near = near & (far < window) & (far > -window)
        if prefix is not None:
            near = near | (column < prefix[b])
        if documents is not None:
            near = near & (documents[b, row] == documents[b, column])
        return near if seen is None else near & at(seen, b, h, row, column)

    return sees


# ------------------------------------------------------------------ everywhere else


def reference(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """By torch's fused operator with one mask; written out where scores are capped."""
    group = query.shape[1] // key.shape[1]
    key, value = repeated(key, group), repeated(value, group)
    shape = Shape(
        scores.slopes,
        scores.prefix,
        None,
        None,
        scores.scale,
        scores.causal,
        scores.window,
        scores.softcap,
        scores.offset,
        0,
    )
    if plain(shape) and scores.documents is None and scores.mask is None and not scores.softcap:
        causal = scores.causal
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scores.scale)
    added = bias(query, key, shape)
    if scores.documents is not None:
        same = scores.documents[:, None, :, None] == scores.documents[:, None, None, :]
        added = added.masked_fill(~same, -torch.inf)
    if scores.seen is not None:
        added = added.masked_fill(~scores.seen, -torch.inf)
    if scores.added is not None:
        added = added + scores.added
    blind = (added == -torch.inf).all(-1, keepdim=True)
    added = added.masked_fill(blind, 0.0)
    if scores.softcap:
        mixed = capped(query, key, value, scores, added)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, added.to(query.dtype), scale=scores.scale)
    return mixed.masked_fill(blind, 0.0)


def capped(query: Tensor, key: Tensor, value: Tensor, scores: Scores, added: Tensor) -> Tensor:
    dtype = wide(query.dtype)
    s = query.to(dtype) @ key.to(dtype).mT * scores.scale
    s = scores.softcap * torch.tanh(s / scores.softcap) + added
    return (s.softmax(-1) @ value.to(dtype)).to(query.dtype)
