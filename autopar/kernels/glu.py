"""Gated linear units (Shazeer 2020): `glu`, an operator with a gradient that keeps nothing but its operands."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.errors import KernelError, suggestion
from autopar.kernels.backend import on_triton, wide

aten = torch.ops.aten
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@torch.library.custom_op("autopar::glu", mutates_args=())
def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) · up``, of one shape and dtype. Activations: silu (SwiGLU), gelu or gelu_tanh (GeGLU), relu."""
    check(gate, up, activation)
    if on_triton(gate) and gate.numel():
        from autopar.kernels.device.glu import forward

        return forward(gate, up, activation)
    return gated(gate, up, activation)


@torch.library.custom_op("autopar::glu_backward", mutates_args=())
def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    if on_triton(gate) and gate.numel():
        from autopar.kernels.device.glu import backward

        return backward(grad, gate, up, activation)
    dtype = wide(gate.dtype)
    g, x, u = grad.to(dtype), gate.to(dtype), up.to(dtype)
    return backward_of(g * u, x, activation).to(gate.dtype), (g * activated(x, activation)).to(up.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    dtype = wide(gate.dtype)
    return (activated(gate.to(dtype), activation) * up.to(dtype)).to(gate.dtype)


def activated(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def backward_of(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x from that of its activation."""
    if activation == "silu":
        return aten.silu_backward(grad, x)
    if activation == "relu":
        return aten.threshold_backward(grad, x, 0)
    return aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise KernelError(
            f"glu: unknown activation {activation!r}{suggestion(activation, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}"
        )
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(
            f"glu: gate and up have one shape and dtype; got {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )


@glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@glu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*glu_backward(grad, *ctx.saved_tensors, ctx.activation), None)


glu.register_autograd(backward, setup_context=setup_context)
