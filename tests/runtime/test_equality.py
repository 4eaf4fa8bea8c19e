"""The engine equals one process: loss, every gradient, every parameter after two AdamW steps."""

from __future__ import annotations

import pytest
import torch
from handmade import batch_of, error, plan_of, reference, write

from autopar.runtime.engine import Engine
from autopar.runtime.sources import Tensors
from autopar.runtime.spawn import spawn
from autopar.spec.job import Optimizer

ADAMW = Optimizer(lr=1e-2, weight_decay=0.1, state="float64")
CLIP = 0.5


def _train(folder, tied):
    """Two steps on this rank, which is all of it: what the engine says of them."""
    plan_model = reference(tied=tied)
    engine = Engine(folder, source=Tensors.of(plan_model), optimizer=ADAMW, clip=CLIP)
    losses, first = [], {}
    for step in range(2):
        losses.append(engine.accumulate(batch_of(engine.plan, step)))
        first = first or engine.gradients()
        engine.apply()
    return losses, engine.norm, first, engine.state_dict()


def _expected(plan, tied, frozen):
    model = reference(tied=tied)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(name.startswith(f) for f in frozen))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=ADAMW.lr, weight_decay=ADAMW.weight_decay)
    losses, norm, first = [], 0.0, {}
    for step in range(2):
        loss = model(**batch_of(plan, step))
        loss.backward()
        losses.append(float(loss.detach()))
        named = dict(model.named_parameters(remove_duplicate=False))
        first = first or {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norm, first, {n: t.detach().clone() for n, t in model.state_dict().items()}


def _train_in_small_buckets(folder, tied):
    """As `_train`, with an all-reduce for every unit."""
    from autopar.runtime import zero

    zero.BUCKET = 1
    return _train(folder, tied)


def prove(tmp_path, *, tied=False, frozen=(), train=_train, **options):
    plan = plan_of(**options)
    folder = write(tmp_path / "build", plan, tied=tied, frozen=frozen)
    losses, norm, first, last = _expected(plan, tied, frozen)
    ranks = plan.mesh.devices
    results = spawn(train, ranks, folder, tied) if ranks > 1 else [_train(folder, tied)]
    for rank, (got_losses, got_norm, got_first, got_last) in enumerate(results):
        for got, want in zip(got_losses, losses, strict=True):
            assert abs(got - want) < 1e-12 * abs(want), (rank, got, want)
        assert abs(got_norm - norm) < 1e-12 * norm, (rank, got_norm, norm)
        assert error(got_first, first) < 1e-12, rank
        assert error(got_last, last) < 1e-9, rank


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_hybrid_zero_equals_one_process(tmp_path, zero):
    prove(tmp_path, dp=4, replicate=2, zero=zero, microbatches=3, microbatch=1, tied=zero == 2)


@pytest.mark.parametrize(("zero", "schedule"), [(1, "gpipe"), (2, "1f1b"), (3, "gpipe")])
def test_hybrid_zero_under_a_pipeline_equals_one_process(tmp_path, zero, schedule):
    prove(tmp_path, pp=2, dp=4, replicate=2, zero=zero, schedule=schedule, microbatch=1, microbatches=3, tied=True)


def test_hybrid_zero_under_an_interleaved_pipeline_with_frozen_stages_equals_one_process(tmp_path):
    frozen = ("embed", "blocks.0", "blocks.2.norm")
    more = dict(schedule="interleaved1f1b", virtual=2, microbatches=4, microbatch=1)
    prove(tmp_path, pp=2, dp=4, replicate=2, zero=3, frozen=frozen, **more)


def test_hybrid_zero_with_tensor_parallel_equals_one_process(tmp_path):
    prove(tmp_path, dp=4, replicate=2, tp=2, zero=2, microbatch=1)


def test_one_device_equals_the_model(tmp_path):
    prove(tmp_path)


def test_tensor_parallel_equals_one_process(tmp_path):
    prove(tmp_path, tp=2)


def test_zero_0_equals_one_process(tmp_path):
    prove(tmp_path, dp=2, zero=0, microbatches=3)


def test_zero_0_in_several_buckets_equals_one_process(tmp_path):
    prove(tmp_path, dp=2, zero=0, microbatches=3, train=_train_in_small_buckets)


def test_zero_1_equals_one_process(tmp_path):
    prove(tmp_path, dp=2, zero=1, microbatches=3)


def test_zero_2_equals_one_process(tmp_path):
    prove(tmp_path, dp=2, zero=2, microbatches=3)


def test_zero_3_equals_one_process(tmp_path):
    prove(tmp_path, dp=2, zero=3, microbatches=3)


def test_1f1b_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, schedule="1f1b", microbatches=3)


def test_gpipe_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, schedule="gpipe", microbatches=3)


def test_interleaved_1f1b_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, schedule="interleaved1f1b", virtual=2, microbatches=4)


def test_all_axes_together_equal_one_process(tmp_path):
    prove(tmp_path, pp=2, dp=2, tp=2, zero=3, tied=True)


def test_zero_1_under_a_pipeline_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, dp=2, zero=1, schedule="gpipe")


def test_zero_0_under_an_interleaved_pipeline_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, dp=2, zero=0, schedule="interleaved1f1b", virtual=2)


def test_zero_2_under_a_pipeline_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, dp=2, zero=2, microbatches=3)


def test_zero_2_with_tensor_parallel_equals_one_process(tmp_path):
    prove(tmp_path, dp=2, tp=2, zero=2, frozen=("blocks.0", "blocks.2.norm"))


def test_tied_weights_over_stages_equal_one_process(tmp_path):
    prove(tmp_path, pp=2, tied=True)


def test_tied_weights_in_one_stage_equal_one_process(tmp_path):
    prove(tmp_path, dp=2, zero=1, tied=True)


def test_tied_weights_on_the_two_ends_of_a_v_schedule_equal_one_process(tmp_path):
    prove(tmp_path, pp=2, schedule="zbvzerobubble", virtual=2, microbatches=4, tied=True)


def test_zero_bubble_with_zero_1_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, dp=2, zero=1, schedule="interleavedzerobubble", virtual=2, microbatches=4)


def test_zero_bubble_with_zero_0_after_a_frozen_stage_equals_one_process(tmp_path):
    frozen = ("embed", "blocks.0", "blocks.1")
    prove(tmp_path, pp=2, dp=2, zero=0, schedule="interleavedzerobubble", virtual=2, microbatches=4, frozen=frozen)


def test_dualpipev_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, schedule="dualpipev", virtual=2, microbatches=4)


def test_a_frozen_first_stage_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, dp=2, zero=3, frozen=("embed", "blocks.0", "blocks.1"))


def test_a_stage_with_nothing_to_train_equals_one_process(tmp_path):
    prove(tmp_path, pp=2, tp=2, frozen=("blocks.2", "blocks.3", "head", "gain"))


def _held_during_the_step(folder):
    """After the first backward and after the first forward pass on this rank: bytes of gradients and parameters."""
    engine = Engine(folder, source=Tensors.of(reference()), optimizer=ADAMW)
    stage, seen = engine.runner.stages[0], []
    forward, backward = stage.forward_one_chunk, stage.backward_one_chunk

    def after_forward(*args, **kwargs):
        result = forward(*args, **kwargs)
        seen.append(sum(p.data.numel() for p in unsharded(stage.submod)))
        return result

    def after_backward(*args, **kwargs):
        backward(*args, **kwargs)
        seen.append([h.parameter.grad is not None for h in engine.held if h.shard.shape])

    stage.forward_one_chunk, stage.backward_one_chunk = after_forward, after_backward
    engine.step(batch_of(engine.plan))
    first = next(x for x in seen if isinstance(x, list))
    return seen[0], first


def unsharded(module):
    """The gathered parameters that FSDP holds at this moment."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                for p in group.fsdp_params:
                    if hasattr(p, "_unsharded_param") and p._unsharded_param.untyped_storage().nbytes():
                        yield p._unsharded_param


def test_under_a_pipeline_zero_stages_hold_what_they_promise(tmp_path):
    """ZeRO 2 and 3 sum gradients in each micro-batch, ZeRO 1 only at the end; ZeRO 3 gives parameters back at once."""
    found = {}
    for zero in (1, 2, 3):
        folder = write(tmp_path / f"zero{zero}", plan_of(pp=2, dp=2, zero=zero, microbatches=3))
        found[zero] = spawn(_held_during_the_step, 4, folder)[0]
    assert not any(found[1][1]) and all(found[2][1]) and all(found[3][1])
    assert found[1][0] == found[2][0] > 0 and found[3][0] == 0
