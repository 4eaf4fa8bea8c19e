"""fused_glu: which gated units are found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from autopar.ir.rewrite import rewrite
from autopar.ir.text import graph_text
from autopar.ir.trace import trace
from tests.passes.minimal import both, ids, targets


class Gated(nn.Module):
    """One gated unit, written as its subclass says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.fused, self.down = nn.Embedding(16, 8), nn.Linear(8, 24, bias=False), nn.Linear(12, 8)

    def unit(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        gate, up = self.fused(x).chunk(2, -1)
        return self.down(self.unit(gate, up)) @ self.embedding.weight.T


class Swapped(Gated):
    def unit(self, gate, up):  # noqa: ANN001, ANN201
        return up * (gate * torch.sigmoid(gate))


class Geglu(Gated):
    def unit(self, gate, up):  # noqa: ANN001, ANN201
        return F.gelu(gate) * up


class GegluTanh(Gated):
    def unit(self, gate, up):  # noqa: ANN001, ANN201
        return F.gelu(gate, approximate="tanh") * up


class Reglu(Gated):
    def unit(self, gate, up):  # noqa: ANN001, ANN201
        return F.relu(gate) * up


FOUND = {Gated: "silu", Swapped: "silu", Geglu: "gelu", GegluTanh: "gelu_tanh", Reglu: "relu"}


@pytest.mark.parametrize("kind", FOUND, ids=lambda k: k.__name__)
def test_every_spelling_is_found_and_computes_the_same(kind: type[Gated]) -> None:
    _, after, error = both(kind(), "fused_glu")
    (node,) = [n for _, g in after.graphs() for n in g.nodes if n.target is torch.ops.autopar.glu.default]
    assert node.args[2] == FOUND[kind] and error < 1e-12


class Shared(Gated):
    """The activation is read elsewhere: it must be there anyway."""

    def unit(self, gate, up):  # noqa: ANN001, ANN201
        active = F.silu(gate)
        return active * up + active


class Alone(Gated):
    """An activation times a number for each entry of a row."""

    def unit(self, gate, up):  # noqa: ANN001, ANN201
        return F.silu(gate) * up[..., :1]


@pytest.mark.parametrize("kind", [Shared, Alone], ids=lambda k: k.__name__)
def test_what_the_kernel_cannot_save_stays(kind: type[Gated]) -> None:
    before, after, _ = both(kind(), "fused_glu")
    assert str(before) == str(after) and not [t for t in targets(after) if "glu" in t]


def test_the_text_after_fused_glu() -> None:
    program = rewrite(trace(Gated(), ids()), [{"fused_glu": {}}])
    text = graph_text(program.at(batch=2, length=6).graph)
    assert_expected_inline(
        "\n".join(line for line in text.splitlines() if "chunk" in line or "glu" in line),
        """\
  %chunk: (f32[2, 6, 12], f32[2, 6, 12]) = aten.chunk(%linear, 2, -1)
  %getitem: f32[2, 6, 12] = getitem(%chunk, 0)
  %getitem_1: f32[2, 6, 12] = getitem(%chunk, 1)
  %glu_default: f32[2, 6, 12] = autopar.glu(%getitem, %getitem_1, silu)
  %linear_1: f32[2, 6, 8] = aten.linear(%glu_default, %p_model_down_weight, %p_model_down_bias)""",
    )
