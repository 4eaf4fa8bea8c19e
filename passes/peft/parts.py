"""What PEFT methods share: making nodes that carry gradients, putting one in another's place, peft's config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopar.ir.adapters import Adapter, Saved
from autopar.ir.edit import Layer, add_parameter
from autopar.ir.initial import Initial
from autopar.ir.program import OUTER, Program
from autopar.ir.shapes import infer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autopar.ir.rewrite import Pass

aten = torch.ops.aten


class Maker:
    """Makes nodes with values where the graph inserts; they belong to the module ``path``."""

    def __init__(self, graph: fx.Graph, path: str) -> None:
        self.graph, self.path = graph, path

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"path": self.path, "requires_grad": True}
        return infer(node)


@contextmanager
def replacing(graph: fx.Graph, node: fx.Node, path: str) -> Iterator[tuple[Maker, list[fx.Node]]]:
    """Make nodes right behind ``node``; the last one put into the list takes its place with all who read it so far."""
    readers, made = list(node.users), []
    with graph.inserting_before(node.next):
        yield Maker(graph, path), made
    for reader in readers:
        reader.replace_input_with(node, made[-1])


class Added:
    """The parameters that one run of a pass adds to layers; a layer that is called twice has them once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[tuple[str, str, str], fx.Node] = {}

    def __call__(
        self, layer: Layer, name: str, shape: tuple[int, ...], initial: Initial | Callable[[str], Initial]
    ) -> fx.Node:
        """A parameter in the dtype of the layer's weight; ``initial`` may be made of the instance's path."""
        key = (layer.graph, layer.path, name)
        if key not in self.made:
            dtype = layer.view.weight.meta["val"].dtype
            self.made[key] = add_parameter(self.program, layer.graph, f"{layer.path}.{name}", shape, dtype, initial)
        return self.made[key]


def paths(chosen: Iterable[Layer]) -> list[str]:
    """The layers' modules, each once."""
    return list(dict.fromkeys(p for layer in chosen for p in layer.paths))


def record(
    program: Program,
    method: Pass,
    peft_type: str,
    config: dict[str, Any],
    tensors: dict[str, Saved],
    decisive: Iterable[str],
    alike: tuple[str, ...] = (),
) -> None:
    """Tell the program what it now trains, and how peft writes that down."""
    common = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM" if {"input_ids", "labels"} <= program.inputs.keys() else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    options = method.model_dump(mode="json")
    program.adapters.append(
        Adapter(
            method=method.name,
            options=options,
            config={**common, **config},
            decisive=tuple(decisive),
            tensors=tensors,
            alike=alike,
        )
    )


def turned(layer: Layer) -> bool:
    """Whether a layer's weight is stored (in, out), as transformers' Conv1D does."""
    return layer.view.weight.op == "call_function" and layer.view.weight.target in (
        aten.t.default,
        aten.transpose.int,
        aten.numpy_T.default,
        aten.permute.default,
    )


def widths(layer: Layer) -> tuple[int, int]:
    """In and out of a linear layer."""
    out, into = (int(s) for s in layer.view.weight.meta["val"].shape)
    return into, out


def instances(program: Program, graph: str) -> list[fx.Node | None]:
    """The calls of a block; of the outer graph one, which is no call."""
    return [None] if graph == OUTER else [c for c in program.calls() if c.target == graph]


def pass_in(program: Program, graph: str, value: fx.Node, called: str) -> fx.Node:
    """An outer value where ``graph`` can read it: itself, or a new argument of all of a block's calls."""
    if graph == OUTER:
        return value
    for call in instances(program, graph):
        call.args = (*call.args, value)  # type: ignore[union-attr]
    block = program.blocks[graph]
    last = [n for n in block.nodes if n.op == "placeholder"][-1]
    with block.inserting_after(last):
        new = block.placeholder(called)
    new.target = new.name  # the argument's name in generated code; fx makes only the node's a unique identifier
    new.meta = {"kind": "input", "name": new.name, "path": "", "requires_grad": False, "val": value.meta["val"]}
    return new
