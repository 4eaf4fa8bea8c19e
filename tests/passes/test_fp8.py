"""fp8: which layers are rounded, how near training stays to what it was, and that the rewrite is right under plans."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import autopar
from autopar.errors import PassError
from autopar.ir.program import Program
from autopar.ir.rewrite import load, rewrite
from autopar.models.load import build
from tests.contracts.families import program as family_program

LABELS = {"labels": torch.zeros(2, 8, dtype=torch.long)}
F8 = (torch.ops.autopar.fp8_linear.default, torch.ops.autopar.fp8_linear_delayed.default)


def llama(**changes: int) -> nn.Module:
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64
    )  # fmt: skip
    return build({"hf": "llama", "config": {**sizes, **changes}}, meta=False, seed=0)


def rounded(program: Program) -> list[str]:
    """Block and weight of every rounded layer."""
    return [
        f"{name}: {node.args[1].meta.get('name', 'cast')}"
        for name, graph in program.graphs()
        for node in graph.nodes
        if node.target in F8
    ]


def test_the_layers_of_the_blocks_are_rounded_and_the_head_is_not() -> None:
    program = rewrite(family_program("hf_llama"), [{"fp8": {}}])
    assert_expected_inline(
        "\n".join(rounded(program)),
        """\
block_0: self_attn.q_proj.weight
block_0: self_attn.k_proj.weight
block_0: self_attn.v_proj.weight
block_0: self_attn.o_proj.weight
block_0: mlp.gate_proj.weight
block_0: mlp.up_proj.weight
block_0: mlp.down_proj.weight""",
    )


def test_targets_are_rounded_alone_and_odd_widths_refused_by_name() -> None:
    program = rewrite(family_program("hf_llama"), [{"fp8": {"targets": ["query"]}}])
    assert len(rounded(program)) == 1
    with pytest.raises(PassError, match="no linear layer has the role or the name 'qurey'.*query"):
        rewrite(family_program("hf_llama"), [{"fp8": {"targets": ["qurey"]}}])
    odd = autopar.trace(llama(vocab_size=251), {"input_ids": torch.zeros(2, 8, dtype=torch.long)} | LABELS)
    with pytest.raises(PassError, match="lm_head is 32 → 251; 8-bit products take widths that are multiples of 16"):
        rewrite(odd, [{"fp8": {"targets": ["head"]}}])
    with pytest.raises(PassError, match="recipe"):
        load({"fp8": {"recipe": "delaied"}})
    with pytest.raises(PassError, match="margin goes with recipe: delayed; recipe: current looks at no earlier step"):
        load({"fp8": {"margin": 1}})


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_small_model_learns_in_8_bits_nearly_what_it_learns_in_32(recipe: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (8, 16)).repeat(1, 2)  # the second half can be known from the first
    batch = {"input_ids": ids, "labels": ids}
    finals = []
    for passes in ([], [{"mixed_precision": {}}, {"fp8": {"recipe": recipe}}]):
        module = rewrite(autopar.trace(llama(), batch), passes).module()
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            total, count = module(**batch)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total.detach() / count))
        finals.append((losses[0], losses[-1]))
    (first, full), (first8, small) = finals
    assert first8 == pytest.approx(first, rel=2e-2)
    assert full < 0.75 * first and small - full < 0.05 * first


def test_a_layer_is_rounded_once_and_a_model_with_none_that_fits_is_told() -> None:
    once = rewrite(family_program("hf_llama"), [{"fp8": {}}])
    again = rewrite(once, [{"fp8": {}}])
    assert rounded(again) == rounded(once)
    assert "fp8: no linear layer of the blocks is left whose widths are multiples of 16" in again.history
    with pytest.raises(PassError, match="fp8: model.layers.0.self_attn.q_proj is in 8 bits already"):
        rewrite(once, [{"fp8": {"targets": ["query"]}}])


def test_every_layer_carries_a_state_of_its_own_and_casts_leave_it_alone() -> None:
    for passes in (
        [{"fp8": {"recipe": "delayed", "history": 5}}, {"mixed_precision": {}}],
        [{"mixed_precision": {}}, {"fp8": {"recipe": "delayed", "history": 5}}],
    ):
        program = rewrite(family_program("hf_llama"), passes)
        states = [b for b in program.buffers.values() if b.advance is not None]
        assert len(states) == 14 and {s.shape for s in states} == {(3, 7)} and not any(s.persistent for s in states)
        for _, graph in program.graphs():
            for node in graph.nodes:
                if node.target in F8:
                    assert node.args[3].op == "placeholder" and node.args[3].meta["val"].dtype == torch.float32


def test_scales_move_on_when_the_parameters_have_changed_and_not_before() -> None:
    ids = torch.randint(0, 64, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    module = rewrite(autopar.trace(llama(), batch), [{"fp8": {"recipe": "delayed"}}]).module()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    name = "model.layers.0.mlp.down_proj.fp8_state"
    state = module.get_buffer(name)

    def backward() -> None:
        total, count = module(**batch)
        (total / count).backward()

    backward()
    backward()
    assert not state[:, 1].any() and state[:, 0].all(), "two micro-batches of one step"
    optimizer.step()
    backward()
    assert state[:, 1].all() and int((state[0, 2:] > 0).sum()) == 1
    again = rewrite(autopar.trace(llama(), batch), [{"fp8": {"recipe": "delayed"}}]).module()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.get_buffer(name), state)
