"""mixed_precision: compute in half precision, keep the parameters and what is sensitive in float32, by explicit casts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pydantic
import torch
from torch import fx, nn

from autopar.errors import suggestion
from autopar.ir.causal import ancestors
from autopar.ir.hoist import hoist
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.unread import sweep
from passes.precision.casting import Casting

DTYPES = ("bfloat16", "float16", "float32", "float64")


class MixedPrecision(Pass):
    """``compute``: activations, and parameters where they are read. ``master``: parameters between steps, and ``frozen``
    those without a gradient (default: as master). ``reduce``: gradients while they are summed over devices (default:
    as master).

    The residual stream is in the compute dtype, as under FSDP2's MixedPrecisionPolicy and in Megatron-LM. Statistics of norms,
    exponentials, sums, rotary angles and the loss are float32 (`table.py` says which operators, and why). With
    float16 the loss is scaled, dynamically, while it trains (`autopar.runtime.scaler`). ``master: bfloat16`` keeps no
    float32 copy at all: give the optimizer ``rounding: stochastic``, or small updates are lost.
    """

    name: ClassVar[str] = "mixed_precision"
    numerics: ClassVar[Numerics] = Numerics.CHANGES
    compute: str = "bfloat16"
    master: str = "float32"
    frozen: str | None = None
    reduce: str | None = None

    @pydantic.field_validator("compute", "master", "frozen", "reduce")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in DTYPES:
            raise ValueError(f"no such dtype{suggestion(value, DTYPES)}; one of {', '.join(DTYPES)}")
        return value

    def rewrite(self, program: Program) -> None:
        compute, master = dtype(self.compute), dtype(self.master)
        store(program, master, dtype(self.frozen or self.master))
        graphs = activity(program)
        for name in [*program.blocks, OUTER]:
            Casting(program, name, graphs[name], compute).run()
        for name in program.blocks:
            lift(program, name, graphs[name])
        sweep(program)
        program.precision = {
            "compute": self.compute,
            "master": self.master,
            "frozen": self.frozen or self.master,
            "reduce": self.reduce or self.master,
        }


def dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def activity(program: Program) -> dict[str, dict[fx.Node, bool]]:
    """For every node whether it depends on a parameter or a floating input: activations do, tables do not."""
    outer: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            given = node.meta["kind"] == "input" and isinstance(value, torch.Tensor) and value.is_floating_point()
            outer[node] = node.meta["kind"] == "parameter" or given
        else:
            outer[node] = node.op == "call_module" or any(outer[n] for n in node.all_input_nodes)
    found = {OUTER: outer}
    for name, graph in program.blocks.items():
        calls = [c for c in program.calls() if c.target == name]
        inner = found[name] = {}
        for i, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                inner[node] = any(outer[c.args[i]] for c in calls)  # type: ignore[index]
            else:
                inner[node] = any(inner[n] for n in node.all_input_nodes)
    return found


def lift(program: Program, name: str, active: dict[fx.Node, bool]) -> None:
    """Tables are cast once, before the blocks that read them."""
    for node in list(program.blocks[name].nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.to.dtype and not active[node]:
            root = next((n for n in ancestors(node) if n.op == "placeholder"), node)
            new = hoist(program, name, node, root.name)
            if new is not node:
                node.replace_all_uses_with(new)


# ------------------------------------------------------------------ stored parameters


def store(program: Program, master: torch.dtype, frozen: torch.dtype) -> None:
    """Give parameters the dtype they have between steps, in the table, the graphs and the tensors held.

    Instances of one block keep one dtype: a parameter that is trained in some instance is stored as a trained one in all.
    """
    trained = {p.alias_of or p.name for p in program.parameters.values() if p.trainable}
    for call_group in parameter_groups(program):
        if call_group & trained:
            trained |= call_group
    converted: dict[int, torch.Tensor] = {}
    for name, p in program.parameters.items():
        wanted = master if (p.alias_of or p.name) in trained else frozen
        if p.dtype.is_floating_point and p.dtype != wanted:
            program.parameters[name] = replace(p, dtype=wanted)
            held = program.tensors[name]
            if id(held) not in converted:
                converted[id(held)] = nn.Parameter(held.detach().to(wanted), requires_grad=held.requires_grad)
            program.tensors[name] = converted[id(held)]
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            node.meta["val"] = node.meta["val"].to(program.parameters[node.meta["name"]].dtype)
    for call in program.calls():
        for place, given in zip(program.blocks[str(call.target)].nodes, call.args, strict=False):
            if place.meta["kind"] == "parameter":
                place.meta["val"] = place.meta["val"].to(given.meta["val"].dtype)  # type: ignore[union-attr]


def parameter_groups(program: Program) -> list[set[str]]:
    """For every placeholder of every block, the parameters its instances are given."""
    groups: dict[tuple[str, int], set[str]] = {}
    for call in program.calls():
        for i, given in enumerate(call.args):
            if isinstance(given, fx.Node) and given.meta.get("kind") == "parameter":
                groups.setdefault((str(call.target), i), set()).add(given.meta["name"])
    return list(groups.values())
