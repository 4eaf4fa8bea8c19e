"""Custom autograd functions seen while tracing: recorded as one node, so that their own backward is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import TraceError
from autopar.ir import markers
from autopar.ir.markers import Outputs
from autopar.ir.signature import PLAIN


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among a call's tensors."""

    index: int


@dataclass(frozen=True)
class CustomFunction:
    """A call of an `autograd.Function` subclass: its class, and its arguments with tensors left out."""

    cls: type
    arguments: tuple[Any, ...]  # a tensor is its position among the tensors, wrapped in `Slot`
    single: bool
    pointwise: bool


@contextlib.contextmanager
def functions_recorded(found: dict[str, CustomFunction]) -> Iterator[None]:
    """Patch `Function.apply` for a while: calls of users' functions go into ``found`` by key."""
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.split(".")[0] == "torch" or not any(isinstance(a, torch.Tensor) for a in args):
            return original.__func__(cls, *args, **kwargs)
        return recorded(found, cls, args, kwargs)

    try:
        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def recorded(found: dict[str, CustomFunction], cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a user's function as a marker node; only its forward runs, on fake tensors, for the outputs' shapes."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if "<locals>" in cls.__qualname__:
        raise TraceError(
            f"{name}: a torch.autograd.Function defined inside a function cannot be traced, its backward would be lost; "
            "define it at module level"
        )
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    places = iter(range(len(tensors)))
    template = tuple(Slot(next(places)) if isinstance(a, torch.Tensor) else a for a in args)
    if kwargs or not all(isinstance(a, (Slot, *PLAIN)) for a in template):
        raise TraceError(f"{name}.apply: arguments must be tensors or plain values, given by position")
    context = Context(args)
    with disable_proxy_modes_tracing(), torch.no_grad(), Seen() as seen:
        result = forwarded(cls, context, args)
    single = isinstance(result, torch.Tensor)
    outputs = (result,) if single else tuple(result)
    if not all(isinstance(o, torch.Tensor) for o in outputs):
        raise TraceError(f"{name}.apply: results must be tensors")
    key = f"f{len(found)}"
    pointwise = single and seen.pointwise and backward_is_pointwise(cls, context, result)
    found[key] = CustomFunction(cls, template, single, pointwise)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    flows = tuple(grad and o.is_floating_point() and not context.constant(o) for o in outputs)
    markers.RECORDED[key] = Outputs(outputs, flows)
    values = torch.ops.autopar.function(tensors, key)
    return values[0] if single else tuple(values)


def forwarded(cls: Any, context: Context, args: tuple[Any, ...]) -> Any:
    """Run ``cls.forward`` in either of the two styles torch has: with the context, or with `setup_context`."""
    if cls.setup_context is torch.autograd.Function.setup_context:
        return cls.forward(context, *args)
    result = cls.forward(*args)
    cls.setup_context(context, args, result)
    return result


class Context:
    """Stands in for the autograd context while a function's outputs and kind are wanted."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.saved_tensors: tuple[Any, ...] = ()
        self.needs_input_grad = tuple(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        self.without_gradient: tuple[Any, ...] = ()

    def constant(self, output: torch.Tensor) -> bool:
        return any(o is output for o in self.without_gradient)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self.without_gradient = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        raise TraceError("a torch.autograd.Function that changes its inputs in place (mark_dirty) cannot be traced")

    def set_materialize_grads(self, value: bool) -> None: ...


def backward_is_pointwise(cls: Any, context: Context, output: torch.Tensor) -> bool:
    """Whether a function's backward does pointwise work only; one that cannot be run alone counts as not."""
    try:
        with disable_proxy_modes_tracing(), torch.no_grad(), Seen() as seen:
            cls.backward(context, torch.empty_like(output))
    except Exception:
        return False
    return seen.pointwise


class Seen(TorchDispatchMode):
    """Notices whether everything a function does is pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        harmless = func.namespace == "prim" or func is torch.ops.aten.empty_like.default
        self.pointwise &= torch.Tag.pointwise in func.tags or harmless
        return func(*args, **(kwargs or {}))
