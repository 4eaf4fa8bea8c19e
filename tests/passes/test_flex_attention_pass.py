"""flex_attention: which attention it takes, which masks become words, which stay tensors, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import PassError
from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from autopar.models.load import build
from tests.contracts.families import FAMILIES, WITHOUT_ATTENTION
from tests.contracts.families import program as family_program
from tests.passes.minimal import both, ids
from tests.passes.test_attention import CLOSE, KERNEL, Dropped, Learned, One, Padded, causal, found, square

FLEX = torch.ops.autopar.flex_attention.default
VALUES = ("scale", "slopes", "mask", "documents", "prefix")


def kernels(program: Program) -> list[torch.fx.Node]:
    return [n for _, g in program.graphs() for n in g.nodes if n.target is FLEX]


def options(node: torch.fx.Node) -> dict[str, object]:
    return {k: v for k, v in node.kwargs.items() if k not in VALUES}


def operands(node: torch.fx.Node) -> set[str]:
    return {k for k in node.kwargs if k in VALUES[1:]}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_ATTENTION])
def test_every_family_has_its_attention_by_the_operator_and_no_mask_left(family: str) -> None:
    after = rewrite(family_program(family), [{"flex_attention": {}}])
    (node,) = kernels(after)
    alibi = "bloom" in family or "alibi" in family
    assert options(node) == {"causal": True} and operands(node) == ({"slopes"} if alibi else set())
    assert not found(after) and not [line for line in after.history if line.startswith("flex_attention:")]
    assert not [n for _, g in after.graphs() for n in g.nodes if n.op != "output" and square(n)]


@pytest.mark.parametrize("kind", [k for k, v in KERNEL.items() if v is not None], ids=lambda k: k.__name__)
def test_every_spelling_and_mask_in_words(kind: type[One]) -> None:
    _, after, error = both(kind(), "flex_attention")
    (node,) = kernels(after)
    assert options(node) == KERNEL[kind] and operands(node) <= {"slopes"} and error < CLOSE


class Striped(One):
    """A mask of sizes that has no word of its own."""

    def weights(self, scores):  # noqa: ANN001, ANN201
        place = torch.arange(scores.shape[-1], device=scores.device)
        stripes = (place[:, None] - place) % 2 == 0
        return scores.masked_fill(~(stripes & causal(scores)), float("-inf")).softmax(-1)


class StripedCap(Striped):
    def weights(self, scores):  # noqa: ANN001, ANN201
        return super().weights(torch.tanh(scores / 3.0) * 3.0)


@pytest.mark.parametrize("kind", [Striped, StripedCap])
def test_a_mask_without_a_word_is_read_as_the_tensor_it_is(kind: type[One]) -> None:
    _, after, error = both(kind(), "flex_attention")
    (node,) = kernels(after)
    assert operands(node) == {"mask"} and error < CLOSE
    assert options(node) == ({"softcap": 3.0} if kind is StripedCap else {})


def test_padding_is_read_as_a_mask() -> None:
    batch = {**ids(), "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    before = trace(Padded(), batch)
    after = rewrite(before, [{"flex_attention": {}}])
    (node,) = kernels(after)
    assert operands(node) == {"mask"} and not options(node)
    torch.testing.assert_close(after.module()(**batch)[0], before.module()(**batch)[0])


def declared(**more: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A declared model, and rows of packed documents with a prefix."""
    sizes = dict(family="llama", layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=64)
    model = build({**sizes, **more}, meta=False, dtype=torch.float64, seed=0)
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 3 + [2] * 6])
    batch = {"input_ids": tokens, "labels": tokens, "document_ids": documents, "prefix_length": torch.tensor([4, 1])}
    return model, batch


@pytest.mark.parametrize("without", [(), ("document_ids",), ("prefix_length",)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_packed_documents_and_prefixes_are_recognized(kind: str, without: tuple[str, ...]) -> None:
    kv = {} if kind == "llama" else {"kv_heads": 4, "family": "bloom"}
    model, batch = declared(**kv)
    batch = {k: v for k, v in batch.items() if k not in without}
    before = autopar.trace(model, batch)
    after = rewrite(before, [{"flex_attention": {}}])
    (node,) = kernels(after)
    words = {"documents", "prefix"} - {{"document_ids": "documents", "prefix_length": "prefix"}[w] for w in without}
    if kind == "llama":
        assert operands(node) == words and options(node) == {"causal": True}
        assert not [n for _, g in after.graphs() for n in g.nodes if n.op != "output" and square(n)]
    values = []
    for program in (before, after):
        module = program.module()
        total, count = module(**batch)
        values.append([total / count, *torch.autograd.grad(total / count, list(module.parameters()))])
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Odd(One):
    """Looks like documents, but a token sees those of a smaller number, too."""

    def forward(self, input_ids, document_ids):  # noqa: ANN001, ANN201
        self.ids = document_ids
        return super().forward(input_ids)

    def weights(self, scores):  # noqa: ANN001, ANN201
        seen = (self.ids[:, None, :, None] >= self.ids[:, None, None, :]) & causal(scores)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def test_what_only_looks_like_documents_stays_a_mask() -> None:
    batch = {**ids(), "document_ids": torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 0, 2, 2]])}
    before = trace(Odd(), batch)
    after = rewrite(before, [{"flex_attention": {}}])
    (node,) = kernels(after)
    assert operands(node) == {"mask"}
    torch.testing.assert_close(after.module()(**batch)[0], before.module()(**batch)[0])


def test_dropout_and_learned_biases_stay_with_torchs_operator() -> None:
    for kind, why in ((Dropped, "its weights are dropped out"), (Learned, "its bias is learned")):
        after = rewrite(trace(kind(), ids()), [{"flex_attention": {}}])
        assert not kernels(after) and len(found(after)) == 1
        assert any("stays torch's operator" in line and why in line for line in after.history)


def test_passes_that_add_keys_come_first() -> None:
    with pytest.raises(PassError, match="prefix_tuning: put it before flex_attention"):
        rewrite(family_program("llama"), [{"flex_attention": {}}, {"prefix_tuning": {"tokens": 2}}])
