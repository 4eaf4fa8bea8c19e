"""`routed_experts` against one expert after the other, one token after the other."""

import pytest
import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels import experts, routed_experts
from autopar.kernels.glu import ACTIVATIONS, activated

TOKENS, HIDDEN, FFN, EXPERTS, TOP = 13, 6, 5, 4, 2


def operands(dtype: torch.dtype = torch.float64, gated: bool = True) -> list[Tensor | None]:
    """tokens, scores, chosen, numbers, gate, up, down; expert 3 is chosen by nobody."""
    made = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype).requires_grad_()

    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=made)[:TOP] for _ in range(TOKENS)])
    gate = drawn(EXPERTS, FFN, HIDDEN) if gated else None
    weights = [gate, drawn(EXPERTS, FFN, HIDDEN), drawn(EXPERTS, HIDDEN, FFN)]
    return [drawn(TOKENS, HIDDEN), drawn(TOKENS, TOP), chosen, torch.arange(EXPERTS), *weights]


def one_by_one(tokens, scores, chosen, numbers, gate, up, down, activation) -> Tensor:
    rows = []
    for t in range(tokens.shape[0]):
        row = torch.zeros_like(tokens[t])
        for j in range(chosen.shape[1]):
            for e in range(len(numbers)):
                if numbers[e] == chosen[t, j]:
                    inner = activated(tokens[t] @ (up if gate is None else gate)[e].t(), activation)
                    inner = inner if gate is None else inner * (up[e] @ tokens[t])
                    row = row + scores[t, j] * (down[e] @ inner)
        rows.append(row)
    return torch.stack(rows)


def gradients(out: Tensor, given: list[Tensor | None]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [x for x in given if x is not None and x.requires_grad]
    return list(torch.autograd.grad((out * weight).sum(), wanted))


def assert_same(given: list[Tensor | None], activation: str, call=routed_experts, atol: float = 1e-12) -> None:
    ours, theirs = call(*given, activation), one_by_one(*given, activation)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_the_mixture_and_its_gradients_are_those_of_one_token_after_the_other(activation: str, gated: bool) -> None:
    assert_same(operands(gated=gated), activation)


def test_the_operator_of_a_graph_computes_what_the_function_does() -> None:
    assert_same(operands(), "silu", torch.ops.autopar.routed_experts)
    assert_same(operands(gated=False), "relu", torch.ops.autopar.routed_experts)


def test_some_experts_add_up_to_all() -> None:
    given = operands()
    halves = []
    for part in (slice(0, 1), slice(1, 4)):
        some = [*given[:3], *(None if w is None else w[part] for w in given[3:])]
        assert_same(some, "silu")
        halves.append(routed_experts(*some, "silu"))
    torch.testing.assert_close(sum(halves), routed_experts(*given, "silu"), rtol=0, atol=1e-12)


def test_strided_operands_one_token_no_token_and_experts_that_nobody_chose() -> None:
    tokens, scores, chosen, numbers, gate, up, down = operands()
    strided = [x.detach().t().contiguous().t().requires_grad_() for x in (tokens, scores)]
    turned = [w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for w in (gate, up, down)]
    assert_same([*strided, chosen.t().contiguous().t(), numbers, *turned], "silu")
    one = [x.detach()[:1].requires_grad_() for x in (tokens, scores)]
    assert_same([*one, chosen[:1], numbers, gate, up, down], "silu")
    none = [x.detach()[:0].requires_grad_() for x in (tokens, scores)]
    out = routed_experts(*none, chosen[:0], numbers, gate, up, down, "silu")
    assert out.shape == (0, HIDDEN)
    of_gate = torch.autograd.grad(out.sum(), gate)[0]
    assert of_gate.shape == gate.shape and not of_gate.any()


def test_gradients_of_what_is_frozen_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands()
    for i in (4, 5, 6):
        given[i] = given[i].detach()
    made = []
    monkeypatch.setattr(experts, "grouped_outer", lambda *args: made.append(args))
    assert_same(given, "silu")
    assert not made


def test_gradients_are_those_of_finite_differences() -> None:
    given = operands()

    def call(*free: Tensor) -> Tensor:
        return routed_experts(free[0], free[1], given[2], given[3], *free[2:], "gelu")

    free = [x for x in given if x is not None and x.requires_grad]
    assert torch.autograd.gradcheck(call, free)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_kernel_for_all_experts_computes_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, on torch's CPU version of the grouped product."""
    made = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(dtype).requires_grad_()

    chosen = torch.stack([torch.randperm(4, generator=made)[:2] for _ in range(32)])
    weights = [drawn(4, 48, 64), drawn(4, 48, 64), drawn(4, 64, 48)]
    given = [drawn(32, 64), drawn(32, 2), chosen, torch.arange(4), *weights]
    apart = routed_experts(*given, "silu")
    before = gradients(apart, given)
    monkeypatch.setattr(experts, "one_kernel", lambda x: True)
    together = routed_experts(*given, "silu")
    close = dict(rtol=2e-2, atol=1e-1) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(together, apart, **close)
    scale = [g.abs().max() for g in before]
    for a, b, s in zip(gradients(together, given), before, scale, strict=True):
        torch.testing.assert_close(a / s, b / s, rtol=0, atol=1e-2)


def test_what_does_not_fit_is_refused() -> None:
    tokens, scores, chosen, numbers, gate, up, down = operands()
    with pytest.raises(KernelError, match="unknown activation 'silo'; did you mean 'silu'"):
        routed_experts(tokens, scores, chosen, numbers, gate, up, down, "silo")
    with pytest.raises(KernelError, match=r"shapes do not fit: tokens \(13, 6\).* down \(4, 5, 6\)"):
        routed_experts(tokens, scores, chosen, numbers, gate, up, up, "silu")
