"""A Program: a traced graph, folded into its repeated blocks, and the parameters it reads. See docs/interfaces.md."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from autopar.ir.adapters import Adapter
from autopar.ir.initial import Initial

OUTER = "program"


@dataclass(frozen=True)
class Advance:
    """How a buffer that operators write into goes from step to step: column 0 of its last dim is what a step observed, of
    which all devices take the largest; then a torch operator (``namespace::name``) changes it in place, with options."""

    operator: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, state: torch.Tensor) -> None:
        namespace, name = self.operator.split("::")
        getattr(getattr(torch.ops, namespace), name)(state, **dict(self.options))


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer the program reads. ``alias_of``: the first name of the tensor it is tied to. ``advance``: of a
    buffer that is state, carried from step to step."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True
    alias_of: str | None = None
    role: str | None = None
    persistent: bool = True  # part of the model's own state_dict
    advance: Advance | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class Program:
    """One micro-batch of one replica: inputs to ``(loss_sum, count)``.

    ``tensors`` holds what the traced module held (real, fake or meta tensors) by original name, constants included;
    ``sizes`` the example's value of every symbol; ``respecialize`` makes the static program at other sizes.
    """

    graph: fx.Graph
    blocks: dict[str, fx.Graph]
    parameters: dict[str, Parameter]
    buffers: dict[str, Parameter]
    tensors: dict[str, torch.Tensor]
    inputs: dict[str, Any]
    sizes: dict[str, int]
    history: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)  # module path → its role in the model's family
    initial: dict[str, Initial] = field(default_factory=dict)  # parameters that passes added → their first values
    adapters: list[Adapter] = field(default_factory=list)  # what PEFT passes train, in order
    precision: dict[str, str] | None = None  # compute, master, frozen, reduce → dtype names, set by a pass
    recompute: tuple[str, ...] | None = None  # groups and globs of what may run again, set by a pass; None: everything
    respecialize: Callable[[Program, dict[str, int]], Program] | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what was computed of it; not cloned

    def graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        yield OUTER, self.graph
        yield from self.blocks.items()

    def calls(self) -> list[fx.Node]:
        """The block calls, in order: block call i of a plan's stages is ``calls()[i]``."""
        return [n for n in self.graph.nodes if n.op == "call_module"]

    def read(self) -> list[str]:
        """The names of the parameters and buffers that the program reads."""
        kinds = ("parameter", "buffer")
        return [n.meta["name"] for n in self.graph.nodes if n.op == "placeholder" and n.meta["kind"] in kinds]

    def clone(self) -> Program:
        """A deep copy of the graphs; tensors are shared."""
        return replace(
            self,
            graph=copy_graph(self.graph),
            blocks={k: copy_graph(g) for k, g in self.blocks.items()},
            parameters=dict(self.parameters),
            buffers=dict(self.buffers),
            tensors=dict(self.tensors),
            inputs=dict(self.inputs),
            history=list(self.history),
            roles=dict(self.roles),
            initial=dict(self.initial),
            adapters=list(self.adapters),
            precision=None if self.precision is None else dict(self.precision),
            memo={},
        )

    def at(self, *, batch: int | None = None, length: int | None = None) -> Program:
        """The static program for ``batch`` sequences of ``length`` (default: the example's)."""
        from autopar.ir.specialize import specialize

        return specialize(self, batch=batch, length=length)

    @property
    def mixes_batch(self) -> list[str]:
        """The operators whose result for one sequence depends on others of the batch, each with its reason. Unless this is
        empty, data parallelism and micro-batches change the result. See `autopar.ir.mixing`."""
        from autopar.ir.mixing import mixes_batch

        return mixes_batch(self)

    def module(self) -> torch.nn.Module:
        """A runnable module: called with the batch as the model is, returns ``(loss_sum, count)``, differentiable."""
        from autopar.ir.module import ProgramModule

        return ProgramModule(self)

    def save_adapter(self, folder: str | Path) -> Path:
        """Write what PEFT passes train in peft's own format; several adapters into a folder each, by method."""
        from autopar.ir.adapters import save_program

        return save_program(self, folder)

    def load_adapter(self, folder: str | Path) -> Program:
        """Fill the adapter's parameters from a folder that `save_adapter` or peft wrote; returns the program itself.

        Raises `CheckpointError` where the folder's method, options or tensors are not the program's.
        """
        from autopar.ir.adapters import load_program

        load_program(self, folder)
        return self

    def merge(self) -> Program:
        """A copy without adapters, each folded into the weights beside it. Raises `PassError` where one cannot be."""
        from autopar.ir.adapters import merged

        return merged(self)

    def __str__(self) -> str:
        from autopar.ir.text import text

        return text(self)


@contextlib.contextmanager
def symbolic_sizes() -> Iterator[None]:
    """While building graphs whose arguments hold symbolic sizes: fx warns about them, for tracers that mean otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Raw Sym")
        yield


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A structural copy with its own meta dicts."""
    new, env = fx.Graph(), {}
    with symbolic_sizes():
        for node in graph.nodes:
            env[node] = new.node_copy(node, lambda n: env[n])
            env[node].name = node.name
            env[node].meta = copy.copy(node.meta)
    return new
