"""Rules: how each operator may be split, found by their presence in the folder ``rules/``.

A rule is a function from a call (an `fx.Node` of a static program, ``meta["val"]`` filled in) to one sentence of the
notation, or None where this call has no freedom::

    @rule(aten.softmax.int, examples=[example(aten.softmax.int, tensor(4, 6), -1)])
    def softmax(node):
        names = frozen(letters(len(shape(node))), [arguments(node)["dim"]])
        return f"{term(names)} -> {term(names)}"

``localize=`` says which arguments change on local tensors, ``special=`` adds strategies with a local function of their
own. The oracle (`autopar.sharding.oracle`) proves every example of every rule.

An operator in place (``add_``) has the freedom of the one that is not. Whoever emits code must not run it in place on a
value that was moved, nor where the value has other readers: the change would reach a copy alone.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

import torch
from torch import fx

from autopar.ir.ops import operands
from autopar.sharding import notation
from autopar.sharding.call import Shape, arguments, input_shapes, output_shapes, parameters, tensors
from autopar.sharding.notation import Pieces
from autopar.sharding.placement import P, Placement, R, S, local_shape
from autopar.sharding.strategy import Strategy

Text = Callable[[fx.Node], str | None]
AnyText = TypeVar("AnyText", bound=Text)


@dataclass(frozen=True)
class Local:
    """What ``localize`` is told: the call, the strategy, and the local shapes of operands and outputs."""

    node: fx.Node
    strategy: Strategy
    degree: int
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


Localize = Callable[[dict[str, Any], Local], dict[str, Any]]
Special = Callable[[fx.Node, int], list[Strategy]]


@dataclass(frozen=True)
class Rule:
    """One rule. ``file`` is where it stands, for messages."""

    text: Text
    examples: tuple[Any, ...]
    localize: Localize | None
    special: Special | None
    file: str


_BY_TARGET: dict[Any, Rule] = {}


def rule(
    *targets: Any, examples: Sequence[Any], localize: Localize | None = None, special: Special | None = None
) -> Callable[[AnyText], AnyText]:
    """Register the decorated function for operator overloads, for operators registered elsewhere by name
    (``"autopar::rms_norm"``), or for all that carry a `torch.Tag` and have no rule of their own.

    Raises `notation.NotationError` if one of them has a rule already.
    """

    def register(text: AnyText) -> AnyText:
        file = inspect.getsourcefile(text) or "?"
        made = Rule(text, tuple(examples), localize, special, file)
        for target in targets:
            other = _BY_TARGET.setdefault(target, made)
            if other is not made:
                raise notation.NotationError(f"two rules for {target}: in {other.file} and in {file}")
        find.cache_clear()
        return text

    return register


@lru_cache(maxsize=1)
def rules() -> Mapping[Any, Rule]:
    """Every rule of the folder, by operator overload or tag."""
    package = importlib.import_module("autopar.sharding.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"autopar.sharding.rules.{module.name}")
    return _BY_TARGET


@cache
def find(target: Any) -> Rule | None:
    """The rule of an operator: its own (by name or type, too), else of one of its tags, else of what it does in place."""
    known = rules()
    if target in known or not isinstance(target, torch._ops.OpOverload):
        return known.get(target) or known.get(type(target))
    named = known.get(target._schema.name) or next((known[t] for t in target.tags if t in known), None)
    return named or find(_functional(target))


def _functional(target: torch._ops.OpOverload) -> Any:
    """``aten.masked_fill.Scalar`` for ``aten.masked_fill_.Scalar``; None for what is not in place."""
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and target.namespace == "aten" else None
    return getattr(packet, target._overloadname, None)


# ---------------------------------------------------------------------------------------------------- the cache


def _freeze(value: Any) -> Any:
    if isinstance(value, fx.Node):
        held = value.meta["val"]
        return (tuple(held.shape), held.dtype) if isinstance(held, torch.Tensor) else value
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in value.items())
    return value if type(value) in (int, float, str) or value is None else repr(value)  # True == 1, yet differs


def key(node: fx.Node) -> Any:
    """What a call's freedom depends on: equal keys, equal strategies."""
    return node.target, _freeze(node.args), _freeze(node.kwargs)


_TEXTS: dict[Any, str | None] = {}
_STRATEGIES: dict[Any, list[Strategy]] = {}


def clear() -> None:
    """Forget what was computed for calls seen before (rules stay)."""
    _TEXTS.clear()
    _STRATEGIES.clear()


def sentence_of(node: fx.Node) -> str | None:
    """The sentence of a call's rule, or None: no rule, or no freedom in this call."""
    if node.op != "call_function":
        return None
    at = key(node)
    if at not in _TEXTS:
        found = find(node.target)
        _TEXTS[at] = found.text(node) if found else None
    return _TEXTS[at]


# ---------------------------------------------------------------------------------------------------- the questions


def placements(shape: Shape, degree: int, patterns: Sequence[Mapping[int, set[Pieces]]] = ()) -> list[Placement]:
    """Every placement of a tensor on ``degree`` devices but P. ``patterns``: dim → pieces it may also be cut in."""
    found = [R]
    for dim, size in enumerate(shape):
        extra = sorted({p for by_dim in patterns for p in by_dim.get(dim, ())})
        for pieces in ((size,), *extra):
            if size and sum(pieces) == size and all(p % degree == 0 for p in pieces):
                found.append(S(dim, pieces))
    return found


def strategies(node: fx.Node, degree: int, patterns: Mapping[fx.Node, Any] | None = None) -> list[Strategy]:
    """Every option of a node on ``degree`` devices, all-replicated first. ``patterns``: of `collect_patterns`.

    - an operator with a rule: what its sentence expands to; without one: replicated only (`is_unsplit`);
    - a parameter: R or S(d) of each dim that divides, also in the pieces its readers like; other placeholders: R (a
      shard of one is cut locally, by the edge's free ``slice``). What a block's inputs may be is its callers' affair:
      the solver ties them (`placements` lists the choices);
    - ``getitem``: the chosen output of its producer handed on, as it is (also as a partial sum);
    - ``output`` and block calls: replicated; the solver ties them to the graph's outputs and to the block's choices.
    """
    mine = (patterns or {}).get(node, {})
    if node.op == "call_function" and shares_changed_memory(node):
        return [Strategy((R,) * len(operands(node)), (R,) * len(output_shapes(node)))]
    if node.op == "call_function" and node.target is not operator.getitem:
        return _of_operator(node, degree, mine)
    if node.op == "placeholder":
        if node.meta.get("kind") != "parameter":
            return [Strategy((), (R,))]
        return [Strategy((), (p,)) for p in placements(output_shapes(node)[0], degree, [_by_dim(mine)])]
    if node.op == "call_function":
        held = placements(output_shapes(node)[0], degree, [_by_dim(mine)])
        return [Strategy((p,), (p,)) for p in (*held, P)]
    outputs = () if node.op == "output" else (R,) * len(output_shapes(node))
    return [Strategy((R,) * len(operands(node)), outputs)]


def shares_changed_memory(node: fx.Node) -> bool:
    """Whether a value's memory is changed in place (through a view of it, perhaps): a shard or a copy would miss that."""
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        schema = getattr(here.target, "_schema", None)
        if schema is None:
            continue
        if schema.is_mutable and here.op == "call_function":
            return True
        views = [u for u in here.users if u.op == "call_function" and _touches(u, here)]
        if any(r.alias_info is not None for r in schema.returns) and isinstance(here.args[0], fx.Node):
            views.append(here.args[0])
        for other in views:
            if other not in seen and other.op == "call_function":
                seen.add(other)
                stack.append(other)
    return False


def _touches(user: fx.Node, source: fx.Node) -> bool:
    """Whether a reader views or changes the memory of ``source``."""
    schema = getattr(user.target, "_schema", None)
    return schema is not None and user.args[0] is source and any(r.alias_info is not None for r in schema.returns)


def _by_dim(mine: Mapping[str, set[Pieces]]) -> dict[int, set[Pieces]]:
    """The patterns of a node without a sentence are filed under ``a0``, ``a1``, …: its output's dims."""
    return {int(letter[1:]): pieces for letter, pieces in mine.items()}


def _of_operator(node: fx.Node, degree: int, mine: Mapping[str, set[Pieces]]) -> list[Strategy]:
    at = key(node), degree, tuple(sorted((k, tuple(sorted(v))) for k, v in mine.items())) if mine else ()
    if at not in _STRATEGIES:
        _STRATEGIES[at] = _expand(node, degree, mine)
    return _STRATEGIES[at]


def _expand(node: fx.Node, degree: int, mine: Mapping[str, set[Pieces]]) -> list[Strategy]:
    text = sentence_of(node)
    if text is None:
        return [Strategy((R,) * len(operands(node)), (R,) * len(output_shapes(node)))]
    found = notation.expand(text, input_shapes(node), output_shapes(node), degree, mine)
    special = find(node.target).special  # type: ignore[union-attr]
    types = [o.meta["val"].dtype for o in operands(node)], [t.dtype for t in tensors(node.meta["val"])]
    kept = [s for s in found if not _sums_of_truth(s, *types)]
    return kept + (special(node, degree) if special else [])


def _sums_of_truth(strategy: Strategy, inputs: list[torch.dtype], outputs: list[torch.dtype]) -> bool:
    """Whether a boolean tensor would be a partial sum: there is no such thing."""
    pairs = (*zip(strategy.inputs, inputs, strict=True), *zip(strategy.outputs, outputs, strict=True))
    return any(p == P and dtype == torch.bool for p, dtype in pairs)


def is_unsplit(node: fx.Node) -> bool:
    """Whether nothing is known of how this operator may be split, so that every device does all of it."""
    return node.op == "call_function" and node.target is not operator.getitem and sentence_of(node) is None


def addends(node: fx.Node, strategy: Strategy) -> tuple[int, ...]:
    """Positions in `operands` that each device divides by the degree: the bias of a linear whose sum is partial."""
    text = sentence_of(node)
    return notation.addends(text, strategy) if text else ()


def local_args(node: fx.Node, strategy: Strategy, degree: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments on local tensors: operands stay nodes, sizes and counts become local ones.

    (Operands in `addends` must be divided by the degree by whoever emits the call.)
    """
    found = find(node.target) if node.op == "call_function" else None
    if found is None or found.localize is None or strategy.replicated:
        return tuple(node.args), dict(node.kwargs)
    inputs = tuple(local_shape(p, s, degree) for p, s in zip(strategy.inputs, input_shapes(node), strict=True))
    outputs = tuple(local_shape(p, s, degree) for p, s in zip(strategy.outputs, output_shapes(node), strict=True))
    bound = arguments(node)
    changed = found.localize(bound, Local(node, strategy, degree, inputs, outputs))
    return _rebuild(node, {k: v for k, v in changed.items() if v != bound[k]})


def _rebuild(node: fx.Node, changed: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's own arguments with some replaced, as few as possible respelled."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for i, (name, *_) in enumerate(parameters(node.target)):  # type: ignore[arg-type]
        if name in changed:
            if i < len(args):
                args[i] = changed[name]
            else:
                kwargs[name] = changed[name]
    return tuple(args), kwargs
