"""Seeing a module's repeated blocks while torch.export runs through it: the first of each kind inline, later ones as one node."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from autopar.ir import markers
from autopar.ir.custom import CustomFunction, Slot, functions_recorded
from autopar.ir.markers import Outputs
from autopar.ir.signature import PLAIN, Instance, repeated
from autopar.ir.standin import Literals
from autopar.ir.state import Hidden, changes, noticed, state_of, state_restored

__all__ = ["Capture", "CustomFunction", "MismatchError", "Slot", "UnfoldableError", "watching"]


class MismatchError(Exception):
    """One instance of a block may differ from another that stands for it: trace them all."""


class UnfoldableError(Exception):
    """A block does more than turn arguments into results: trace without blocks."""


@dataclass
class Capture:
    """What was seen during one trace."""

    full: bool
    instances: dict[str, Instance] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # call key → its short name
    calls: list[tuple[str, str]] = field(default_factory=list)  # (marker id, path) in order
    functions: dict[str, CustomFunction] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)  # short call key → names of its tensor arguments
    results: dict[str, tuple[list[Any], Any]] = field(
        default_factory=dict
    )  # short call key → leaves, tree of its result
    notes: list[str] = field(default_factory=list)  # what the program's history should tell
    inside: str | None = None  # the block that is running inline


@contextlib.contextmanager
def watching(root: nn.Module, *, fold: bool, full: bool, stashes: Iterable[tuple[str, str]] = ()) -> Iterator[Capture]:
    """Patch ``root``'s repeated blocks and `Function.apply` for the time of a trace.

    ``stashes``: (module path, attribute) of what forward is known to assign; it starts without them.
    """
    capture = Capture(full, instances=repeated(root) if fold else {})
    markers.RECORDED.clear()
    hidden = Hidden()
    for instance in capture.instances.values():
        hidden.add_numbers(root.get_submodule(instance.path), instance, lambda what: number_read(capture, what))
    hidden.add_stashes(root, stashes)
    try:
        with (
            noticed(hidden),
            state_restored(root, set(stashes), capture.notes),
            blocks_patched(root, capture),
            functions_recorded(capture.functions),
            Literals(),
        ):
            yield capture
    finally:
        markers.RECORDED.clear()


@contextlib.contextmanager
def blocks_patched(root: nn.Module, capture: Capture) -> Iterator[None]:
    patched: list[nn.Module] = []
    try:
        for path, instance in capture.instances.items():
            module = root.get_submodule(path)
            if "forward" not in vars(module):
                module.forward = traced_block(capture, instance, module, module.forward)
                patched.append(module)
        yield
    finally:
        for module in patched:
            del module.forward


def number_read(capture: Capture, what: str) -> None:
    """A block's forward reads an attribute that numbers its layer: its siblings may run otherwise."""
    if capture.inside is not None and not capture.full:
        raise MismatchError(f"{capture.inside} reads {what} while it runs")


def traced_block(capture: Capture, instance: Instance, module: nn.Module, original: Callable[..., Any]) -> Any:
    """The forward that stands in for a block's own while tracing."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if capture.inside is not None:
            return original(*args, **kwargs)
        if foreign(flat):
            capture.notes.append(f"{instance.path} not folded (an argument is neither tensor nor plain value)")
            return original(*args, **kwargs)
        short = capture.keys.setdefault(call_key(instance, flat, spec), f"k{len(capture.keys)}")
        capture.names.setdefault(short, tensor_names(original, args, kwargs))
        call = f"{short}#{len(capture.calls)}"
        capture.calls.append((call, instance.path))
        tensors = [v for v in flat if isinstance(v, torch.Tensor)]
        ends = instance.index in (0, 1, instance.count - 1)
        if not (capture.full or ends or short not in markers.RECORDED):
            markers.RECORDED[call] = markers.RECORDED[short]
            return rebuilt(torch.ops.autopar.block(tensors, call), *capture.results[short])
        entered = iter(torch.ops.autopar.enter(tensors, call))
        flat = [next(entered) if isinstance(v, torch.Tensor) else v for v in flat]
        result = run_inline(capture, instance, module, original, flat, spec)
        leaves, out_spec = pytree.tree_flatten(result)
        if not all(isinstance(o, (torch.Tensor, *PLAIN)) for o in leaves):
            odd = next(o for o in leaves if not isinstance(o, (torch.Tensor, *PLAIN)))
            raise UnfoldableError(f"{instance.path} returns a {type(odd).__name__}")
        out = [o for o in leaves if isinstance(o, torch.Tensor)]
        if not out:
            raise UnfoldableError(f"{instance.path} returns no tensor")
        markers.RECORDED[short] = Outputs(tuple(out), tuple(o.requires_grad for o in out))
        capture.results[short] = [Slot(0) if isinstance(o, torch.Tensor) else o for o in leaves], out_spec
        return rebuilt(torch.ops.autopar.leave(out, call), *capture.results[short])

    return forward


def run_inline(
    capture: Capture, instance: Instance, module: nn.Module, original: Callable[..., Any], flat: list[Any], spec: Any
) -> Any:
    """A block's own forward; `UnfoldableError` if it changes itself or its arguments' containers."""
    args, kwargs = pytree.tree_unflatten(flat, spec)
    before = state_of(module)
    capture.inside = instance.path
    try:
        result = original(*args, **kwargs)
    finally:
        capture.inside = None
    changed = changes(before, state_of(module))
    if changed:
        raise UnfoldableError(f"{instance.path} changes {changed[0]} of its own while it runs")
    after, after_spec = pytree.tree_flatten((args, kwargs))
    if after_spec != spec or any(a is not b for a, b in zip(after, flat, strict=True)):
        raise UnfoldableError(f"{instance.path} changes a list or a dict among its arguments")
    return result


def call_key(instance: Instance, flat: list[Any], spec: Any) -> str:
    """Calls of equal key run alike: the block's structure, the arguments' metadata and plain values."""
    return f"{instance.signature}§{torch.is_grad_enabled()}§{spec}§{[describe(v) for v in flat]}"


def describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"T{tuple(value.shape)}{tuple(value.stride())}{value.dtype}{value.requires_grad}"
    return f"{type(value).__name__}:{value}"


def foreign(values: list[Any]) -> bool:
    """Whether an argument is an object with a state of its own (a key-value cache): then nothing is folded."""
    allowed = (*PLAIN, torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)
    return any(not isinstance(v, allowed) for v in values)


def rebuilt(tensors: list[torch.Tensor], leaves: list[Any], spec: Any) -> Any:
    """A block's result as its caller wants it: tensors put into their places among plain values."""
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if isinstance(v, Slot) else v for v in leaves], spec)


def tensor_names(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A readable name for every tensor among a call's arguments, from the signature."""
    positional = list(inspect.signature(forward).parameters)
    names = []
    for keys, value in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(value, torch.Tensor):
            first, *rest = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in keys[1:]]
            if getattr(keys[0], "idx", 1) == 0:
                first = positional[int(first)] if int(first) < len(positional) else f"arg{first}"
            names.append("_".join([first, *rest]))
    return names
