"""nn.Module and example batch → Program, through torch.export; repeated blocks are traced once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autopar.errors import AutoparError, TraceError
from autopar.ir.blocks import fold
from autopar.ir.capture import Capture, MismatchError, UnfoldableError, watching
from autopar.ir.functions import restore
from autopar.ir.importer import flatten
from autopar.ir.inputs import meta_inputs, resized, sizes_of, symbols
from autopar.ir.naming import held, label, roles_of, strip, table
from autopar.ir.objective import Loss, Objective, named_batch
from autopar.ir.program import Program, symbolic_sizes
from autopar.ir.reasons import explained, first_line
from autopar.ir.specialize import annotate
from autopar.ir.standin import on_meta
from autopar.ir.state import StashError


def trace(model: nn.Module, batch: Any, *, loss: Loss | None = None, full: bool = False) -> Program:
    """Trace ``model`` and its objective on an example ``batch`` (real, fake or meta tensors; only shapes are read).

    ``full`` traces every block inline instead of once per distinct block. The batch size (dim 0) and the sequence length
    (dim 1 of the first two-dimensional integer input) are symbols of the program where the model allows it; a model that
    does not is traced again at each size. `Program.history` tells what was given up, and why. Raises `TraceError`,
    naming the module.
    """
    example = {k: v for k, v in named_batch(model, batch).items() if v is not None}
    training = {m: m.training for m in model.modules()}
    try:
        if not any(training.values()):
            model.train()
        return attempts(Objective(model, loss), example, Way(full=full))
    finally:
        for module, flag in training.items():
            module.training = flag


@dataclass(frozen=True)
class Way:
    """How to trace. ``symbolic``: batch and sequence are symbols, else the example's own sizes are fixed. ``folded``: blocks
    are marked; ``full``: each is traced inline. ``stashes``: attributes that forward assigns, by module path."""

    symbolic: bool = True
    folded: bool = True
    full: bool = False
    stashes: frozenset[tuple[str, str]] = field(default=frozenset())

    def after(self, problem: Exception) -> Way | None:
        """The next way to try after a failure: what the model does not allow is given up, the least first."""
        if isinstance(problem, StashError):
            return replace(self, stashes=self.stashes | problem.stashes)
        if isinstance(problem, MismatchError) and not self.full:
            return replace(self, full=True)
        if isinstance(problem, (MismatchError, UnfoldableError)):
            return replace(self, folded=False, full=True)
        if self.folded and not self.full:  # something a block leaves behind may be missing where one node stood for it
            return replace(self, full=True)
        return replace(self, symbolic=False) if self.symbolic else None


def attempts(objective: Objective, example: dict[str, Any], way: Way) -> Program:
    """Folded and symbolic first; the reasons for every other way are kept in the program's history."""
    sizes = sizes_of(example)
    history: list[str] = []
    while True:
        try:
            program = once(objective, example, sizes, way)
        except AutoparError:
            raise
        except Exception as problem:
            following = way.after(problem)
            if following is None:
                raise TraceError(explained(problem, objective.model)) from problem
            history.append(given_up(way, following, problem))
            way = following
        else:
            program.history = [*dict.fromkeys([*history, *program.history])]
            return program


def given_up(way: Way, following: Way, problem: Exception) -> str:
    if following.stashes != way.stashes:
        return f"trace: {first_line(problem)} holds a result of forward; taken for this run's own"
    what = "sizes fixed" if not following.symbolic else "every block traced" if following.folded else "not folded"
    return f"trace: {what} ({strip(first_line(problem))})"


def once(objective: Objective, example: dict[str, Any], sizes: dict[str, int], way: Way) -> Program:
    """One trace."""
    inputs, dynamic = meta_inputs(example, sizes, symbolic=way.symbolic)
    tensors = held(objective.model)
    watched = watching(objective, fold=way.folded, full=way.full, stashes=way.stashes)
    with on_meta(objective) as originals, watched as seen, symbolic_sizes():
        exported = export(objective, inputs, dynamic)
        graph = flatten(exported.graph_module)
    label(graph, exported, inputs, tensors, originals)
    restore(graph, seen.functions)
    for node in graph.nodes:
        node.meta["path"] = strip(str(node.meta.get("path", "")))
    parameters = table(objective.model.named_parameters(remove_duplicate=False))
    kept = objective.model.state_dict().keys()
    buffers = {
        name: replace(buffer, persistent=name in kept)
        for name, buffer in table(objective.model.named_buffers(remove_duplicate=False)).items()
    }
    with symbolic_sizes():
        outer, blocks = fold(graph, unprefixed(seen), {n: p.alias_of for n, p in {**parameters, **buffers}.items()})
    program = Program(
        graph=outer,
        blocks=blocks,
        parameters=parameters,
        buffers=buffers,
        tensors=tensors,
        inputs=example,
        sizes=symbols(outer, sizes) if way.symbolic else {},
        roles=roles_of(objective.model),
        history=[f"trace: {strip(note)}" for note in seen.notes],
    )
    if not way.symbolic:
        program.respecialize = lambda _program, wanted: once(objective, resized(example, sizes, wanted), wanted, way)
    annotate(program, sizes)
    return program


def export(objective: Objective, inputs: dict[str, Any], dynamic: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = None if dynamic is None else (dynamic,)
        return torch.export.export(objective, (inputs,), dynamic_shapes=shapes, strict=False)


def unprefixed(seen: Capture) -> Capture:
    return Capture(seen.full, calls=[(c, strip(p)) for c, p in seen.calls], names=seen.names)
