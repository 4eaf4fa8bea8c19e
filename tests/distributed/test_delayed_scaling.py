"""Delayed scaling over devices: loss and scales are those of one device under every plan, and checkpoints carry them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_equal, job_of, prove_source, source_of
from torch import nn

import autopar
from autopar.ir.rewrite import rewrite
from autopar.models.load import build
from autopar.runtime.spawn import spawn

STEPS = 3
FP8 = [{"fp8": {"recipe": "delayed", "history": 2}}]


def model() -> nn.Module:
    """In float64, so that sums of another order do not move a number over a rounding boundary of the 8 bits."""
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )  # fmt: skip
    return build({"hf": "llama", "config": sizes}, meta=False, dtype=torch.float64, seed=0)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:3, :9] = -100
    return {"input_ids": ids, "labels": labels}


def compiled(folder: Path, pins: dict[str, Any], passes: list[Any]) -> Path:
    job = job_of(pins, optimizer={"name": "adamw", "lr": 1e-2, "state": "float64"})
    return autopar.compile(model(), job.cluster, batch=batch(), passes=passes, job=job).save(folder)


Found = tuple[list[float], dict[str, list[list[float]]]]


def train(folder: str, load: str | None, save: str | None, steps: int) -> Found:
    """A rank's losses, and the states of the stages it runs, in whole."""
    engine = autopar.load(folder).start()
    if load:
        engine.load(load)
    losses = [engine.step(batch()) for _ in range(steps)]
    if save:
        engine.save(save)
    return losses, {s.entry.name: s.tensor.tolist() for s in engine.states}


def one_device(passes: list[Any]) -> Found:
    module = rewrite(autopar.trace(model(), batch()), passes).module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        total, count = module(**batch())
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
    module.advance()
    return losses, {n: b.tolist() for n, b in module.named_buffers() if n.endswith("fp8_state")}


def agrees(ranks: list[Found], want: Found) -> None:
    for losses, states in ranks:
        assert losses == pytest.approx(want[0][-len(losses) :], rel=1e-9)
        for name, state in states.items():
            torch.testing.assert_close(torch.tensor(state), torch.tensor(want[1][name]), rtol=1e-6, atol=0)
    assert {n for _, states in ranks for n in states} == set(want[1])


PLANS = [
    dict(tp=2),
    dict(dp=2, zero=3, microbatch=2),
    dict(dp=2, zero=0),
    dict(pp=2, microbatch=1, recompute="full"),
    dict(tp=2, sequence_parallel=True, recompute="selective", microbatch=4),
    dict(tp=2, pp=2, microbatch=2),
]


@pytest.fixture(scope="module")
def alone() -> Found:
    return one_device(FP8)


@pytest.mark.parametrize("pins", PLANS, ids=str)
def test_loss_and_scales_of_every_plan_are_those_of_one_device(
    tmp_path: Path, pins: dict[str, Any], alone: Found
) -> None:
    ranks = pins.get("tp", 1) * pins.get("dp", 1) * pins.get("pp", 1)
    agrees(spawn(train, ranks, str(compiled(tmp_path / "b", pins, FP8)), None, None, STEPS), alone)


def test_the_scales_matter(alone: Found) -> None:
    """What the equality above is worth: without rounding, and with scales of one step only, the losses differ."""
    for passes in ([], [{"fp8": {"recipe": "delayed", "history": 1}}], [{"fp8": {}}]):
        losses, _ = one_device(passes)
        assert abs(losses[-1] - alone[0][-1]) > 1e-7


def test_a_checkpoint_carries_the_scales_to_another_plan(tmp_path: Path, alone: Found) -> None:
    first, second = compiled(tmp_path / "a", dict(tp=2, pp=2), FP8), compiled(tmp_path / "b", dict(dp=2, zero=2), FP8)
    spawn(train, 4, str(first), None, str(tmp_path / "kept"), STEPS - 1)
    agrees(spawn(train, 2, str(second), str(tmp_path / "kept"), None, 1), alone)


@pytest.mark.parametrize(
    "pins", [dict(tp=2, pp=2, microbatch=1), dict(dp=2, zero=3), dict(tp=2, recompute="full")], ids=str
)
def test_the_program_without_rounding_is_the_model(pins: dict[str, Any]) -> None:
    passes = [{"mixed_precision": {}}, {"fp8": {"recipe": "delayed"}}]
    assert_equal(prove_source(source_of("llama"), pins, passes=passes))


def test_adapters_beside_frozen_layers_in_8_bits() -> None:
    passes = [{"lora": {"rank": 4}}, {"fp8": {"recipe": "delayed"}}, {"mixed_precision": {"frozen": "bfloat16"}}]
    assert_equal(prove_source(source_of("llama"), dict(tp=2, dp=2, zero=2), passes=passes))
