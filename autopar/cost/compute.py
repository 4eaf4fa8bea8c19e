"""Seconds of an operator call on one device: a roofline under the device's own efficiency curves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autopar.cluster import Device
from autopar.cluster.cluster import interpolate
from autopar.cost.mixture import is_mixture, trained
from autopar.cost.operators import PRODUCTS, is_attention, is_product, local_shapes, products
from autopar.cost.precision import Precision
from autopar.cost.tiles import filling
from autopar.cost.values import flows, op_name, reads, tensors
from autopar.cost.work import Call, Work, work
from autopar.sharding.placement import Placement, R

MATMUL_CURVE = ((1e6, 0.02), (1e8, 0.15), (1e9, 0.45), (16e9, 0.62), (128e9, 0.70))
"""Share of the dense peak by FLOPs of a call, where a device's own spec has no curve: the shape of Calculon's curve
(calculon-ai/calculon systems/a100_80g.json), its top between what `specs/clusters` say of A100 and H100."""
MEMORY_CURVE = ((0.0, 0.25), (1e6, 0.5), (10e6, 0.62), (100e6, 0.75))
"""Share of the memory bandwidth by bytes of a call: as in `specs/clusters`, Calculon's a100_80g.json, ``mem1``, times 0.83."""
ATTENTION = (0.6, 0.5)
"""Share of a large matrix product's rate that a fused attention kernel reaches, forward and backward, where a device's spec
has none of its own: between A100 and H100 (Dao 2023, FlashAttention-2, section 4.1)."""


@dataclass(frozen=True)
class Seconds:
    """Forward, gradients of activations, gradients of weights."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0

    @property
    def backward(self) -> float:
        return self.backward_input + self.backward_weight

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )


def share(device: Device, kind: str, size: float) -> float:
    """The device's own curve, or the default where its spec gives none."""
    if kind == "matmul" and not device.efficiency.matmul:
        return interpolate(MATMUL_CURVE, size)
    if kind == "memory" and not device.efficiency.memory:
        return interpolate(MEMORY_CURVE, size)
    return device.share(kind, size)


def moving(device: Device, bytes: float) -> float:
    """Seconds to move bytes to and from memory in one kernel."""
    return bytes / (device.bandwidth * share(device, "memory", bytes)) if bytes else 0.0


def kernel(device: Device, call: Call, dtype: str) -> float:
    """Seconds of one kernel: the slower of its FLOPs and its bytes, and the time to start it."""
    if not call.flops and not call.bytes:
        return 0.0
    computing = call.flops / rate(device, call, dtype) if call.flops else 0.0
    return max(computing, moving(device, call.bytes)) + device.kernel_latency


def rate(device: Device, call: Call, dtype: str) -> float:
    """FLOP/s of a matrix product or of fused attention."""
    peak, reached = device.peak(dtype), share(device, "matmul", call.flops)
    if call.kind == "attention":
        own = device.efficiency.attention or tuple(a * share(device, "matmul", 1e15) for a in ATTENTION)
        return peak * own[min(call.side, 1)] * reached / share(device, "matmul", 1e15)
    return peak * reached * filling(call.product, device.units)


def seconds(done: Work, device: Device) -> Seconds:
    """The time of a call's forward and backward."""
    name, sides = str(done.dtype).removeprefix("torch."), [0.0, 0.0, 0.0]
    for call in done.calls:
        sides[call.side] += kernel(device, call, call.dtype or name)
    return Seconds(*sides)


def node_seconds(
    node: fx.Node,
    inputs: tuple[Placement, ...],
    outputs: tuple[Placement, ...],
    degree: int,
    precision: Precision,
    device: Device,
) -> Seconds:
    """The time of one node under placements along tp, on one device."""
    return seconds(work(node, inputs, outputs, degree, precision), device)


def model_flops(node: fx.Node) -> float:
    """FLOPs of a node's own forward and backward on one device holding everything: no recompute, attention not halved,
    no gradient of what is frozen."""
    if node.op != "call_function" or not is_product(node):
        return 0.0
    given = reads(node)
    shapes, made = local_shapes(node, (R,) * len(given), (R,) * len(tensors(node)), 1)
    forward = products(node, shapes, made)
    if is_attention(node):
        return forward * (3 if any(flows(v) for v in given[:3]) else 1)
    if is_mixture(node):
        return forward * (1 + sum(trained(node)))
    factors = [given[i] for i in PRODUCTS[op_name(node)] if i < len(given)]
    return forward * (1 + sum(flows(v) for v in factors))
