"""A mixture of experts: `routed_experts`, every token through the experts chosen for it and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autopar.errors import KernelError, suggestion
from autopar.kernels.glu import ACTIVATIONS, activated, backward_of


def routed_experts(
    tokens: Tensor,
    scores: Tensor,
    chosen: Tensor,
    numbers: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """Σ score · expert(token) over the experts chosen for each token, (tokens, hidden).

    tokens (tokens, hidden); scores and chosen (tokens, top), chosen the numbers of experts; numbers (experts,): which
    experts the weights are of, so that a device with some of them adds up these alone. up and gate (experts, ffn, hidden),
    down (experts, hidden, ffn): an expert is ``down(activation(gate x) · up x)``, without gate ``down(activation(up x))``.
    Work and memory grow with the tokens and not with the experts; nothing is dropped (Gale et al. 2022, MegaBlocks).

    Its backward has what the experts' first products gave. The operator of this name, which a traced graph holds, makes
    that again: what an operator keeps must have a size that is known before the tokens are.
    """
    operands = (tokens, scores, chosen, numbers, gate, up, down, activation)
    if tokens.is_meta or isinstance(tokens, FakeTensor):
        return torch.ops.autopar.routed_experts(*operands)
    return RoutedExperts.apply(*operands)


class Routing(NamedTuple):
    """``pairs``: of the (token, choice) pairs, flattened, those whose expert is here, by expert; ``ends``: where in them
    each expert's end."""

    pairs: Tensor
    ends: Tensor


def route(chosen: Tensor, numbers: Tensor) -> Routing:
    here = chosen.reshape(-1, 1) == numbers
    place = torch.where(here.any(1), here.to(torch.int8).argmax(1), numbers.shape[0])
    ordered, order = torch.sort(place, stable=True)
    ends = torch.searchsorted(ordered, torch.arange(numbers.shape[0], device=chosen.device), right=True)
    total = int(ends[-1]) if numbers.shape[0] else 0
    return Routing(order[:total], ends)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (rows, k), by expert, times their expert's weight (experts, n, k): (rows, n)."""
    if one_kernel(x):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.to(torch.int32))
    parts = zip(x.tensor_split(ends[:-1].tolist()), weight, strict=True)
    return torch.cat([part @ w.t() for part, w in parts])


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """For each expert its rows of a (rows, m), transposed, times those of b (rows, n): (experts, m, n)."""
    if one_kernel(a):
        return F.grouped_mm(a.t(), b, offs=ends.to(torch.int32))
    cuts = ends[:-1].tolist()
    return torch.stack([x.t() @ y for x, y in zip(a.tensor_split(cuts), b.tensor_split(cuts), strict=True)])


def one_kernel(x: Tensor) -> bool:
    """Whether torch has the grouped product as one kernel that needs no sizes on the host: bfloat16 from sm_80 on. CPUs take
    one product for each expert, which is as fast there and exact in every dtype."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def inner(gated: Tensor | None, raised: Tensor, activation: str) -> Tensor:
    return activated(raised, activation) if gated is None else activated(gated, activation) * raised


def scattered(rows: Tensor, pairs: Tensor, tokens: int, top: int) -> Tensor:
    """The sum of every token's rows: (tokens, width). Same order every time, on every device."""
    spread = rows.new_zeros(tokens * top, rows.shape[1])
    spread[pairs] = rows
    return spread.view(tokens, top, rows.shape[1]).sum(1)


class Middle(NamedTuple):
    """A mixture half done: its routing, and what each expert's first products gave, (pairs here, ffn)."""

    pairs: Tensor
    ends: Tensor
    gated: Tensor | None
    raised: Tensor


def first_half(tokens: Tensor, chosen: Tensor, numbers: Tensor, gate: Tensor | None, up: Tensor) -> Middle:
    pairs, ends = route(chosen, numbers)
    x = tokens[pairs // chosen.shape[1]]
    return Middle(pairs, ends, None if gate is None else grouped(x, gate, ends), grouped(x, up, ends))


def second_half(made: Middle, scores: Tensor, down: Tensor, activation: str) -> Tensor:
    out = grouped(inner(made.gated, made.raised, activation), down, made.ends)
    return scattered(out * scores.reshape(-1)[made.pairs].unsqueeze(1), made.pairs, *scores.shape)


def gradients(
    grad: Tensor, tokens: Tensor, scores: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, made: Middle,
    activation: str, wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of tokens, scores, gate, up and down; None for what is not ``wanted``."""
    (pairs, ends, gated, raised), top = made, scores.shape[1]
    of_rows = grad[pairs // top]
    score = scores.reshape(-1)[pairs].unsqueeze(1)
    mixed = inner(gated, raised, activation)
    of_mixed = grouped(of_rows, down.transpose(1, 2), ends)  # without the score
    of_scores = scores.new_zeros(scores.numel())
    of_scores[pairs] = (of_mixed * mixed).sum(1)
    of_gated, of_raised = of_inner(of_mixed * score, gated, raised, activation)
    of_tokens = of_gate = of_up = of_down = None
    if wanted[0]:
        of_x = grouped(of_raised, up.transpose(1, 2), ends)
        if gate is not None:
            of_x = of_x + grouped(of_gated, gate.transpose(1, 2), ends)
        of_tokens = scattered(of_x, pairs, tokens.shape[0], top)
    if wanted[2] or wanted[3]:
        x = tokens[pairs // top]
        of_gate = grouped_outer(of_gated, x, ends) if wanted[2] else None
        of_up = grouped_outer(of_raised, x, ends) if wanted[3] else None
    if wanted[4]:
        of_down = grouped_outer(of_rows * score, mixed, ends)
    return of_tokens, of_scores.view(scores.shape) if wanted[1] else None, of_gate, of_up, of_down


class RoutedExperts(torch.autograd.Function):
    """Saved: the operands, the routing, and what each expert's first products gave."""

    @staticmethod
    def forward(ctx: Any, tokens, scores, chosen, numbers, gate, up, down, activation):  # type: ignore[no-untyped-def]
        check(tokens, scores, chosen, numbers, gate, up, down, activation)
        made = first_half(tokens, chosen, numbers, gate, up)
        ctx.save_for_backward(tokens, scores, gate, up, down, *made)
        ctx.activation = activation
        return second_half(made, scores, down, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, scores, gate, up, down, *made = ctx.saved_tensors
        found = gradients(grad, tokens, scores, gate, up, down, Middle(*made), ctx.activation, wanted_of(ctx))
        return arranged(found)


def wanted_of(ctx: Any) -> list[bool]:
    """Of tokens, scores, gate, up, down."""
    return [ctx.needs_input_grad[i] for i in (0, 1, 4, 5, 6)]


def arranged(found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the order of all operands."""
    of_tokens, of_scores, *of_weights = found
    return of_tokens, of_scores, None, None, *of_weights, None


def of_inner(grad: Tensor, gated: Tensor | None, raised: Tensor, activation: str) -> tuple[Any, Tensor]:
    """Gradients of what gate and up gave."""
    if gated is None:
        return None, backward_of(grad, raised, activation)
    return backward_of(grad * raised, gated, activation), grad * activated(gated, activation)


def check(
    tokens: Tensor, scores: Tensor, chosen: Tensor, numbers: Tensor, gate: Tensor | None, up: Tensor, down: Tensor,
    activation: str,
) -> None:  # fmt: skip
    """KernelError where shapes or the activation do not fit."""
    if activation not in ACTIVATIONS:
        raise KernelError(
            f"routed_experts: unknown activation {activation!r}{suggestion(activation, ACTIVATIONS)}; known: "
            f"{', '.join(ACTIVATIONS)}"
        )
    experts, ffn, hidden = up.shape
    right = tokens.dim() == 2 and tokens.shape[1] == hidden and chosen.shape == scores.shape
    right = right and scores.shape[0] == tokens.shape[0] and numbers.shape == (experts,)
    if not right or down.shape != (experts, hidden, ffn) or (gate is not None and gate.shape != up.shape):
        shapes = {"tokens": tokens, "scores": scores, "chosen": chosen, "numbers": numbers, "up": up, "down": down}
        raise KernelError(
            "routed_experts: shapes do not fit: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in shapes.items())
        )


@torch.library.custom_op("autopar::routed_experts", mutates_args=())
def operator(
    tokens: Tensor, scores: Tensor, chosen: Tensor, numbers: Tensor, gate: Tensor | None, up: Tensor, down: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    check(tokens, scores, chosen, numbers, gate, up, down, activation)
    return second_half(first_half(tokens, chosen, numbers, gate, up), scores, down, activation)


@operator.register_fake
def _(tokens, scores, chosen, numbers, gate, up, down, activation):  # type: ignore[no-untyped-def]
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("autopar::routed_experts_backward", mutates_args=())
def operator_backward(
    grad: Tensor, tokens: Tensor, scores: Tensor, chosen: Tensor, numbers: Tensor, gate: Tensor | None, up: Tensor,
    down: Tensor, activation: str, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of tokens, scores, gate, up and down; those that are not ``wanted`` are empty."""
    made = first_half(tokens, chosen, numbers, gate, up)
    found = gradients(grad, tokens, scores, gate, up, down, made, activation, wanted)
    return [tokens.new_empty(0) if g is None else g for g in found]


@operator_backward.register_fake
def _(grad, tokens, scores, chosen, numbers, gate, up, down, activation, wanted):  # type: ignore[no-untyped-def]
    shapes = [tokens.shape, scores.shape, up.shape, up.shape, down.shape]
    return [tokens.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True)]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.activation = inputs[7]


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = wanted_of(ctx)
    found = operator_backward(grad, *ctx.saved_tensors, ctx.activation, wanted)
    return arranged([g if w else None for g, w in zip(found, wanted, strict=True)])


operator.register_autograd(backward, setup_context=setup_context)
