"""flash_attention: attention by a kernel that never holds the (length, length) scores."""

from __future__ import annotations

from typing import ClassVar

from autopar.ir.ops import Attention, view
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.attention.sdpa_attention import to_sdpa


class FlashAttention(Pass):
    """As `sdpa_attention`; and every fused call that a flash kernel can express gets ``meta["kernel"] = "flash"``.

    The operator is torch's own `scaled_dot_product_attention`, which takes its flash kernel in half precision on GPUs
    (and a blocked kernel on CPUs): nothing of size (length)² is kept for the backward. That kernel knows no masks but the
    causal one (Dao 2023); calls with another mask stay, unmarked, with a line in the history.
    """

    name: ClassVar[str] = "flash_attention"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        to_sdpa(program, self.name)
        for name, graph in program.graphs():
            for node in graph.nodes:
                seen = view(node)
                if isinstance(seen, Attention) and (why := unfit(seen)):
                    place = ".".join(filter(None, (name, node.meta.get("path", ""))))
                    program.history.append(f"{self.name}: attention in {place} takes another kernel: {why}")
                elif isinstance(seen, Attention):
                    node.meta["kernel"] = "flash"


def unfit(seen: Attention) -> str:
    """Why a flash kernel cannot do a call; empty where it can."""
    if seen.mask is not None:
        return "its mask is not the causal one"
    if seen.query.meta["val"].dim() != 4:
        return f"its queries have {seen.query.meta['val'].dim()} dims, not (batch, heads, length, width)"
    return ""
