"""mixed_precision: which operator computes in which dtype, what is stored, and how near the result is to float32."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from autopar.cost.precision import Precision
from autopar.errors import PassError
from autopar.ir.program import Program
from autopar.ir.rewrite import load, rewrite
from autopar.ir.trace import trace
from passes.precision.table import name_of
from tests.contracts.families import Result, computed
from tests.contracts.families import program as family_program
from tests.passes.minimal import Decoder, block_text, ids, outer_text

UNLIKE = ("llama", "bloom", "hf_llama", "hf_falcon_alibi", "hf_bloom", "hf_gpt2", "mlp", "conv")
F32, BF16 = torch.float32, torch.bfloat16
LOSS, COSINE = 2e-2, 0.99  # bfloat16 has 8 bits: relative steps of 4e-3


def test_a_block_after_mixed_precision() -> None:
    assert_expected_inline(
        block_text({"mixed_precision": {}}),
        """\
  %x: bf16[2, 6, 8] = input x
  %weight: f32[8] = parameter weight
  %qkv_weight: f32[24, 8] = parameter qkv.weight
  %mask_1: bf16[6, 6] = input mask_1
  %to_dtype: f32[2, 6, 8] = aten.to.dtype(%x, f32)
  %pow: f32[2, 6, 8] = aten.pow.Tensor_Scalar(%to_dtype, 2)
  %mean: f32[2, 6, 1] = aten.mean.dim(%pow, [-1], True)
  %add: f32[2, 6, 1] = aten.add.Tensor(%mean, 1e-06)
  %rsqrt: f32[2, 6, 1] = aten.rsqrt(%add)
  %mul: f32[2, 6, 8] = aten.mul.Tensor(%x, %rsqrt)
  %to_dtype_1: bf16[8] = aten.to.dtype(%weight, bf16)
  %to_dtype_2: bf16[2, 6, 8] = aten.to.dtype(%mul, bf16)
  %mul_1: bf16[2, 6, 8] = aten.mul.Tensor(%to_dtype_1, %to_dtype_2)
  %to_dtype_3: bf16[24, 8] = aten.to.dtype(%qkv_weight, bf16)
  %matmul: bf16[2, 6, 24] = aten.linear(%mul_1, %to_dtype_3)
  %view_1: bf16[2, 6, 2, 12] = aten.reshape(%matmul, [2, 6, 2, 12])
  %transpose: bf16[2, 2, 6, 12] = aten.transpose.int(%view_1, 1, 2)
  %chunk: (bf16[2, 2, 6, 4], bf16[2, 2, 6, 4], bf16[2, 2, 6, 4]) = aten.chunk(%transpose, 3, -1)
  %getitem: bf16[2, 2, 6, 4] = getitem(%chunk, 0)
  %getitem_1: bf16[2, 2, 6, 4] = getitem(%chunk, 1)
  %getitem_2: bf16[2, 2, 6, 4] = getitem(%chunk, 2)
  %transpose_1: bf16[2, 2, 4, 6] = aten.transpose.int(%getitem_1, -1, -2)
  %matmul_1: bf16[2, 2, 6, 6] = aten.matmul(%getitem, %transpose_1)
  %div: bf16[2, 2, 6, 6] = aten.div.Tensor(%matmul_1, 2.0)
  %add_1: bf16[2, 2, 6, 6] = aten.add.Tensor(%div, %mask_1)
  %softmax: bf16[2, 2, 6, 6] = aten.softmax.int(%add_1, -1)
  %matmul_2: bf16[2, 2, 6, 4] = aten.matmul(%softmax, %getitem_2)
  %transpose_2: bf16[2, 6, 2, 4] = aten.transpose.int(%matmul_2, 1, 2)
  %reshape: bf16[2, 6, 8] = aten.reshape(%transpose_2, [2, 6, 8])
  %add_2: bf16[2, 6, 8] = aten.add.Tensor(%x, %reshape)
  return (%add_2)""",
    )


def test_the_program_around_the_blocks() -> None:
    assert_expected_inline(
        outer_text({"mixed_precision": {}}),
        """\
  %p_model_embedding_weight: f32[16, 8] = parameter embedding.weight
  %p_model_blocks_0_weight: f32[8] = parameter blocks.0.weight
  %p_model_blocks_0_qkv_weight: f32[24, 8] = parameter blocks.0.qkv.weight
  %p_model_blocks_1_weight: f32[8] = parameter blocks.1.weight
  %p_model_blocks_1_qkv_weight: f32[24, 8] = parameter blocks.1.qkv.weight
  %batch_input_ids: i64[2, 6] = input input_ids
  %batch_labels: i64[2, 6] = input labels
  %to_dtype: bf16[16, 8] = aten.to.dtype(%p_model_embedding_weight, bf16)
  %embedding: bf16[2, 6, 8] = aten.embedding(%to_dtype, %batch_input_ids)
  %full: f32[6, 6] = aten.full([6, 6], -3.4028234663852886e+38, device=meta, pin_memory=False)
  %triu: f32[6, 6] = aten.triu(%full, 1)
  %clamp_default: f32[6, 6] = aten.clamp(%triu, -3.3895313892515355e+38, 3.3895313892515355e+38)
  %to_dtype_4: bf16[6, 6] = aten.to.dtype(%clamp_default, bf16)
  %call_0: (bf16[2, 6, 8]) = block_0(%embedding, %p_model_blocks_0_weight, %p_model_blocks_0_qkv_weight, %to_dtype_4)
  %getitem: bf16[2, 6, 8] = getitem(%call_0, 0)
  %call_1: (bf16[2, 6, 8]) = block_0(%getitem, %p_model_blocks_1_weight, %p_model_blocks_1_qkv_weight, %to_dtype_4)
  %getitem_1: bf16[2, 6, 8] = getitem(%call_1, 0)
  %matmul: bf16[2, 6, 16] = aten.linear(%getitem_1, %to_dtype)
  %slice: i64[2, 5] = aten.slice.Tensor(%batch_labels, 1, 1, 9223372036854775807)
  %pad: i64[2, 6] = aten.pad(%slice, [0, 1], constant, -100.0)
  %flatten: bf16[12, 16] = aten.flatten.using_ints(%matmul, 0, -2)
  %flatten_1: i64[12] = aten.flatten.using_ints(%pad)
  %to_dtype_1: f32[12, 16] = aten.to.dtype(%flatten, f32)
  %cross_entropy_loss: f32[] = aten.cross_entropy_loss(%to_dtype_1, %flatten_1, None, 2)
  %ne: b8[2, 6] = aten.ne.Scalar(%pad, -100)
  %sum: i64[] = aten.sum(%ne)
  return (%cross_entropy_loss, %sum)""",
    )


def nodes(program: Program, *names: str) -> list[fx.Node]:
    every = [n for _, g in program.graphs() for n in g.nodes if n.op == "call_function"]
    return [n for n in every if name_of(n) in names]


def dtypes(found: list[fx.Node]) -> set[torch.dtype]:
    return {n.meta["val"].dtype for n in found}


def cosine(a: Result, b: Result) -> float:
    assert a[1].keys() == b[1].keys()
    flat = [torch.cat([r[1][n].flatten().double() for n in a[1]]) for r in (a, b)]
    return float(torch.cosine_similarity(flat[0], flat[1], 0))


@pytest.mark.parametrize("family", UNLIKE)
def test_unlike_models_compute_in_bfloat16_nearly_what_it_does_in_float32(family: str) -> None:
    before = family_program(family, F32)
    after = rewrite(before, [{"mixed_precision": {}}, {"sdpa_attention": {}}])
    assert dtypes(nodes(after, "linear", "matmul", "bmm", "conv2d", "scaled_dot_product_attention", "embedding")) == {
        BF16
    }
    assert dtypes(nodes(after, "cross_entropy_loss", "rsqrt")) == {F32}
    assert dtypes(nodes(after, "mean")) <= {F32}
    for block in after.blocks.values():
        assert {n.meta["val"].dtype for n in block.output_node().args[0]} == {BF16}  # type: ignore[union-attr]
    wanted, got = computed(before, family, F32), computed(after, family, F32)
    assert got[0].dtype == F32 and all(g.dtype == F32 for g in got[1].values())
    assert float((got[0] - wanted[0]).abs() / wanted[0]) < LOSS
    assert cosine(got, wanted) > COSINE


class Sensitive(nn.Module):
    """What half precision spoils: a wide sum, an exponential, angles, a written-out norm with a mean taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.scale = nn.Embedding(16, 8), nn.Parameter(torch.ones(8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        angles = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] * torch.full(
            (8,), 0.1, device=x.device
        )
        x = x * angles.cos()
        centred = x - x.mean(-1, keepdim=True)
        x = self.scale * (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5))
        x = 0.5 * x * (1 + torch.tanh(x + 0.04 * x.pow(3)))
        return (x * torch.exp(-x).cumsum(1)) @ self.embedding.weight.T


def test_sensitive_operators_stay_in_float32_and_others_do_not() -> None:
    after = rewrite(trace(Sensitive(), ids()), [{"mixed_precision": {}}])
    assert dtypes(nodes(after, "mean", "square", "exp", "cumsum", "cos", "arange", "cross_entropy_loss")) == {F32}
    assert dtypes(nodes(after, "tanh", "pow", "embedding", "linear")) == {BF16}
    loss, _ = after.module()(**ids())
    assert torch.isfinite(loss)


def test_a_masks_lowest_number_stays_finite_in_the_new_dtype() -> None:
    for compute in (BF16, torch.float16):
        name = str(compute).removeprefix("torch.")
        after = rewrite(trace(Decoder(), ids()), [{"mixed_precision": {"compute": name}}])
        mask = next(n for n in after.graph.nodes if "clamp" in str(n.target))
        assert mask.args[1] == torch.finfo(compute).min
        loss, _ = after.module()(**ids())
        assert torch.isfinite(loss)


def test_the_causal_mask_is_known_before_and_after_the_casts() -> None:
    orders = ([{"mixed_precision": {}}, {"flash_attention": {}}], [{"flash_attention": {}}, {"mixed_precision": {}}])
    for passes in orders:
        after = rewrite(trace(Decoder(), ids()), passes)
        (node,) = nodes(after, "flash_attention")
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        assert given["causal"] is True and node.meta["val"][0].dtype == BF16


def test_parameters_are_stored_as_asked_and_read_through_one_cast_each() -> None:
    model = Decoder()
    model.embedding.weight.requires_grad_(False)
    after = rewrite(trace(model, ids()), [{"mixed_precision": {"frozen": "bfloat16"}}])
    assert after.parameters["embedding.weight"].dtype == BF16 == after.tensors["embedding.weight"].dtype
    assert after.parameters["blocks.0.qkv.weight"].dtype == F32
    assert model.embedding.weight.dtype == F32, "the model at hand keeps its own"
    casts = [n for _, g in after.graphs() for n in g.nodes if "to.dtype" in str(n.target)]
    read = [n.args for n in casts]
    assert len(read) == len(set(read))


def test_tied_parameters_stay_tied() -> None:
    program = family_program("hf_gpt2", F32)
    after = rewrite(program, [{"mixed_precision": {"master": "bfloat16"}}])
    tied = [(n, p.alias_of) for n, p in after.parameters.items() if p.alias_of]
    assert tied and all(after.tensors[a] is after.tensors[b] for a, b in tied if b)


def test_the_cost_model_reads_what_the_pass_wrote_down() -> None:
    after = rewrite(trace(Decoder(), ids()), [{"mixed_precision": {"reduce": "bfloat16"}}])
    assert after.precision == {"compute": "bfloat16", "master": "float32", "frozen": "float32", "reduce": "bfloat16"}
    assert after.clone().precision == after.precision and after.clone().precision is not after.precision
    seen = Precision.of(after)
    assert (seen.compute, seen.master, seen.reduce, seen.mixed) == (BF16, F32, BF16, True)
    assert seen.itemsize(F32) == 4 and seen.itemsize(BF16) == 2, "norm statistics take the bytes they take"


def test_a_misspelled_dtype_names_the_nearest() -> None:
    with pytest.raises(PassError, match="mixed_precision: compute: .*did you mean 'bfloat16'"):
        load({"mixed_precision": {"compute": "bfloat61"}})


def test_float32_throughout_changes_nothing() -> None:
    program = rewrite(trace(Decoder(), ids()))
    assert str(rewrite(program, [{"mixed_precision": {"compute": "float32"}}])) == str(program)
