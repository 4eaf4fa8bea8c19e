"""What an exported graph's placeholders are: original names, kinds, ties, and constants with their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from autopar.errors import TraceError
from autopar.ir.program import Parameter

KINDS = {"PARAMETER": "parameter", "BUFFER": "buffer", "CONSTANT_TENSOR": "constant", "USER_INPUT": "input"}


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every name it has."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def table(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Parameter]:
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
    """A path within the user's model, from one within the traced objective."""
    return path.removeprefix("model.") if path.startswith("model.") else ("" if path == "model" else path)


def label(
    graph: fx.Graph,
    exported: Any,
    inputs: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    originals: dict[int, torch.Tensor],
) -> None:
    """Give every placeholder its kind and original name; keep the values of lifted constants in ``tensors``."""
    user = iter(pytree_name(keys) for keys, _ in pytree.tree_flatten_with_path(inputs)[0])
    specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        spec = specs[node.name]
        kind = KINDS.get(spec.kind.name)
        if kind is None:
            raise TraceError(f"the model holds a {spec.kind.name.lower()} ({spec.target}), which cannot be compiled")
        name = next(user) if kind == "input" else strip(spec.target)
        if kind == "constant":
            constant: torch.Tensor = exported.constants[spec.target]
            value = originals.get(id(constant), constant)
            name = f"constant_{sum(n.startswith('constant_') for n in tensors)}"
            tensors[name] = value
            node.meta["constant"] = constant_text(value)
        plain = kind == "input" and not isinstance(node.meta["val"], torch.Tensor)
        node.meta.update(kind="plain" if plain else kind, name=name, path="")
        if plain and not node.users:
            graph.erase_node(node)
    merge_aliases(graph, tensors)


def merge_aliases(graph: fx.Graph, tensors: dict[str, torch.Tensor]) -> None:
    """Tied tensors are read through one placeholder: the first one's. So are constants of equal value."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer", "constant"):
            kept = first.setdefault(identity(node, tensors[node.meta["name"]]), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def identity(node: fx.Node, tensor: torch.Tensor) -> Any:
    """What tells a placeholder's tensor from others: itself, or a constant's value."""
    if node.meta["kind"] == "constant" and not tensor.is_meta:
        return tensor.dtype, tuple(tensor.shape), checksum(tensor)
    return id(tensor)


def checksum(value: torch.Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()


def constant_text(value: torch.Tensor) -> str:
    """A constant's value in a program's text: spelled out when small, a checksum otherwise."""
    if value.is_meta:
        return " (no value)"
    if value.numel() <= 8:
        return f" {value.tolist()}"
    return f" #{checksum(value)[:8]}"


def pytree_name(keys: Any) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in keys)
