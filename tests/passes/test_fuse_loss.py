"""fused_loss: the output layer and its loss, and what is left as written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from tests.passes.minimal import both, ids, outer_text, targets


def fused(program: Program) -> list[torch.fx.Node]:
    target = torch.ops.autopar.linear_cross_entropy.default
    return [n for _, g in program.graphs() for n in g.nodes if n.target is target]


def test_the_outer_graph_after_fused_loss() -> None:
    lines = outer_text({"fused_loss": {}}).splitlines()
    kept = ("pad", "flatten", "cross_entropy", "reshape", "linear", "return")
    assert_expected_inline(
        "\n".join(line for line in lines if any(k in line.split("=")[0] + line.split("(")[0] for k in kept)),
        """\
  %pad: i64[2, 6] = aten.pad(%slice, [0, 1], constant, -100.0)
  %flatten_1: i64[12] = aten.flatten.using_ints(%pad)
  %reshape_default: f32[12, 8] = aten.reshape(%getitem_1, [12, 8])
  %linear_cross_entropy_default: f32[] = autopar.linear_cross_entropy(%reshape_default, %p_model_embedding_weight, %flatten_1, None, -100, 0.0)
  return (%linear_cross_entropy_default, %sum)""",
    )


class Head(nn.Module):
    """An output layer with a bias; logits as the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.logits(torch.sin(self.embedding(input_ids)))


class Scaled(Head):
    """Cohere's."""

    def logits(self, x):  # noqa: ANN001, ANN201
        return self.head(x) * 0.25


class Capped(Head):
    """Gemma 2's."""

    def logits(self, x):  # noqa: ANN001, ANN201
        return torch.tanh(self.head(x).float() / 3.0) * 3.0


@pytest.mark.parametrize(("kind", "cap"), [(Head, 0.0), (Scaled, 0.0), (Capped, 3.0)], ids=str)
def test_the_loss_and_every_gradient_are_the_same(kind: type[Head], cap: float) -> None:
    _, after, error = both(kind(), "fused_loss")
    (node,) = fused(after)
    assert node.args[5] == pytest.approx(cap) and error < 1e-12
    assert not [t for t in targets(after) if "cross_entropy_loss" in t or "tanh" in t]


class Shifted(Head):
    """A number for each class is added outside of the layer."""

    def logits(self, x):  # noqa: ANN001, ANN201
        return self.head(x) + torch.arange(16, device=x.device) * 0.1


class Twice(Head):
    """Logits that are read elsewhere too."""

    def logits(self, x):  # noqa: ANN001, ANN201
        made = self.head(x)
        return made + made.mean(1, keepdim=True)


LEFT = {Shifted: "no linear layer's own", Twice: "no linear layer's own"}


@pytest.mark.parametrize("kind", LEFT, ids=lambda k: k.__name__)
def test_other_logits_are_left_with_a_word(kind: type[Head]) -> None:
    before, after, _ = both(kind(), "fused_loss")
    assert str(before) == str(after)
    assert any(line.startswith("fused_loss: the loss in program") and LEFT[kind] in line for line in after.history)


@pytest.mark.parametrize(
    ("options", "word"), [({"label_smoothing": 0.1, "reduction": "sum"}, "smoothed"), ({"reduction": "mean"}, "no sum")]
)
def test_another_loss_is_left_with_a_word(options: dict[str, Any], word: str) -> None:
    def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = batch["labels"].flatten()
        return F.cross_entropy(output.flatten(0, 1), labels, **options), torch.ones_like(labels).sum()

    after = rewrite(trace(Head(), ids(), loss=loss), [{"fused_loss": {}}])
    assert not fused(after) and any(word in line for line in after.history)


def test_nothing_of_the_size_of_the_logits_is_held_or_kept() -> None:
    program = rewrite(trace(Head(), ids()), [{"fused_loss": {}}]).at(batch=2, length=50)
    sizes = [n.meta["val"].numel() for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert max(sizes) < 2 * 50 * 16


def test_sequences_are_still_apart() -> None:
    assert rewrite(trace(Head(), ids()), [{"fused_loss": {}}]).mixes_batch == []
