"""A localized graph as the body of a Python function."""

from __future__ import annotations

import keyword
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir.ops import operands
from autopar.lower import collectives, sequences
from autopar.lower.spelling import over_cp, spelled

WIDTH = 110
RESERVED = {
    *keyword.kwlist,
    *(n for n in vars(collectives) if not n.startswith("_")),
    *sequences.CALLED,
    "self",
    "torch",
    "nn",
    "F",
    "aten",
    "checkpoint",
    "again",
    "Again",
    "kernels",
    "tp",
    "cp",
    "device",
}


@dataclass
class Names:
    """Python names of a function's values; readable ones from module paths where they say more than the operator."""

    of: dict[fx.Node, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def give(self, node: fx.Node, wish: str) -> str:
        wish = "".join(c if c.isalnum() or c == "_" else "_" for c in wish).strip("_") or "x"
        if wish[0].isdigit():
            wish = f"x_{wish}"
        name, count = wish, 1
        while name in self.used or name in RESERVED:
            count += 1
            name = f"{wish}_{count}"
        self.used.add(name)
        self.of[node] = name
        return name


def wish(node: fx.Node) -> str:
    """The name a person would give: of the layer that made it, or of the operation."""
    target = str(node.target)
    layer = any(w in target for w in ("linear", "embedding", "layer_norm", "conv"))
    path = str(node.meta.get("path", ""))
    if layer and path:
        return path.rsplit(".", 1)[-1]
    if path and "move" not in node.meta and node.users and all(leaves(u, path) for u in node.users):
        return path.rsplit(".", 1)[-1]
    if hasattr(node.target, "function"):
        return node.name.lower()
    if "move" in node.meta:
        source = operands(node)[0]
        return f"{plain(source.name)}_{'whole' if str(node.meta['places'][0]) == 'R' else 'part'}"
    return plain(node.name)


def plain(name: str) -> str:
    """``scaled_dot_product_attention`` of ``scaled_dot_product_attention_default``: an overload is no part of a name."""
    return re.sub(r"_(default|Tensor|Scalar|int|dim)(?=_\d+$|$)", "", name)


def leaves(user: fx.Node, path: str) -> bool:
    """Whether a reader is outside the module at ``path``: then the value is what that module returns."""
    where = str(user.meta.get("path", ""))
    return where != path and not where.startswith(f"{path}.") and "move" not in user.meta


@dataclass
class Body:
    """Lines of a function, and what they need."""

    lines: list[str]
    device: str | None = None  # the expression tensors are made on
    functions: set[str] = field(default_factory=set)  # collectives used
    sequences: set[str] = field(default_factory=set)  # what is used of how sequences are split over cp
    classes: set[tuple[str, str]] = field(default_factory=set)  # (module, name) of autograd functions used


class Writer:
    """Writes the nodes of one graph. ``names`` knows the placeholders already."""

    def __init__(self, names: Names, device: str) -> None:
        self.names = names
        self.device = device
        self.expressions: dict[fx.Node, str] = {}
        self.body = Body([])

    def write(
        self, nodes: list[fx.Node], call: Callable[[fx.Node, Callable[[fx.Node], str]], str | None] | None = None
    ) -> Body:
        """``call`` writes block calls and returns None for what it has written itself."""
        ordered = [n for n in nodes if n.op not in ("placeholder", "output")]
        followers = {a: b for a, b in zip(ordered, [*ordered[1:], None], strict=True)}
        section = ""
        for node in ordered:
            if node in self.names.of:
                continue
            text = call(node, self.expression) if node.op == "call_module" and call else self.spell(node)
            if text is None:
                continue
            if self.inlines(node, text, followers[node]):
                self.expressions[node] = text
                continue
            section = self.heading(node, section)
            self.assign(node, text)
        return self.body

    def spell(self, node: fx.Node) -> str:
        if "device" in node.kwargs:
            self.body.device = self.device
        target: Any = node.target
        if getattr(target, "__module__", "") == "autopar.lower.collectives":
            self.body.functions.add(target.__name__)
        elif (over := over_cp(target)) is not None:
            (self.body.sequences if over in sequences.CALLED else self.body.functions).add(over)
        elif not isinstance(target, (str, torch._ops.OpOverload)) and hasattr(target, "function"):
            self.body.classes.add((target.__module__, target.__qualname__.split(".")[0]))
        return spelled(node, self.expression, "device")

    def expression(self, node: fx.Node) -> str:
        return self.expressions.pop(node) if node in self.expressions else self.names.of[node]

    def inlines(self, node: fx.Node, text: str, follower: fx.Node | None) -> bool:
        """Whether a value is written into its only reader's expression: the next call, once, on one line."""
        users = list(node.users)
        if len(users) != 1 or follower is not users[0] or node.op == "call_module" or follower.op == "call_module":
            return False
        if "split_rng" in node.meta or "split_rng" in follower.meta or "move" in node.meta or "move" in follower.meta:
            return False
        once = operands(follower).count(node) == 1
        moving = getattr(follower.target, "__module__", "") == "autopar.lower.collectives"
        return once and len(text) < 70 and not moving

    def heading(self, node: fx.Node, section: str) -> str:
        """A comment line where the code of another part of the model begins."""
        part = str(node.meta.get("path", "")).split(".")[0]
        if part and part != section:
            if self.body.lines:
                self.body.lines.append("")
            self.body.lines.append(f"# {part}")
            return part
        return section

    def assign(self, node: fx.Node, text: str) -> None:
        name = self.names.give(node, wish(node))
        note = remark(node)
        lines = [f"{name} = {text}"]
        if node.meta.get("split_rng"):
            self.body.functions.add("split_rng")
            first = self.names.of.get(operands(node)[0], name)
            lines = [f"with split_rng({first}, self.tp):", f"    {lines[0]}"]
        if note and len(lines[-1]) + len(note) < WIDTH - 8:
            lines[-1] = f"{lines[-1]}  # {note}"
        self.body.lines += lines

    def result(self, values: Iterable[fx.Node], single: bool) -> None:
        names = [self.expression(v) for v in values]
        self.body.lines.append(
            f"return {names[0]}" if single else f"return {', '.join(names)}{',' if len(names) == 1 else ''}"
        )


def remark(node: fx.Node) -> str:
    """Where a value lives along tp, where the plan splits it; how a move moves."""
    if "move" in node.meta:
        return f"{node.meta['move']} along tp"
    places = [str(p) for p in node.meta.get("places", ())]
    return ", ".join(places) if any(p != "R" for p in places) else ""


def indent(lines: list[str], by: int) -> str:
    return textwrap.indent("\n".join(lines), " " * by)
