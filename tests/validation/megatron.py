"""How Megatron-LM and torchtitan place and recompute, where a plan of ours would do it otherwise.

Their runs are priced as they ran: the same costs, of the choices that their code makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import fx

from autopar.cost.compute import Seconds
from autopar.cost.regions import Measure
from autopar.cost.values import op_name, parameter, tensor, tensors
from autopar.sharding.placement import R
from autopar.solve import formulation
from autopar.solve.prepare import Source

STREAM = ("add", "dropout", "layer_norm", "rms_norm", "add_rms_norm", "add_layer_norm")


@contextmanager
def placed_by_hand() -> Iterator[None]:
    """Column after row: no weight is gathered over tp (Shoeybi et al. 2019, section 3), and what flows between is whole, or
    split over the sequence (Korthikanti et al. 2022, section 4.2.2)."""
    choose, move = formulation.choices, formulation.move_seconds

    def choices(program: Any, degree: int, sequence: bool | None = None, pinned: Any = None) -> Any:
        found = choose(program, degree, sequence, pinned)
        for item in found.items.values():
            item.options[:] = by_hand(item.node, item.options, bool(sequence)) or item.options
        return found

    def move_seconds(v: Any, p: Any, w: Any, prices: Any, once: bool = False) -> float | None:
        moved = p.sharded and w[0] == R and parameter(v) is not None and tensor(v).dim() == 2
        return None if moved else move(v, p, w, prices, once)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(formulation, "choices", choices))
        stack.enter_context(mock.patch.object(formulation, "move_seconds", move_seconds))
        stack.enter_context(mock.patch.object(Source, "variants", lambda self, tp: ["split"]))
        yield


def by_hand(node: fx.Node, options: list[Any], sequence: bool) -> list[Any]:
    """The options that are left to a node; none: all of them."""
    if node.op == "placeholder" and node.meta.get("kind") == "parameter" and node.meta["val"].dim() == 2:
        return [s for s in options if s.outputs[0].sharded]
    if node.op == "call_function" and op_name(node) in STREAM and tensors(node)[0].dim() == 3:
        wanted = "S(1)" if sequence else "R"
        return [s for s in options if all(str(p) == wanted for p in s.outputs)]
    return []


@contextmanager
def kernels_of_megatron() -> Iterator[None]:
    """Scale, mask and softmax are one kernel (megatron/fused_kernels), and a recomputed block runs again to its end
    (`CheckpointFunction` of megatron/mpu/random.py), where torch's checkpoint stops early."""
    seconds = Measure.seconds

    def fused(self: Measure, node: fx.Node) -> Seconds:
        scores = op_name(node) in ("mul", "add", "div") and tensors(node)[0].dim() == 4
        return Seconds() if scores else seconds(self, node)

    def needed(self: Measure, region: set[fx.Node], wanted: Any) -> set[fx.Node]:
        return set(region)

    with mock.patch.object(Measure, "seconds", fused), mock.patch.object(Measure, "needed", needed):
        yield
