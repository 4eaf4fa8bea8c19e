"""sdpa_attention and flash_attention: which spellings are found, what becomes of masks, what is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from autopar.ir.ops import Attention, view
from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from tests.contracts.families import FAMILIES, WITHOUT_ATTENTION
from tests.contracts.families import program as family_program
from tests.passes.minimal import Decoder, block_text, both, ids, targets

CLOSE = 1e-10


def found(program: Program) -> list[Attention]:
    views = [view(n) for _, g in program.graphs() for n in g.nodes]
    return [v for v in views if isinstance(v, Attention)]


def test_a_block_after_sdpa_attention() -> None:
    assert_expected_inline(
        block_text({"sdpa_attention": {}}),
        """\
  %x: f32[2, 6, 8] = input x
  %weight: f32[8] = parameter weight
  %qkv_weight: f32[24, 8] = parameter qkv.weight
  %pow: f32[2, 6, 8] = aten.pow.Tensor_Scalar(%x, 2)
  %mean: f32[2, 6, 1] = aten.mean.dim(%pow, [-1], True)
  %add: f32[2, 6, 1] = aten.add.Tensor(%mean, 1e-06)
  %rsqrt: f32[2, 6, 1] = aten.rsqrt(%add)
  %mul: f32[2, 6, 8] = aten.mul.Tensor(%x, %rsqrt)
  %mul_1: f32[2, 6, 8] = aten.mul.Tensor(%weight, %mul)
  %matmul: f32[2, 6, 24] = aten.linear(%mul_1, %qkv_weight)
  %view_1: f32[2, 6, 2, 12] = aten.reshape(%matmul, [2, 6, 2, 12])
  %transpose: f32[2, 2, 6, 12] = aten.transpose.int(%view_1, 1, 2)
  %chunk: (f32[2, 2, 6, 4], f32[2, 2, 6, 4], f32[2, 2, 6, 4]) = aten.chunk(%transpose, 3, -1)
  %getitem: f32[2, 2, 6, 4] = getitem(%chunk, 0)
  %getitem_1: f32[2, 2, 6, 4] = getitem(%chunk, 1)
  %getitem_2: f32[2, 2, 6, 4] = getitem(%chunk, 2)
  %scaled_dot_product_attention_default: f32[2, 2, 6, 4] = aten.scaled_dot_product_attention(%getitem, %getitem_1, %getitem_2, None, 0.0, True, scale=0.5)
  %transpose_2: f32[2, 6, 2, 4] = aten.transpose.int(%scaled_dot_product_attention_default, 1, 2)
  %reshape: f32[2, 6, 8] = aten.reshape(%transpose_2, [2, 6, 8])
  %add_2: f32[2, 6, 8] = aten.add.Tensor(%x, %reshape)
  return (%add_2)""",
    )


class One(nn.Module):
    """One attention of four query heads over two key heads, written as its subclass says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], -1, 4).transpose(1, 2)

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=1)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2) / 2.0

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1)

    def mix(self, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return weights @ v

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        k, v = self.repeat(self.heads(self.k(x))), self.repeat(self.heads(self.v(x)))
        mixed = self.mix(self.weights(self.scores(self.heads(self.q(x)), k)), v)
        return (x + mixed.transpose(1, 2).reshape(x.shape)) @ self.embedding.weight.T


def causal(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


class Plain(One):
    """No mask, the scale before the product."""

    def scores(self, q, k):  # noqa: ANN001, ANN201
        return torch.matmul(q * 0.5, k.permute(0, 1, 3, 2))


class Filled(One):
    def weights(self, scores):  # noqa: ANN001, ANN201
        return scores.masked_fill(~causal(scores), float("-inf")).softmax(-1)


class Lowest(One):
    def weights(self, scores):  # noqa: ANN001, ANN201
        return torch.where(causal(scores), scores, torch.finfo(scores.dtype).min).softmax(-1)


class Window(One):
    """A band of three keys: a mask, but not the causal one."""

    def weights(self, scores):  # noqa: ANN001, ANN201
        return scores.masked_fill(~causal(scores).triu(-2), float("-inf")).softmax(-1)


class Baddbmm(One):
    """BLOOM's: heads flattened into the batch, ALiBi added by the product, the mask after."""

    def scores(self, q, k):  # noqa: ANN001, ANN201
        b, h, s, d = q.shape
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype, device=q.device).view(1, h, 1, 1)
        alibi = (slopes * torch.arange(s, device=q.device).view(1, 1, 1, s)).expand(b, h, 1, s).reshape(b * h, 1, s)
        flat = alibi.baddbmm(q.reshape(b * h, s, d), k.reshape(b * h, s, d).transpose(1, 2), beta=0.5, alpha=0.25)
        return flat.view(b, h, s, s)

    def weights(self, scores):  # noqa: ANN001, ANN201
        return (scores + causal(scores).logical_not() * -1e38).softmax(-1)

    def mix(self, weights, v):  # noqa: ANN001, ANN201
        b, h, s, d = v.shape
        return torch.bmm(weights.reshape(b * h, s, s), v.reshape(b * h, s, d)).view(b, h, s, d)


class ScaledAfterBias(One):
    """Falcon's ALiBi: the bias is scaled with the scores."""

    def scores(self, q, k):  # noqa: ANN001, ANN201
        bias = torch.arange(k.shape[2], dtype=q.dtype, device=q.device) * 0.3
        return (q @ k.transpose(-1, -2) + bias) * 0.5


class Learned(One):
    """A bias with a gradient, as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 6, 6))

    def weights(self, scores):  # noqa: ANN001, ANN201
        return (scores + self.bias).softmax(-1)


class Expanded(One):
    """Repeated heads by expand, as transformers' repeat_kv."""

    def repeat(self, x):  # noqa: ANN001, ANN201
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)


class Tiled(One):
    """Heads repeated in turns: no grouped queries."""

    def repeat(self, x):  # noqa: ANN001, ANN201
        return torch.cat((x, x), 1)


SPELLINGS = {  # class → (causal, has a mask, grouped)
    Plain: (False, False, True), Filled: (True, False, True), Lowest: (True, False, True), Window: (False, True, True),
    Baddbmm: (False, True, True), ScaledAfterBias: (False, True, True), Learned: (False, True, True),
    Expanded: (False, False, True), Tiled: (False, False, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPELLINGS, ids=lambda k: k.__name__)
def test_every_spelling_is_found_and_computes_the_same(kind: type[One]) -> None:
    _, after, error = both(kind(), "sdpa_attention")
    (seen,) = found(after)
    flags = (seen.causal, seen.mask is not None, seen.grouped)
    assert flags == SPELLINGS[kind]
    assert not [t for t in targets(after) if "softmax" in t and "cross" not in t]
    assert error < CLOSE


class Capped(One):
    """Gemma 2's soft cap."""

    def weights(self, scores):  # noqa: ANN001, ANN201
        return (torch.tanh(scores / 5.0) * 5.0).softmax(-1)


class Shown(One):
    """The weights themselves are read elsewhere."""

    def mix(self, weights, v):  # noqa: ANN001, ANN201
        return weights @ v + weights.mean()


class OverQueries(One):
    def weights(self, scores):  # noqa: ANN001, ANN201
        return scores.softmax(-2)


LEFT = {Capped: "soft-capped", Shown: "read elsewhere", OverQueries: "does not run over the keys"}


@pytest.mark.parametrize("kind", LEFT, ids=lambda k: k.__name__)
def test_what_the_operator_cannot_express_is_left_with_a_word(kind: type[One]) -> None:
    before, after, _ = both(kind(), "sdpa_attention")
    assert str(before) == str(after)
    assert any(line.startswith("sdpa_attention: attention in ") and LEFT[kind] in line for line in after.history)


class Router(nn.Module):
    """A softmax that mixes no values."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gate = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        return (x * self.gate(x).softmax(-1)) @ self.embedding.weight.T


def test_a_softmax_that_is_no_attention_is_nobodys_business() -> None:
    before, after, _ = both(Router(), "sdpa_attention")
    assert str(before) == str(after) and not [line for line in after.history if line.startswith("sdpa_attention:")]


class Dropped(One):
    def weights(self, scores):  # noqa: ANN001, ANN201
        return nn.functional.dropout(scores.softmax(-1), 0.25, self.training)


def test_dropout_of_the_weights_becomes_the_operators() -> None:
    after = rewrite(trace(Dropped(), ids()), [{"sdpa_attention": {}}])
    assert [seen.dropout for seen in found(after)] == [0.25]


def kernels(program: Program) -> list[torch.fx.Node]:
    """The calls of the flash kernel."""
    target = torch.ops.autopar.flash_attention.default
    return [n for _, g in program.graphs() for n in g.nodes if n.target is target]


def options(node: torch.fx.Node) -> dict[str, object]:
    return {k: v for k, v in node.kwargs.items() if k not in ("scale", "slopes")}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_ATTENTION])
def test_every_family_has_its_attention_by_the_kernel_and_no_mask_left(family: str) -> None:
    after = rewrite(family_program(family), [{"flash_attention": {}}])
    (node,) = kernels(after)
    alibi = "bloom" in family or "alibi" in family
    assert options(node) == {"causal": True} and ("slopes" in node.kwargs) is alibi
    assert not found(after) and not [line for line in after.history if line.startswith("flash_attention:")]
    query, key = (n.meta["val"].shape[1] for n in node.args[:2])  # type: ignore[union-attr]
    assert (query != key) == (family in ("llama", "chatglm2", "falcon", "hf_llama", "hf_glm", "hf_falcon"))
    masks = [n for _, g in after.graphs() for n in g.nodes if n.op != "output" and square(n)]
    assert not masks, f"{masks} of the size of the scores"


def square(node: torch.fx.Node) -> bool:
    value = node.meta["val"]
    last = [str(s) for s in value.shape[-2:]] if isinstance(value, torch.Tensor) else []
    return len(last) == 2 and last[0] == last[1] and "s" in last[0]


class Fused(One):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return (x + mixed.transpose(1, 2).reshape(x.shape)) @ self.embedding.weight.T


def test_the_kernel_takes_the_place_of_calls_that_are_fused_already() -> None:
    _, after, error = both(Fused(), "flash_attention")
    (node,) = kernels(after)
    assert options(node) == {"causal": True} and error < CLOSE


class Einsum(One):
    """Both products as einsums, heads in another place."""

    def scores(self, q, k):  # noqa: ANN001, ANN201
        return torch.einsum("bhqd,bkhd->bhqk", q, k.transpose(1, 2)) * 0.5

    def mix(self, weights, v):  # noqa: ANN001, ANN201
        return torch.einsum("bhqk,bhkd->bqhd", weights, v).transpose(1, 2)


class CappedBand(One):
    """Gemma 2's soft cap, and a window of four."""

    def weights(self, scores):  # noqa: ANN001, ANN201
        return (torch.tanh(scores / 5.0) * 5.0).masked_fill(~causal(scores).triu(-3), float("-inf")).softmax(-1)


class Wide(One):
    """A window wider than any length that is tried."""

    def weights(self, scores):  # noqa: ANN001, ANN201
        place = torch.arange(scores.shape[-1], device=scores.device)
        far = place[:, None] - place
        return scores.masked_fill((far < 0) | (far >= 1000), float("-inf")).softmax(-1)


KERNEL = {
    Plain: {}, Filled: {"causal": True}, Lowest: {"causal": True}, Window: {"causal": True, "window": 3},
    Baddbmm: {"causal": True}, ScaledAfterBias: None, Learned: None, Expanded: {}, Tiled: {}, Einsum: {},
    CappedBand: {"causal": True, "window": 4, "softcap": 5.0}, Capped: {"softcap": 5.0},
    Wide: {"causal": True, "window": 1000},
}  # fmt: skip
"""What the kernel is told, or None where it cannot be."""


@pytest.mark.parametrize("kind", KERNEL, ids=lambda k: k.__name__)
def test_every_spelling_and_mask_by_the_kernel(kind: type[One]) -> None:
    _, after, error = both(kind(), "flash_attention")
    assert [options(n) for n in kernels(after)] == ([] if KERNEL[kind] is None else [KERNEL[kind]])
    assert error < CLOSE
    if KERNEL[kind] is None:
        assert any("takes another kernel" in line for line in after.history)


def test_a_window_wider_than_what_is_tried_is_not_taken_for_causal() -> None:
    (seen,) = found(both(Wide(), "sdpa_attention")[1])
    assert seen.mask is not None and not seen.causal


class Padded(One):
    """A mask from the batch."""

    def forward(self, input_ids, attention_mask):  # noqa: ANN001, ANN201
        self.seen = attention_mask.bool()[:, None, None, :]
        return super().forward(input_ids)

    def weights(self, scores):  # noqa: ANN001, ANN201
        return scores.masked_fill(~(self.seen & causal(scores)), -1e30).softmax(-1)


def test_a_mask_of_the_batch_stays_with_torchs_operator() -> None:
    batch = {**ids(), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    after = rewrite(trace(Padded(), batch), [{"flash_attention": {}}])
    assert not kernels(after) and len(found(after)) == 1
    assert any("takes another kernel: its mask depends on the batch" in line for line in after.history)


def test_dropout_stays_with_torchs_operator() -> None:
    after = rewrite(trace(Dropped(), ids()), [{"flash_attention": {}}])
    assert [seen.dropout for seen in found(after)] == [0.25] and any("dropped out" in line for line in after.history)


def test_no_tensor_of_the_size_of_the_scores_is_kept() -> None:
    from autopar.cost.operators import kept_by
    from autopar.cost.values import reads, tensor, tensors

    length = 512
    program = rewrite(trace(Decoder(), ids()), [{"flash_attention": {}}]).at(batch=2, length=length)
    for node in (n for _, g in program.graphs() for n in g.nodes):
        kept = kept_by(node)
        kept_tensors = [tensor(reads(node)[i]) for i in kept.operands] + [tensors(node)[i] for i in kept.outputs]
        assert kept.extra < length**2 and all(math.prod(t.shape) < length**2 for t in kept_tensors), node
