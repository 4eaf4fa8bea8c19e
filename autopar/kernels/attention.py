"""Attention that never holds the (length, length) scores: `flash_attention`, an operator with a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels import attention_reference as reference
from autopar.kernels.backend import on_triton, wide


@dataclass(frozen=True)
class Shape:
    """What scores are made of and which keys a query sees; the options of `flash_attention`."""

    slopes: Tensor | None
    prefix: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    scale: float
    causal: bool
    window: int
    softcap: float
    offset: int
    longest: int


@torch.library.custom_op("autopar::flash_attention", mutates_args=())
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor | None = None,
    prefix: Tensor | None = None,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    offset: int = 0,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """``softmax(cap(scale · q @ k.T) + bias) @ v`` and the log-sum-exp of its scores.

    query (batch, heads, length, width), key (batch, kv_heads, keys, width), value (batch, kv_heads, keys, value width);
    heads is a multiple of kv_heads, each of which serves that many queries in a row. Returns the mixture (batch, heads,
    length, value width) and the log-sum-exp (batch, heads, length), float32 at least; a query that sees no key gets zeros
    and −∞. Both have gradients, so that results over parts of the keys can be merged.

    Query i has the position p = i + ``offset`` among the keys. ``scale`` None: 1/√width.

    - ``causal``: it sees the keys j ≤ p. ``prefix`` (batch): and the first so many, whatever p is (prefix-LM).
    - ``window``: only keys with p − j < window (Mistral's); without ``causal``, |p − j| < window. 0: none.
    - ``slopes`` (heads): slope · (j − p) is added to the scores (ALiBi; Press et al. 2022).
    - ``softcap`` c: scores are c · tanh(score / c) (Gemma 2), before slopes and mask. 0: none.
    - ``query_starts``, ``key_starts`` (sequences + 1): batch is 1, and sequences of different lengths lie packed in it, the
      i-th from starts[i] on; each attends within itself. ``longest``: the most queries one has, if known.

    Raises `KernelError` for operands of other shapes.
    """
    shape = checked(
        query, key, value, slopes, prefix, query_starts, key_starts, scale, causal, window, softcap, offset, longest
    )
    if on_triton(query, True):
        from autopar.kernels.device.attention_launch import forward

        return forward(query, key, value, shape, *outputs(query, value))
    out, lse = reference.forward(query, key, value, shape)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


@torch.library.custom_op("autopar::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None = None,
    prefix: Tensor | None = None,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    offset: int = 0,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of `flash_attention`, from those of its two results and the results themselves.

    With the mixture and log-sum-exp over *all* keys, and key and value a part of them, the gradients are those of that part:
    a ring needs no more.
    """
    shape = checked(
        query, key, value, slopes, prefix, query_starts, key_starts, scale, causal, window, softcap, offset, longest
    )
    if on_triton(query, True):
        from autopar.kernels.device.attention_launch import backward

        return backward(grad, grad_lse, query, key, value, out, lse, shape)
    made = reference.backward(grad, grad_lse, query, key, value, out, lse, shape)
    return tuple(g.contiguous() for g in made)  # type: ignore[return-value]


def checked(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Shape:
    """The options as a `Shape`. Raises `KernelError` where they, or the operands, do not fit each other."""
    slopes, prefix, query_starts, key_starts, scale, causal, window, softcap, offset, longest = options
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise KernelError(f"flash_attention: operands are (batch, heads, length, width); got {shapes}")
    same = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3]
    if not same or query.shape[-1] != key.shape[-1] or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise KernelError(
            "flash_attention: query and key share batch and width, key and value heads and length, and the key's heads "
            f"divide the query's; got {shapes}"
        )
    if slopes is not None and slopes.shape != (query.shape[1],):
        raise KernelError(f"flash_attention: one slope for each of {query.shape[1]} heads; got {tuple(slopes.shape)}")
    if prefix is not None and (not causal or prefix.shape != (query.shape[0],)):
        raise KernelError(
            f"flash_attention: a prefix is one length for each of {query.shape[0]} sequences, beside causal=True; "
            f"got {tuple(prefix.shape)}, causal={causal}"
        )
    packed = query_starts is not None or key_starts is not None
    if packed and (query_starts is None or key_starts is None or query.shape[0] != 1 or prefix is not None):
        raise KernelError("flash_attention: packed sequences need both starts, a batch of 1 and no prefix")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return Shape(slopes, prefix, query_starts, key_starts, scale, causal, window, softcap, offset, longest)


def outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the results; the mixture lies as (batch, length, heads, width), as the output projection reads it."""
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    return out, query.new_empty((batch, heads, length), dtype=wide(query.dtype))


@flash_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_options: Any, **_named: Any) -> tuple[Tensor, Tensor]:
    return outputs(query, value)


@flash_attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_options: Any, **_named: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.options = inputs[7:]


def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    made = flash_attention_backward(grad, grad_lse, query, key, value, out, lse, *tensors, *ctx.options)
    return (*made, *(None,) * 10)


flash_attention.register_autograd(backward, setup_context=setup_context)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mixture over all keys and its log-sum-exp, from those over parts of the keys."""
    outs, logs = torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts])
    total = torch.logsumexp(logs, 0)
    shares = torch.exp(logs - total.masked_fill(total == -torch.inf, 0.0))
    return (outs * shares.unsqueeze(-1)).sum(0).to(outs.dtype), total
