"""The parts of the engine one by one: pieces of shards, optimizers, learning rates, batches, memory, refusals."""

from __future__ import annotations

import random

import pytest
import torch
from handmade import batch_of, plan_of, reference, write

from autopar.errors import AutoparError, PlanError, RuntimeFault
from autopar.runtime.engine import Engine
from autopar.runtime.memory import LiveBytes
from autopar.runtime.optim import rate
from autopar.runtime.parameters import Shard
from autopar.runtime.sources import Tensors
from autopar.runtime.spawn import spawn
from autopar.sharding.placement import R, S, local
from autopar.spec.job import Optimizer


def test_the_pieces_of_all_ranks_tile_the_whole_tensor():
    """Random shapes, placements along tp and row splits along dp (uneven, empty): every element exactly once."""
    draw = random.Random(0)
    for _ in range(200):
        tp, dp = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5])
        shape = [draw.randint(1, 7) for _ in range(draw.randint(1, 3))]
        dim = draw.randrange(len(shape))
        parts = tuple(tp * draw.randint(1, 3) for _ in range(draw.randint(1, 3)))
        place = draw.choice([R, S(dim), S(dim, parts)])
        if place.sharded:
            shape[dim] = sum(place.pieces) if place.pieces else tp * draw.randint(1, 4)
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        seen = torch.zeros(shape, dtype=torch.int64)
        for t in range(tp):
            share = local(place, whole, t, tp)
            rows = -(-share.shape[0] // dp)
            for d in range(dp):
                low = min(d * rows, share.shape[0])
                count = min(rows, share.shape[0] - low)
                held = share.narrow(0, low, count)
                for offset, piece in Shard(tuple(shape), place, t, tp, (low, count)).pieces(held):
                    region = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
                    assert torch.equal(whole[region], piece)
                    seen[region] += 1
        assert (seen == (1 if place.sharded else tp)).all(), (shape, place, tp, dp)


OPTIONS = [
    Optimizer(lr=0.02, weight_decay=0.1, state="float64", betas=(0.8, 0.95), eps=1e-6),
    Optimizer(name="sgd", lr=0.02, state="float64"),
    Optimizer(name="sgd", lr=0.02, weight_decay=0.1, momentum=0.9, state="float64"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["adamw", "sgd", "sgd with momentum"])
def test_updates_equal_torchs_own_optimizer(tmp_path, options):
    model = reference()
    plan = plan_of()
    engine = Engine(write(tmp_path / "b", plan), source=Tensors.of(model), optimizer=options)
    if options.name == "adamw":
        own = torch.optim.AdamW(model.parameters(), 0.02, betas=options.betas, eps=options.eps, weight_decay=0.1)
    else:
        own = torch.optim.SGD(model.parameters(), 0.02, momentum=options.momentum, weight_decay=options.weight_decay)
    for step in range(3):
        engine.step(batch_of(plan, step))
        own.zero_grad()
        model(**batch_of(plan, step)).backward()
        own.step()
    for name, value in engine.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name].detach(), rtol=1e-9, atol=1e-12)


def test_moments_of_another_dtype_than_the_parameters_follow_the_same_path(tmp_path):
    plan = plan_of()
    folder = write(tmp_path / "b", plan, dtype="bfloat16")
    engine = Engine(folder, source=Tensors.of(reference()), optimizer=Optimizer(lr=0.01, state="float32"))
    before = engine.state_dict()
    engine.step(batch_of(plan))
    assert engine.optimizer.state[0]["exp_avg"].dtype == torch.float32
    after = engine.state_dict()
    assert after["head.weight"].dtype == torch.bfloat16
    moved = (after["head.weight"].float() - before["head.weight"].float()).abs()
    assert 0.005 < float(moved.median()) < 0.02, "the first AdamW step moves by about lr"


def test_learning_rates_warm_up_and_fall_as_stated():
    cosine = Optimizer(lr=1.0, schedule="cosine", warmup=4, final=0.1)
    rates = [rate(cosine, i, 15) for i in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == pytest.approx(0.55) and rates[14] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    linear = [rate(Optimizer(lr=2.0, schedule="linear"), i, 5) for i in range(5)]
    assert linear == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert [rate(Optimizer(lr=3.0), i, 0) for i in (0, 7)] == [3.0, 3.0]


@pytest.fixture
def engine(tmp_path):
    return Engine(write(tmp_path / "b", plan_of()), source=Tensors.of(reference()))


def test_a_batch_of_the_wrong_size_says_what_the_plan_takes(engine):
    batch = {k: v[:3] for k, v in batch_of(engine.plan).items()}
    with pytest.raises(AutoparError, match=r"'input_ids' has shape \(3, 5\); the plan takes \(4, 5\)"):
        engine.step(batch)


def test_a_batch_with_unknown_or_missing_keys_is_refused(engine):
    batch = batch_of(engine.plan)
    with pytest.raises(AutoparError, match="'label'.*did you mean 'labels'"):
        engine.step(batch | {"label": batch["labels"]})
    with pytest.raises(AutoparError, match="no 'labels'"):
        engine.step({"input_ids": batch["input_ids"]})


def test_a_batch_of_floats_for_whole_numbers_is_refused(engine):
    with pytest.raises(AutoparError, match="'input_ids' is torch.float32; the program takes int64"):
        engine.step({k: v.float() for k, v in batch_of(engine.plan).items()})


def test_a_batch_in_which_no_label_counts_is_refused(engine):
    batch = batch_of(engine.plan)
    with pytest.raises(AutoparError, match="no label of this batch counts"):
        engine.step(batch | {"labels": torch.full_like(batch["labels"], -100)})


REFUSED = [
    ({"pp": 2, "virtual": 2, "microbatches": 4}, "1f1b runs one stage per device"),
    ({"pp": 2, "schedule": "zbvzerobubble", "virtual": 1}, "needs virtual_stages=2"),
    ({"pp": 2, "dp": 2, "zero": 3, "schedule": "interleavedzerobubble", "virtual": 2}, "zero=0 and zero=1 only"),
    ({"virtual": 2}, "needs pp > 1"),
    ({"dp": 2}, "the plan is for 2 devices .* 1 process"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_plans_that_cannot_run_are_refused(tmp_path, options, message):
    with pytest.raises(PlanError, match=message):
        Engine(write(tmp_path / "b", plan_of(**options)), source=Tensors.of(reference()))


def _too_few(folder):
    Engine(folder, source=Tensors.of(reference()))


def test_too_few_microbatches_for_a_schedule_are_refused(tmp_path):
    folder = write(tmp_path / "b", plan_of(pp=2, microbatches=1))
    with pytest.raises(PlanError, match="schedule 1f1b refuses the plan"):
        spawn(_too_few, 2, folder)


def test_a_folder_that_is_no_build_folder_is_refused(tmp_path):
    with pytest.raises(AutoparError, match="no manifest.json"):
        Engine(tmp_path)
    folder = write(tmp_path / "b", plan_of())
    (folder / "stages" / "stage_0.py").unlink()
    with pytest.raises(AutoparError, match=r"stages/stage_0\.py is missing"):
        Engine(folder, source=Tensors.of(reference()))


def test_two_build_folders_in_one_process_keep_their_own_code(tmp_path):
    one, two = (write(tmp_path / n, plan_of()) for n in ("one", "two"))
    (two / "collectives.py").write_text(
        (two / "collectives.py").read_text().replace("return x if tp is None", "return 2 * x if tp is None")
    )
    losses = [Engine(f, source=Tensors.of(reference())).accumulate(batch_of(plan_of())) for f in (one, two, one)]
    assert losses[0] == losses[2] != losses[1]


def test_live_bytes_count_what_is_alive_at_the_worst_moment():
    weight = torch.zeros(1000, 100, requires_grad=True)  # 400 kB
    with LiveBytes([weight]) as live:
        a = torch.zeros(1000, 100)
        b = a + weight  # 1,200 kB
        c = b * b  # 1,600 kB: b is kept for the backward pass
        del a
        c.sum().backward()
        del b, c
    assert 1.6e6 <= live.peak <= 2.5e6
    assert live.now >= 400_000
    with LiveBytes([weight]) as again:
        for _ in range(10):
            torch.zeros(1000, 100)
    assert again.peak <= 1.3e6, "freed tensors must not be counted again and again"


def _fails(kind):
    import os

    import torch.distributed as dist

    if dist.get_rank() == 1:
        if kind == "dies":
            os._exit(7)
        raise ValueError("of rank one")
    dist.barrier()


@pytest.mark.parametrize(
    ("kind", "message"), [("raises", "rank 1 of 2 failed.*of rank one"), ("dies", "exit status 7")]
)
def test_spawn_names_the_rank_that_failed(kind, message):
    with pytest.raises(RuntimeFault, match=f"(?s){message}"):
        spawn(_fails, 2, kind, timeout=30)
