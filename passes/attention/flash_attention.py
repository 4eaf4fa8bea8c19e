"""flash_attention: attention by a kernel that never holds the (length, length) scores."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx

from autopar import kernels  # noqa: F401 (registers the operator)
from autopar.ir.hoist import placeholder
from autopar.ir.ops import Attention
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.unread import sweep
from passes.attention.fused import Maker
from passes.attention.masks import Mask, recognized
from passes.attention.sdpa_attention import each_attention, to_sdpa
from passes.attention.written import UnlikeError

aten = torch.ops.aten


class FlashAttention(Pass):
    """Attention, in every spelling that `sdpa_attention` finds and with Gemma's soft cap, becomes this project's flash kernel.

    Nothing of size (length)² is held, forward or backward. Masks that the kernel makes itself are recognized by what they
    are: causal, shifted (keys before the tokens), a sliding window, ALiBi. A call with another mask, or with dropout, stays
    torch's operator, with a line in the history.
    """

    name: ClassVar[str] = "flash_attention"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        to_sdpa(program, self.name, capped=lambda name, mask, heads: described(program, name, mask, heads))
        each_attention(program, replace, self.name, "takes another kernel")
        sweep(program)


def replace(program: Program, name: str, graph: fx.Graph, seen: Attention) -> None:
    """Put the kernel in the place of torch's operator. Raises `UnlikeError`."""
    query, key = seen.query.meta["val"], seen.key.meta["val"]
    if query.dim() != 4 or str(query.shape[0]) != str(key.shape[0]):
        raise UnlikeError(f"its queries have {query.dim()} dims, not (batch, heads, length, width), or another batch")
    if seen.dropout:
        raise UnlikeError("its weights are dropped out")
    mask = Mask(causal=seen.causal)
    if seen.mask is not None:
        mask = described(program, name, seen.mask, int(query.shape[1]))
    options = words(program, name, graph, seen, mask)
    with graph.inserting_before(seen.node):
        make = Maker(graph, str(seen.node.meta.get("path", "")))
        both = make(torch.ops.autopar.flash_attention.default, seen.query, seen.key, seen.value, **options)
        mixed = make(operator.getitem, both, 0)
    seen.node.replace_all_uses_with(mixed)
    graph.erase_node(seen.node)


def words(program: Program, name: str, graph: fx.Graph, seen: Attention, mask: Mask) -> dict[str, Any]:
    """A call's options, those that are not the kernel's defaults."""
    heads = int(seen.query.meta["val"].shape[1])
    options = {
        "slopes": None if mask.slopes is None else slopes_here(program, name, graph, seen.mask, heads),
        "scale": seen.scale,
        "causal": mask.causal or None,
        "window": mask.window or None,
        "softcap": seen.node.meta.get("softcap"),
        "offset": mask.offset or None,
    }
    return {k: v for k, v in options.items() if v is not None}


def sources(program: Program, name: str, mask: fx.Node) -> list[fx.Node]:
    """The masks of the outer graph that a block's instances are given; a mask of the outer graph itself."""
    if name == OUTER:
        return [mask]
    if mask.op != "placeholder":
        raise UnlikeError("its mask is made inside the block")
    index = [n for n in program.blocks[name].nodes if n.op == "placeholder"].index(mask)
    return [c.args[index] for c in program.calls() if c.target == name]  # type: ignore[misc]


def described(program: Program, name: str, mask: fx.Node | None, heads: int) -> Mask:
    """The one mask that all instances are given. Raises `UnlikeError`."""
    if mask is None:
        return Mask(causal=False)
    given = dict.fromkeys(sources(program, name, mask))
    found = [recognized(program, m, heads) for m in given]
    plain = {(f.causal, f.offset, f.window, f.slopes is not None, f.factor) for f in found}
    if len(plain) > 1:
        raise UnlikeError("its mask differs from instance to instance")
    return found[0]


def slopes_here(program: Program, name: str, graph: fx.Graph, mask: Any, heads: int) -> fx.Node:
    """The slopes in a graph, (heads): an argument of a block, once for all that share a mask."""
    made: dict[fx.Node, fx.Node] = {}
    for source in sources(program, name, mask):
        if source not in made:
            found = recognized(program, source, heads)
            assert found.slopes is not None, source
            with program.graph.inserting_after(source):
                make = Maker(program.graph, "")
                flat = make(aten.reshape.default, found.slopes, [heads])
            if found.factor != 1.0:
                with program.graph.inserting_after(flat):
                    flat = make(aten.mul.Tensor, flat, found.factor)
            made[source] = flat
    if name == OUTER:
        return made[mask]
    index = [n for n in graph.nodes if n.op == "placeholder"].index(mask)
    for call in program.calls():
        if call.target == name:
            call.args = (*call.args, made[call.args[index]])  # type: ignore[index]
    return placeholder(graph, next(iter(made.values())), "slopes")


# ------------------------------------------------------------------ and back


def to_torch(program: Program, who: str) -> None:
    """Put torch's operator in the place of the kernel, for passes that add keys. Raises `PassError` where it has no words."""
    from autopar.errors import PassError

    for _, graph in program.graphs():
        for node in list(graph.nodes):
            if node.target is torch.ops.autopar.flex_attention.default:
                raise PassError(f"{who}: put it before flex_attention, whose kernel has its masks in words of its own")
            if node.target is not torch.ops.autopar.flash_attention.default:
                continue
            options = node.kwargs
            if options.get("window") or options.get("softcap") or options.get("offset") or len(node.users) != 1:
                raise PassError(f"{who}: put it before flash_attention, whose kernel has a window or a soft cap here")
            (mixed,) = node.users
            with graph.inserting_before(node):
                make = Maker(graph, str(node.meta.get("path", "")))
                mask, causal = None, bool(options.get("causal"))
                if options.get("slopes") is not None:
                    mask, causal = alibi(make, node), False
                grouped = str(node.args[0].meta["val"].shape[1]) != str(node.args[1].meta["val"].shape[1])  # type: ignore
                known = {"scale": options.get("scale"), **({"enable_gqa": True} if grouped else {})}
                new = graph.call_function(
                    aten.scaled_dot_product_attention.default, (*node.args[:3], mask, 0.0, causal), known
                )
                new.meta = dict(mixed.meta)
            mixed.replace_all_uses_with(new)
            graph.erase_node(mixed)
            graph.erase_node(node)


def alibi(make: Maker, node: fx.Node) -> fx.Node:
    """The causal mask with ALiBi as a tensor (heads, length, keys)."""
    query, key = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    slopes: Any = node.kwargs["slopes"]
    known = {"device": torch.device("meta"), "pin_memory": False}
    row, column = (make(aten.arange.default, s, **known) for s in (query.shape[2], key.shape[2]))
    far = make(aten.sub.Tensor, column, make(aten.unsqueeze.default, row, 1))
    bias = make(aten.mul.Tensor, make(aten.reshape.default, slopes, [query.shape[1], 1, 1]), far)
    bias = make(aten.to.dtype, bias, query.dtype)
    if not node.kwargs.get("causal"):
        return bias
    return make(aten.masked_fill.Scalar, bias, make(aten.gt.Scalar, far, 0), torch.finfo(query.dtype).min)
