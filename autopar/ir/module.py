"""A Program as a runnable nn.Module on one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from autopar.errors import TraceError
from autopar.ir.program import Program
from autopar.ir.specialize import example_sizes


class ProgramModule(nn.Module):
    """``forward(**batch) -> (loss_sum, count)``; parameters under their original names, shared with the traced module.

    The batch may have any size and length the program allows; each is specialized once. Buffers that are carried from step
    to step (`Advance`) move on at the first call after the parameters changed, or when `advance` is called.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.static: dict[tuple[int, ...], Any] = {}
        for name, parameter in program.parameters.items():
            attach(self, name, as_declared(program.tensors[name], parameter.trainable), parameter=True)
        for name in program.buffers:
            attach(self, name, program.tensors[name], parameter=False)
        self.carries = any(b.advance is not None for b in program.buffers.values())
        self.version = self.changes()

    def forward(self, *args: Any, **batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if args:
            batch = dict(zip(self.program.inputs, args, strict=False)) | batch
        missing = [k for k in self.program.inputs if k not in batch]
        if missing:
            raise TraceError(
                f"the batch lacks {missing[0]!r}; the program was traced with {', '.join(self.program.inputs)}"
            )
        if self.carries and self.version != self.changes():
            self.advance()
        sizes = example_sizes_of(batch, self.program)
        if sizes not in self.static:
            static = self.program.at(batch=sizes[0], length=sizes[1] if len(sizes) > 1 else None)
            self.static[sizes] = compiled(static, device_of(batch))
        return run(*self.static[sizes], self.values(batch))  # type: ignore

    def changes(self) -> int:
        """Grows with every change of a parameter in place: an optimizer's step."""
        return sum(p._version for p in self.parameters()) if self.carries else 0

    @torch.no_grad()
    def advance(self) -> None:
        """End a step: what operators noted in the buffers they write into is used from the next call on."""
        held = dict(self.named_buffers(remove_duplicate=False))
        for name, buffer in self.program.buffers.items():
            if buffer.advance is not None:
                buffer.advance(held[name])
        self.version = self.changes()

    def values(self, batch: dict[str, Any]) -> dict[str, Any]:
        held = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        constants = {k: v for k, v in self.program.tensors.items() if k not in held}
        return {**constants, **held, **flat(batch)}


def as_declared(tensor: torch.Tensor, trainable: bool) -> torch.Tensor:
    """The parameter itself, or one that shares its memory where a pass froze it."""
    return tensor if tensor.requires_grad == trainable else nn.Parameter(tensor.detach(), trainable)


def flat(batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested batches by dotted name, as placeholders name them."""
    found: dict[str, Any] = {}
    for key, value in batch.items():
        items: Any = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        found.update(flat(items, f"{prefix}{key}.") if isinstance(items, dict) else {f"{prefix}{key}": items})
    return found


def attach(root: nn.Module, name: str, tensor: torch.Tensor, *, parameter: bool) -> None:
    """Register a tensor under a dotted name, making plain modules on the way."""
    *way, last = name.split(".")
    for part in way:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.register_parameter(last, tensor) if parameter else root.register_buffer(last, tensor)  # type: ignore[arg-type]


def device_of(batch: dict[str, Any]) -> torch.device:
    return next(v.device for v in flat(batch).values() if isinstance(v, torch.Tensor))


def example_sizes_of(batch: dict[str, Any], program: Program) -> tuple[int, ...]:
    from autopar.ir.inputs import sizes_of

    return tuple(sizes_of({k: batch[k] for k in program.inputs})[k] for k in example_sizes(program))


def compiled(program: Program, device: torch.device) -> tuple[Program, fx.GraphModule, dict[str, fx.GraphModule]]:
    """Graph modules of a static program; tensors made in the graph are made on ``device``."""
    program = program.clone()
    for _, graph in program.graphs():
        for node in graph.nodes:
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda a: device if isinstance(a, torch.device) else a
            )
    blocks = {k: fx.GraphModule(nn.Module(), g) for k, g in program.blocks.items()}
    root = nn.Module()
    for name, block in blocks.items():
        root.add_module(name, block)
    return program, fx.GraphModule(root, program.graph), blocks


def run(program: Program, outer: fx.GraphModule, blocks: dict[str, fx.GraphModule], values: dict[str, Any]) -> Any:
    given = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.meta["name"] not in values:
                raise TraceError(f"no value for {node.meta['kind']} {node.meta['name']!r}")
            given.append(values[node.meta["name"]])
    return outer(*given)
