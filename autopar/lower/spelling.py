"""How one operator reads in emitted code: as a person would write it, or by its ATen name where that says more."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.ir.context import AXIS, ContextAttention
from autopar.ir.functions import FunctionCall
from autopar.sharding.call import arguments

aten = torch.ops.aten
Spell = Callable[[Any], str]

INFIX = {
    aten.add.Tensor: "+", aten.add.Scalar: "+", aten.sub.Tensor: "-", aten.sub.Scalar: "-", aten.mul.Tensor: "*",
    aten.mul.Scalar: "*", aten.div.Tensor: "/", aten.div.Scalar: "/", aten.pow.Tensor_Scalar: "**",
    aten.matmul.default: "@", aten.eq.Tensor: "==", aten.eq.Scalar: "==", aten.ne.Tensor: "!=", aten.ne.Scalar: "!=",
    aten.lt.Tensor: "<", aten.lt.Scalar: "<", aten.le.Tensor: "<=", aten.le.Scalar: "<=", aten.gt.Tensor: ">",
    aten.gt.Scalar: ">", aten.ge.Tensor: ">=", aten.ge.Scalar: ">=", aten.bitwise_and.Tensor: "&",
    aten.bitwise_or.Tensor: "|", aten.__and__.Tensor: "&", aten.__or__.Tensor: "|",
}  # fmt: skip
METHODS = {  # method and the names of the arguments it takes, in order
    aten.reshape.default: ("reshape", "shape"), aten.transpose.int: ("transpose", "dim0 dim1"),
    aten.permute.default: ("permute", "dims"), aten.unsqueeze.default: ("unsqueeze", "dim"),
    aten.squeeze.dim: ("squeeze", "dim"), aten.expand.default: ("expand", "size"), aten.t.default: ("t", ""),
    aten.to.dtype: ("to", "dtype"), aten.detach.default: ("detach", ""), aten.masked_fill.Scalar: ("masked_fill", "mask value"),
    aten.flatten.using_ints: ("flatten", "start_dim end_dim"), aten.movedim.int: ("movedim", "source destination"),
    aten.type_as.default: ("type_as", "other"), aten.numpy_T.default: ("t", ""),
    aten.masked_fill.Tensor: ("masked_fill", "mask value"),
}  # fmt: skip
TORCH = {  # functions of torch whose Python arguments are ATen's, in ATen's order
    "rsqrt", "sqrt", "exp", "log", "cos", "sin", "tanh", "sigmoid", "abs", "cat", "stack", "where", "bmm", "baddbmm",
    "cumsum", "tril", "triu", "square", "erf", "index_select", "gather", "topk", "chunk", "outer",
}  # fmt: skip
PLAIN = {  # functions of torch.nn.functional of one tensor
    aten.relu.default: "relu", aten.silu.default: "silu", aten.tanh.default: "tanh", aten.softplus.default: "softplus",
}  # fmt: skip


def reference(value: Any, names: Callable[[fx.Node], str]) -> str:
    """A value among a call's arguments."""
    if isinstance(value, fx.Node):
        return names(value)
    if isinstance(value, list):
        return f"[{', '.join(reference(v, names) for v in value)}]"
    if isinstance(value, tuple):
        inner = ", ".join(reference(v, names) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    if isinstance(value, (torch.memory_format, torch.layout)):
        return str(value)
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def spelled(node: fx.Node, names: Callable[[fx.Node], str], device: str) -> str:
    """The Python expression of one call. ``names`` gives an operand's expression, ``device`` where tensors are made."""
    say = lambda value: reference(value, names)  # noqa: E731
    target: Any = node.target
    if target is operator.getitem:
        return f"{say(node.args[0])}[{node.args[1]}]"
    if isinstance(target, FunctionCall):
        return f"{target.__qualname__}.apply({', '.join(say(a) for a in target.arguments(node.args))})"
    if getattr(target, "__module__", "") == "autopar.lower.collectives":
        given = ["self.tp" if a == "tp" else say(a) for a in node.args] + [
            f"{k}={say(v)}" for k, v in node.kwargs.items()
        ]
        return f"{target.__name__}({', '.join(given)})"
    if isinstance(target, ContextAttention):
        return attention_over_cp(node, target, say)
    if isinstance(target, torch._ops.OpOverload):
        return move_over_cp(node, target, say) if target.namespace == AXIS else operator_text(node, target, say, device)
    raise AssertionError(f"{node.name}: {target} has no spelling")


def move_over_cp(node: fx.Node, target: torch._ops.OpOverload, say: Spell) -> str:
    """``part(labels, 0, self.cp, pieces=[16, 16])``."""
    bound = arguments(node)
    plain = [say(v) for n, v in bound.items() if n not in ("degree", "pieces", "before", "zigzag")]
    named = [f"{n}={tuple(bound[n])}" for n in ("pieces", "before") if bound.get(n)]
    named += ["zigzag=True"] if bound.get("zigzag") else []
    return f"{over_cp(target)}({', '.join([*plain, 'self.cp', *named])})"


def attention_over_cp(node: fx.Node, target: ContextAttention, say: Spell) -> str:
    """``ring_attention(query, key, value, self.cp, causal=True, zigzag=True)``."""
    options = {**node.kwargs, **({"zigzag": True} if target.zigzag else {})}
    named = [f"{n}={say(v)}" for n, v in options.items()]
    return f"{target.__name__}({', '.join([*(say(a) for a in node.args), 'self.cp', *named])})"


def over_cp(target: Any) -> str | None:
    """The function of `autopar.lower.sequences` that a node calls; None for everything else."""
    if isinstance(target, ContextAttention):
        return target.__name__
    if isinstance(target, torch._ops.OpOverload) and target.namespace == AXIS:
        return target._schema.name.split("::")[-1]
    return None


def operator_text(node: fx.Node, target: torch._ops.OpOverload, say: Spell, device: str) -> str:
    special = SPECIAL.get(target)
    if special is not None:
        text = special(node, arguments(node), say)
        if text is not None:
            return text
    plain_kwargs = not node.kwargs
    if target in INFIX and plain_kwargs and len(node.args) == 2:
        return f"{operand(node.args[0], say)} {INFIX[target]} {operand(node.args[1], say)}"
    if target in METHODS:
        method, names = METHODS[target]
        bound = arguments(node)
        given = ", ".join(argument_list(bound[n], say) for n in names.split())
        return f"{operand(node.args[0], say)}.{method}({given})"
    if target in PLAIN and plain_kwargs and len(node.args) == 1:
        return f"F.{PLAIN[target]}({say(node.args[0])})"
    return call_text(node, target, say, device)


KERNELS = "autopar"  # the namespace of this project's own operators; a stage imports them as `kernels`


def call_text(node: fx.Node, target: torch._ops.OpOverload, say: Spell, device: str) -> str:
    """``torch.cat([a, b], -1)`` or ``aten.amax.default(x, [1])``."""
    packet = target._schema.name.split("::")[-1]
    positional = [say(a) for a in node.args]
    keywords = [
        f"{k}={device if k == 'device' else say(v)}"
        for k, v in node.kwargs.items()
        if k not in ("pin_memory", "layout") or (k == "layout" and v not in (None, torch.strided))
    ]
    if target.namespace == KERNELS:
        return f"kernels.{packet}({', '.join(positional + keywords)})"
    name = f"torch.{packet}" if target.namespace == "aten" and packet in TORCH else str(target)
    return f"{name}({', '.join(positional + keywords)})"


def operand(value: Any, say: Spell) -> str:
    """An operand of an infix operator or a method: bracketed unless it is a name, a call or a number."""
    text = say(value)
    depth, spaced = 0, False
    for c in text:
        depth += c in "([{"
        depth -= c in ")]}"
        spaced |= depth == 0 and c == " "
    return f"({text})" if spaced or text.startswith("-") else text


def argument_list(value: Any, say: Spell) -> str:
    return ", ".join(say(v) for v in value) if isinstance(value, (list, tuple)) else say(value)


# ------------------------------------------------------------------ operators with a spelling of their own


def linear(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    bias = f", {say(a['bias'])}" if a["bias"] is not None else ""
    return f"F.linear({say(a['input'])}, {say(a['weight'])}{bias})"


def embedding(node: fx.Node, a: dict[str, Any], say: Spell) -> str | None:
    if a["scale_grad_by_freq"] or a["sparse"]:
        return None
    padding = f", padding_idx={a['padding_idx']}" if a["padding_idx"] >= 0 else ""
    return f"F.embedding({say(a['indices'])}, {say(a['weight'])}{padding})"


def attention(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    parts = [say(a["query"]), say(a["key"]), say(a["value"])]
    names = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    parts += [f"{k}={say(a[k])}" for k, default in names.items() if a[k] != default]
    return f"F.scaled_dot_product_attention({', '.join(parts)})"


def cross_entropy(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    parts = [say(a["self"]), say(a["target"])]
    if a["weight"] is not None:
        parts.append(f"weight={say(a['weight'])}")
    parts.append(f'reduction="{("none", "mean", "sum")[a["reduction"]]}"')
    if int(a["ignore_index"]) != -100:
        parts.append(f"ignore_index={a['ignore_index']}")
    if a["label_smoothing"]:
        parts.append(f"label_smoothing={a['label_smoothing']}")
    return f"F.cross_entropy({', '.join(parts)})"


def layer_norm(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    return f"F.layer_norm({say(a['input'])}, {say(a['normalized_shape'])}, {say(a['weight'])}, {say(a['bias'])}, {a['eps']})"


def gelu(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    extra = f', approximate="{a["approximate"]}"' if a["approximate"] != "none" else ""
    return f"F.gelu({say(a['self'])}{extra})"


def dropout(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    return f"F.dropout({say(a['input'])}, {a['p']}, {a['train']})"


def softmax(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    dtype = f", dtype={a['dtype']}" if a.get("dtype") is not None else ""
    return f"F.softmax({say(a['self'])}, dim={a['dim']}{dtype})"


def mean(node: fx.Node, a: dict[str, Any], say: Spell) -> str | None:
    if a.get("dtype") is not None or a["dim"] is None:
        return None
    name = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    return f"{operand(a['self'], say)}.{name}({say(list(a['dim']))}{', keepdim=True' if a['keepdim'] else ''})"


def slice_(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    rank = len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    dim = a["dim"] % rank
    start = "" if not a["start"] else str(a["start"])
    end = "" if a["end"] is None or a["end"] > 2**62 else str(a["end"])
    step = "" if a["step"] == 1 else f":{a['step']}"
    return f"{operand(a['self'], say)}[{':, ' * dim}{start}:{end}{step}]"


def sum_(node: fx.Node, a: dict[str, Any], say: Spell) -> str | None:
    return f"{operand(a['self'], say)}.sum()" if len(node.args) == 1 and not node.kwargs else None


def pad(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    value = f", value={a['value']}" if a["value"] is not None else ""
    return f"F.pad({say(a['self'])}, {say(a['pad'])}, {a['mode']!r}{value})".replace("'", '"')


def neg(node: fx.Node, a: dict[str, Any], say: Spell) -> str:
    return f"-{operand(a['self'], say)}"


def contiguous(node: fx.Node, a: dict[str, Any], say: Spell) -> str | None:
    plain = len(node.args) == 1 and not node.kwargs
    return f"{operand(a['self'], say)}.contiguous()" if plain else None


SPECIAL: dict[Any, Callable[[fx.Node, dict[str, Any], Spell], str | None]] = {
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.scaled_dot_product_attention.default: attention,
    aten.cross_entropy_loss.default: cross_entropy,
    aten.layer_norm.default: layer_norm,
    aten.gelu.default: gelu,
    aten.dropout.default: dropout,
    aten.softmax.int: softmax,
    aten.mean.dim: mean,
    aten.sum.dim_IntList: mean,
    aten.slice.Tensor: slice_,
    aten.neg.default: neg,
    aten.sum.default: sum_,
    aten.pad.default: pad,
    aten.contiguous.default: contiguous,
}
