"""A backward in two parts, for a stage's inputs and, later, for its weights: what torch's split of autograd takes more.

torch's `stage_backward_input` notes, at every operator that reads a weight, the gradient that arrives there; the graph
and all it saved stay until `stage_backward_weight` starts from those gradients, one group of weights after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from autopar.cluster import Device
from autopar.cost.values import Value, flows, is_view, op_name, parameter, reads, tensor, tensors

if TYPE_CHECKING:
    from autopar.cost.regions import Measure

GROUP_SECONDS = 58e-6
"""Host seconds of one group of weights: finding it in the graph, and a call of autograd's engine for it."""
STEP_SECONDS = 0.21e-6
"""Host seconds of the engine for each step of the graph before a group's operator, which it counts before it starts.

Both: torch 2.13 on an AMD EPYC core, blocks of 9 weights and 62 steps too small to compute anything: the two parts
together took 0.6, 1.2 and 8.0 ms more than a whole backward over 1, 2 and 8 blocks."""
WEIGHT_STEPS = 3
"""Steps of autograd's graph that a weight adds to its operator's own: it is transposed, reshaped and accumulated."""


def readers(measure: Measure) -> list[fx.Node]:
    """The operators where a gradient on its way to the inputs meets a trained weight."""
    return [n for n in measure.nodes if trained(n) and any(flows(v) and parameter(v) is None for v in reads(n))]


def trained(node: fx.Node) -> list[Value]:
    """The trained weights that an operator reads; views and casts of weights alone belong to the weight."""
    if parameter((node, 0)) is not None:
        return []
    return [v for v in reads(node) if flows(v) and parameter(v) is not None]


def groups(measure: Measure) -> int:
    """How many weights, or pairs of a weight and its bias, have their gradients computed apart."""
    return len(readers(measure))


def steps(measure: Measure) -> int:
    """How many steps autograd's graph of the part has, about."""
    own = sum(any(flows((n, i)) for i in range(len(tensors(n)))) for n in measure.nodes)
    return own + WEIGHT_STEPS * groups(measure)


def waiting(measure: Measure) -> float:
    """Bytes that a micro-batch holds between the parts beside what it saved: the gradients at the operators that read
    weights."""
    gradients = {arriving(n): measure.bytes((n, 0), measure.at((n, 0))) for n in readers(measure)}
    return sum(gradients.values())


def freed(measure: Measure) -> float:
    """Bytes that the end of a pipeline saved behind the last operator that reads a weight: the loss's. Nothing needs them
    after the first part; elsewhere, other blocks follow and the graph holds all that was saved."""
    before = set(readers(measure))
    for node in reversed(measure.nodes):
        if any(node in map(first, reads(user)) for user in before):
            before.add(node)
    kept, extra = measure.held([n for n in measure.nodes if n in before])
    whole, more = measure.held(measure.nodes)
    return sum(whole.values()) + more - sum(kept.values()) - extra


def first(v: Value) -> fx.Node:
    return v[0]


def arriving(node: fx.Node) -> Value:
    """Whose gradient arrives at an operator's output: a sum hands its own on to all it adds."""
    v: Value = (node, 0)
    while True:
        users = [
            u for u in v[0].users if u.op == "call_function" and any(flows((u, i)) for i in range(len(tensors(u))))
        ]
        if len(users) != 1 or not (op_name(users[0]) == "add" or is_view(users[0])):
            return v
        if tensor((users[0], 0)).numel() != tensor(v).numel():
            return v
        v = (users[0], 0)


def in_two(parts: tuple[float, float], groups: int, steps: int, device: Device) -> tuple[float, float]:
    """Seconds of the two parts, from what the device computes in each and what the host does to split them.

    The host of an accelerator runs ahead of it, so the longer of the two counts; a device without a host of its own
    (``host_bandwidth``) is the host.
    """
    host = groups * GROUP_SECONDS / 2, groups * (GROUP_SECONDS / 2 + steps / 2 * STEP_SECONDS)
    if device.host_bandwidth is None:
        return parts[0] + host[0], parts[1] + host[1]
    return max(parts[0], host[0]), max(parts[1], host[1])
