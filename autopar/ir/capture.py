"""Seeing a module's repeated blocks and custom autograd functions while torch.export runs through it."""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

from autopar.errors import TraceError
from autopar.ir import markers
from autopar.ir.markers import Outputs

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class CustomFunction:
    """A call of an `autograd.Function` subclass: its class, and its arguments with tensors left out."""

    cls: type
    arguments: tuple[Any, ...]  # a tensor is its position among the tensors, wrapped in `Slot`
    single: bool
    pointwise: bool


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among a call's tensors."""

    index: int


@dataclass
class Instance:
    """One block of the module tree: where it is, and among how many alike."""

    path: str
    signature: str
    index: int
    count: int


@dataclass
class Capture:
    """What was seen during one trace."""

    full: bool
    instances: dict[str, Instance] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # call key → how it was traced last
    calls: list[tuple[str, str]] = field(default_factory=list)  # (marker id, path) in order
    functions: dict[str, CustomFunction] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)  # call key → names of its tensor arguments
    inside: bool = False


# ------------------------------------------------------------------ which modules are repeated


def integers(module: nn.Module) -> dict[str, int]:
    """Plain integer attributes of a module and its children by dotted name."""
    return {
        f"{path}.{name}": value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_")
    }


def layer_numbers(children: list[nn.Module]) -> set[str]:
    """The integer attributes that are every child's own index: they number the layers and mean nothing else."""
    if len(children) < 2:
        return set()
    tables = [integers(c) for c in children]
    common = set.intersection(*[set(t) for t in tables])
    return {name for name in common if all(t[name] == i for i, t in enumerate(tables))}


def signature(module: nn.Module, numbers: set[str], seen: dict[int, str], path: str = "") -> str:
    """A module's structure as text: classes, shapes, plain attributes, without what only numbers the layers."""
    parts = [type(module).__module__, type(module).__qualname__, str(module.training)]
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        shape = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        parts.append(f"{name}:{shape}")
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training" or f"{path}.{name}" in numbers:
            continue
        if isinstance(value, PLAIN) or isinstance(value, (tuple, list)) and all(isinstance(v, PLAIN) for v in value):
            parts.append(f"{name}={value!r}")
        elif isinstance(value, torch.Tensor):
            parts.append(f"{name}:tensor{tuple(value.shape)}")
        else:
            parts.append(f"{name}@{seen.setdefault(id(value), str(len(seen)))}" if not callable(value) else name)
    for name, child in module._modules.items():
        if child is not None:
            parts.append(f"{name}({signature(child, numbers, seen, f'{path}.{name}' if path else name)})")
    return "|".join(parts)


def repeated(root: nn.Module) -> dict[str, Instance]:
    """The outermost children of containers that have parameters and occur more than once by structure."""
    found: dict[str, Instance] = {}

    def visit(module: nn.Module, path: str) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        container = isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        if container:
            shared: dict[int, str] = {}
            children = {n: c for n, c in module._modules.items() if c is not None}
            numbers = layer_numbers(list(children.values()))
            for name, child in children.items():
                if next(child.parameters(), None) is not None:
                    groups[signature(child, numbers, shared)].append(f"{path}{name}")
        for text, paths in groups.items():
            if len(paths) > 1:
                for i, where in enumerate(paths):
                    found[where] = Instance(where, text, i, len(paths))
        for name, child in module._modules.items():
            if child is not None and f"{path}{name}" not in found:
                visit(child, f"{path}{name}.")

    visit(root, "")
    shared_modules = defaultdict(set)
    for path in found:
        shared_modules[id(root.get_submodule(path))].add(path)
    return {p: i for p, i in found.items() if len(shared_modules[id(root.get_submodule(p))]) == 1}


# ------------------------------------------------------------------ block calls


def describe(value: Any) -> str:
    """A call argument as text; a foreign object stands for itself and cannot be shared between calls."""
    if isinstance(value, torch.Tensor):
        return f"T{tuple(value.shape)}{value.dtype}{value.requires_grad}"
    if isinstance(value, PLAIN) or isinstance(value, (torch.SymInt, torch.SymBool)):
        return f"{type(value).__name__}:{value}"
    return f"object:{id(value)}"


def foreign(values: list[Any]) -> bool:
    """Whether an argument is an object with a state of its own (a key-value cache): then nothing is folded."""
    allowed = (*PLAIN, torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)
    return any(not isinstance(v, allowed) for v in values)


def traced_block(capture: Capture, instance: Instance, module: nn.Module, original: Any) -> Any:
    """The forward that stands in for a block's own while tracing."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if capture.inside or foreign(flat):
            return original(*args, **kwargs)
        tensors = [v for v in flat if isinstance(v, torch.Tensor)]
        key = f"{instance.signature}§{spec}§{[describe(v) for v in flat]}"
        short = capture.keys.setdefault(key, f"k{len(capture.keys)}")
        capture.names.setdefault(short, tensor_names(original, args, kwargs))
        call = f"{short}#{len(capture.calls)}"
        capture.calls.append((call, instance.path))
        inline = capture.full or instance.index in (0, 1, instance.count - 1) or short not in markers.RECORDED
        if not inline:
            return rebuilt(torch.ops.autopar.block(tensors, call_key(call, short)), *OUT_SPECS[short])
        entered = iter(torch.ops.autopar.enter(tensors, call))
        flat = [next(entered) if isinstance(v, torch.Tensor) else v for v in flat]
        args, kwargs = pytree.tree_unflatten(flat, spec)
        capture.inside = True
        try:
            result = original(*args, **kwargs)
        finally:
            capture.inside = False
        leaves, out_spec = pytree.tree_flatten(result)
        if not all(isinstance(o, (torch.Tensor, *PLAIN)) for o in leaves):
            raise UnfoldableError(f"{instance.path} returns a {type(result).__name__} with a state of its own")
        out = [o for o in leaves if isinstance(o, torch.Tensor)]
        markers.RECORDED[short] = Outputs(tuple(out), tuple(o.requires_grad for o in out))
        OUT_SPECS[short] = [Slot(0) if isinstance(o, torch.Tensor) else o for o in leaves], out_spec
        return rebuilt(torch.ops.autopar.leave(out, call), *OUT_SPECS[short])

    return forward


def rebuilt(tensors: list[torch.Tensor], leaves: list[Any], spec: Any) -> Any:
    """A block's result as its caller wants it: tensors put into their places among plain values."""
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if isinstance(v, Slot) else v for v in leaves], spec)


def tensor_names(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A readable name for every tensor among a call's arguments, from the signature."""
    positional = list(inspect.signature(forward).parameters)
    names = []
    for keys, value in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(value, torch.Tensor):
            first, *rest = [str(getattr(k, "key", getattr(k, "idx", ""))) for k in keys[1:]]
            if keys[0].idx == 0:
                first = positional[int(first)] if int(first) < len(positional) else f"arg{first}"
            names.append("_".join([first, *rest]))
    return names


class UnfoldableError(Exception):
    """A block returned an object that is neither tensor nor plain value: trace without folding."""


OUT_SPECS: dict[str, Any] = {}


def call_key(call: str, short: str) -> str:
    markers.RECORDED[call] = markers.RECORDED[short]
    return call


# ------------------------------------------------------------------ custom autograd functions


def traced_function(capture: Capture, original: Any) -> Any:
    """The `Function.apply` that records a user's function as one node, so that its own backward is kept."""

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.split(".")[0] == "torch" or kwargs or not any(isinstance(a, torch.Tensor) for a in args):
            return original.__func__(cls, *args, **kwargs)
        if "<locals>" in cls.__qualname__:
            raise TraceError(
                f"{cls.__module__}.{cls.__qualname__}: a torch.autograd.Function defined inside a function cannot be "
                "traced, its backward would be lost; define it at module level"
            )
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        places = iter(range(len(tensors)))
        template = tuple(Slot(next(places)) if isinstance(a, torch.Tensor) else a for a in args)
        if not all(isinstance(a, (Slot, *PLAIN)) for a in template):
            raise TraceError(f"{cls.__module__}.{cls.__qualname__}.apply: arguments must be tensors or plain values")
        context = Context()
        with disable_proxy_modes_tracing(), torch.no_grad(), Seen() as seen:
            result = cls.forward(context, *args)  # type: ignore[attr-defined]
        single = isinstance(result, torch.Tensor)
        outputs = (result,) if single else tuple(result)
        key = f"f{len(capture.functions)}"
        pointwise = single and seen.pointwise and backward_is_pointwise(cls, context, result)
        capture.functions[key] = CustomFunction(cls, template, single, pointwise)
        grad = any(t.requires_grad for t in tensors)
        markers.RECORDED[key] = Outputs(outputs, tuple(grad and o.is_floating_point() for o in outputs))
        values = torch.ops.autopar.function(tensors, key)
        return values[0] if single else tuple(values)

    return classmethod(apply)


class Context:
    """Stands in for the autograd context while a function's outputs and kind are wanted."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Any, ...] = ()
        self.needs_input_grad = (True,) * 16

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def backward_is_pointwise(cls: Any, context: Context, output: torch.Tensor) -> bool:
    """Whether a function's backward does pointwise work only; one that cannot be run alone counts as not."""
    try:
        with disable_proxy_modes_tracing(), torch.no_grad(), Seen() as seen:
            cls.backward(context, torch.empty_like(output))
    except Exception:
        return False
    return seen.pointwise


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notices whether everything a function does is pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        harmless = func.namespace == "prim" or func is torch.ops.aten.empty_like.default
        self.pointwise &= torch.Tag.pointwise in func.tags or harmless
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------ contexts


@contextlib.contextmanager
def watching(root: nn.Module, *, fold: bool, full: bool) -> Iterator[Capture]:
    """Patch ``root``'s repeated blocks and `Function.apply` for the time of a trace."""
    capture = Capture(full)
    markers.RECORDED.clear()
    OUT_SPECS.clear()
    capture.instances = repeated(root) if fold else {}
    patched: list[nn.Module] = []
    original = vars(torch.autograd.Function)["apply"]
    try:
        for path, instance in capture.instances.items():
            module = root.get_submodule(path)
            if "forward" not in vars(module):
                module.forward = traced_block(capture, instance, module, module.forward)
                patched.append(module)
        torch.autograd.Function.apply = traced_function(capture, original)  # type: ignore[method-assign]
        with Literals():
            yield capture
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
        for module in patched:
            del module.forward
        markers.RECORDED.clear()
        OUT_SPECS.clear()


class Literals(TorchFunctionMode):
    """Keeps the values of literals that a model on the meta device would lose: `torch.tensor(3.0)`, `x[:, [0, 2]]`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            return literal(func, *args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i, device="cpu") if plain_list(i) else i for i in index), *args[2:])
        return func(*args, **kwargs)


def plain_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, (int, bool)) for v in value)


def literal(make: Any, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    if device.type != "meta" or not isinstance(data, (int, float, bool, list, tuple)):
        return make(data, *args, **kwargs)
    value = make(data, *args, **{**kwargs, "device": "cpu"})
    if value.dim() == 0:
        return torch.full((), data, dtype=value.dtype, device=device)
    return value.to(device)


@contextlib.contextmanager
def on_meta(root: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """All tensors of a module on the meta device for a while: one device kind, one graph; ties are kept.

    Yields the originals by the id of their stand-in.
    """
    originals: dict[int, torch.Tensor] = {}
    stand_ins: dict[int, torch.Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in stand_ins:
            empty = torch.empty_like(tensor, device="meta").requires_grad_(False)
            new = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            stand_ins[id(tensor)], originals[id(new)] = new, tensor
        return stand_ins[id(tensor)]

    try:
        for module in root.modules():
            for table in (module._parameters, module._buffers, vars(module)):
                for name, value in list(table.items()):
                    if isinstance(value, torch.Tensor):
                        undo.append((table, name, value))
                        table[name] = stand_in(value)
        yield originals
    finally:
        for table, name, value in undo:
            table[name] = value
