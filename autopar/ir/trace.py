"""nn.Module and example batch → Program, through torch.export; repeated blocks are traced once."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from autopar.errors import AutoparError, TraceError
from autopar.ir import capture as capturing
from autopar.ir.blocks import MismatchError, fold
from autopar.ir.capture import Capture, UnfoldableError
from autopar.ir.functions import restore
from autopar.ir.importer import flatten
from autopar.ir.objective import Loss, Objective, named_batch
from autopar.ir.program import Parameter, Program, symbolic_sizes
from autopar.ir.specialize import annotate

BATCH, SEQUENCE = 3, 12
"""Example sizes while tracing; any two numbers of at least 2 that no model would treat apart. Symbols stay symbols."""


def trace(model: nn.Module, batch: Any, *, loss: Loss | None = None, full: bool = False) -> Program:
    """Trace ``model`` and its objective on an example ``batch`` (real, fake or meta tensors; only shapes are read).

    ``full`` traces every block inline instead of once per distinct block. The batch size (dim 0) and the sequence length
    (dim 1 of the first two-dimensional integer input) are symbols of the program where the model allows it; a model that
    does not is traced again at each size. Raises `TraceError`, naming the module.
    """
    example = {k: v for k, v in named_batch(model, batch).items() if v is not None}
    objective = Objective(model, loss)
    training = {m: m.training for m in model.modules()}
    try:
        if not any(training.values()):
            model.train()
        return attempts(objective, example, full)
    finally:
        for module, flag in training.items():
            module.training = flag


def attempts(objective: Objective, example: dict[str, Any], full: bool) -> Program:
    """Folded and symbolic first; what a model does not allow is given up one at a time, the reason kept in history."""
    sizes = sizes_of(example)
    history: list[str] = []
    failure: Exception | None = None
    for symbolic, folded, inline in [(True, True, full), (True, True, True), (False, True, full), (False, False, True)]:
        try:
            program = once(objective, example, sizes, symbolic=symbolic, folded=folded, full=inline)
        except (MismatchError, UnfoldableError) as problem:
            history.append(f"trace: not folded ({problem})")
            failure = problem
        except AutoparError:
            raise
        except Exception as problem:
            if symbolic:
                history.append(f"trace: sizes fixed ({first_line(problem)})")
            failure = failure if isinstance(failure, TraceError) else problem
            if not symbolic:
                raise TraceError(explained(problem)) from problem
        else:
            program.history = [*dict.fromkeys(history)]
            return program
    raise TraceError(explained(failure))


def once(
    objective: Objective, example: dict[str, Any], sizes: dict[str, int], *, symbolic: bool, folded: bool, full: bool
) -> Program:
    """One trace. ``symbolic``: batch and sequence are symbols; else the example's own sizes are fixed."""
    inputs, dynamic = meta_inputs(example, sizes if symbolic else None)
    tensors = held(objective.model)
    with capturing.on_meta(objective) as originals, capturing.watching(objective, fold=folded, full=full) as seen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                objective, (inputs,), dynamic_shapes=(dynamic,) if symbolic else None, strict=False
            )
        with symbolic_sizes():
            graph = flatten(exported.graph_module)
        functions = dict(seen.functions)
    label(graph, exported, inputs, tensors, originals)
    restore(graph, functions)
    capture = unprefixed(seen)
    for node in graph.nodes:
        node.meta["path"] = strip(str(node.meta.get("path", "")))
    with symbolic_sizes():
        outer, blocks = fold(graph, capture, lambda n: n.meta["name"])
    program = Program(
        graph=outer,
        blocks=blocks,
        parameters=table(objective.model, objective.model.named_parameters(remove_duplicate=False)),
        buffers=table(objective.model, objective.model.named_buffers(remove_duplicate=False)),
        tensors=tensors,
        inputs=example,
        sizes=symbols(outer, sizes) if symbolic else {},
        roles=roles_of(objective.model),
    )
    if not symbolic:
        program.respecialize = lambda _program, wanted: once(
            objective, resized(example, sizes, wanted), wanted, symbolic=False, folded=folded, full=full
        )
    annotate(program, sizes)
    return program


# ------------------------------------------------------------------ the batch


def sizes_of(example: dict[str, Any]) -> dict[str, int]:
    """``batch`` (dim 0 of the tensors) and, where there is one, ``sequence``."""
    tensors = [v for v in pytree.tree_leaves(example) if isinstance(v, torch.Tensor) and v.dim() > 0]
    if not tensors:
        raise TraceError("the batch holds no tensor; give a mapping of names to tensors with the batch as first dim")
    sizes = {"batch": int(tensors[0].shape[0])}
    two = [t for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    if two:
        sizes["sequence"] = int(two[0].shape[1])
    return sizes


def meta_inputs(example: dict[str, Any], sizes: dict[str, int] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch on the meta device, at example sizes where these are symbols, and export's dynamic shapes."""
    dynamic: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for name, value in example.items():
        if not isinstance(value, torch.Tensor):
            inputs[name], dynamic[name] = value, None
            continue
        shape, marks = list(value.shape), {}
        for dim, size in enumerate(value.shape) if sizes is not None else ():
            if dim == 0 and size == sizes["batch"]:
                shape[dim], marks[dim] = BATCH, torch.export.Dim.DYNAMIC
            elif dim > 0 and size == sizes.get("sequence") and not value.is_floating_point():
                shape[dim], marks[dim] = SEQUENCE, torch.export.Dim.DYNAMIC
        inputs[name], dynamic[name] = torch.empty(shape, dtype=value.dtype, device="meta"), marks
    return inputs, dynamic


def resized(example: dict[str, Any], sizes: dict[str, int], wanted: dict[str, int]) -> dict[str, Any]:
    """Meta tensors of the example's kind at other sizes."""

    def shape(value: torch.Tensor) -> list[int]:
        new = list(value.shape)
        for dim, size in enumerate(value.shape):
            if dim == 0 and size == sizes["batch"]:
                new[dim] = wanted["batch"]
            elif dim > 0 and size == sizes.get("sequence") and not value.is_floating_point():
                new[dim] = wanted["sequence"]
        return new

    return {
        k: torch.empty(shape(v), dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v
        for k, v in example.items()
    }


def symbols(graph: fx.Graph, sizes: dict[str, int]) -> dict[str, int]:
    """Every symbol of the program by name → its size in the example: ``s77`` → 3."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "input":
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found[str(size.node.expr)] = sizes["batch" if dim == 0 else "sequence"]
    return found


# ------------------------------------------------------------------ names


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every name it has."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def table(model: nn.Module, named: Any) -> dict[str, Parameter]:
    first: dict[int, str] = {}
    found: dict[str, Parameter] = {}
    for name, tensor in named:
        alias = first.setdefault(id(tensor), name)
        found[name] = Parameter(
            name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, alias if alias != name else None
        )
    return found


def roles_of(model: nn.Module) -> dict[str, str]:
    """The role of every module with parameters, by the model's family."""
    from autopar.spec.family import roles

    kind = getattr(getattr(model, "config", None), "model_type", None) or getattr(
        getattr(model, "spec", None), "family", None
    )  # foreign objects: a Hugging Face config, a declarative model's spec, or neither
    paths = dict.fromkeys(n.rpartition(".")[0] for n, _ in model.named_parameters(remove_duplicate=False))
    return roles(paths, kind)


def strip(path: str) -> str:
    return path.removeprefix("model.") if path.startswith("model.") else ("" if path == "model" else path)


def unprefixed(seen: Capture) -> Capture:
    return Capture(seen.full, calls=[(c, strip(p)) for c, p in seen.calls], names=seen.names)


def label(
    graph: fx.Graph,
    exported: Any,
    inputs: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    originals: dict[int, torch.Tensor],
) -> None:
    """Give every placeholder its kind and original name; keep the values of lifted constants."""
    kinds = {"PARAMETER": "parameter", "BUFFER": "buffer", "CONSTANT_TENSOR": "constant", "USER_INPUT": "input"}
    names = [pytree_name(keys) for keys, _ in pytree.tree_flatten_with_path(inputs)[0]]
    user = iter(names)
    by_name = {s.arg.name: s for s in exported.graph_signature.input_specs}
    ordered = [n for n in graph.nodes if n.op == "placeholder"]
    for node in ordered:
        spec = by_name[node.name]
        kind = kinds.get(spec.kind.name)
        if kind is None:
            raise TraceError(f"the model holds a {spec.kind.name.lower()} ({spec.target}), which cannot be compiled")
        name = next(user) if kind == "input" else strip(spec.target)
        node.meta.update(kind=kind, name=name, path="")
        if kind == "constant":
            value = exported.constants[spec.target]
            value = originals.get(id(value), value)
            name = f"constant_{sum(n.startswith('constant_') for n in tensors)}"
            tensors[name] = value
            node.meta.update(constant=constant_text(value), name=name)
    for node in ordered:
        if node.meta["kind"] == "input" and not isinstance(node.meta["val"], torch.Tensor):
            node.meta["kind"] = "plain"
            if not node.users:
                graph.erase_node(node)
    merge_aliases(graph, tensors)


def merge_aliases(graph: fx.Graph, tensors: dict[str, torch.Tensor]) -> None:
    """Tied tensors are read through one placeholder: their first name's. So are constants of equal value."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer", "constant"):
            tensor = tensors[node.meta["name"]]
            equal = node.meta["kind"] == "constant" and not tensor.is_meta
            key = (tensor.dtype, tuple(tensor.shape), constant_text(tensor)) if equal else id(tensor)
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def constant_text(value: torch.Tensor) -> str:
    """A constant's value in a program's text: spelled out when small, a checksum otherwise."""
    if value.is_meta:
        return " (no value)"
    if value.numel() <= 8:
        return f" {value.tolist()}"
    return f" #{hash(value.detach().cpu().contiguous().numpy().tobytes()) & 0xFFFFFFFF:08x}"


def pytree_name(keys: Any) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in keys)


# ------------------------------------------------------------------ messages


def first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0][:160] if text else type(problem).__name__


def explained(problem: BaseException | None) -> str:
    """Which module could not be traced, and why, from the deepest frame of the user's model."""
    if problem is None:
        return "the model cannot be traced"
    where = ""
    step = problem.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and step.tb_frame.f_code.co_name == "forward":
            with contextlib.suppress(Exception):
                where = (
                    f"{type(owner).__name__} ({step.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{step.tb_lineno})"
                )
        step = step.tb_next
    return f"{where or 'the model'} cannot be traced: {first_line(problem)}"
