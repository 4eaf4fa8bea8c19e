"""Checkpoints load under any other plan, resume exactly, and survive whatever happens while one is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from handmade import batch_of, plan_of, reference, write

from autopar.errors import CheckpointError, RuntimeFault
from autopar.runtime.engine import Engine
from autopar.runtime.sources import Tensors
from autopar.runtime.spawn import spawn
from autopar.spec.job import Optimizer

ADAMW = Optimizer(lr=1e-2, weight_decay=0.1, state="float64")
WIDE = plan_of(pp=1, dp=2, tp=2, zero=3, microbatches=2)  # every plan here takes 8 sequences a step


def _engine(folder, seed=0, tied=False):
    return Engine(folder, source=Tensors.of(reference(seed=seed, tied=tied)), optimizer=ADAMW)


def _everything(engine):
    """Parameters and moments, whole, on every rank."""
    from autopar.runtime.gather import gather

    found = dict(engine.state_dict())
    owned = {id(h): h for h in engine.held}
    for key in engine.optimizer.moments:
        pairs = zip(engine.optimizer.held, engine.optimizer.state, strict=True)
        own = [(h.name, h.shard, s[key], owned[id(h)].owned) for h, s in pairs]
        found |= {f"{n}.{key}": t for n, t in gather(own, engine._shapes(True), engine.world).items()}
    return found


def _train_and_save(folder, root, steps, tied=False):
    engine = _engine(folder, tied=tied)
    for step in range(steps):
        engine.step(batch_of(engine.plan, step))
    engine.save(root)
    return _everything(engine)


def _load_and_save(folder, root, into, tied=False):
    engine = _engine(folder, seed=1, tied=tied)
    engine.load(root)
    engine.save(into)
    return _everything(engine), engine.optimizer.updates


def _continue(folder, root, steps):
    engine = _engine(folder, seed=1)
    engine.load(root)
    losses = [engine.step(batch_of(engine.plan, s)) for s in range(engine.optimizer.updates, steps)]
    return losses, _everything(engine)


def _uninterrupted(folder, steps):
    engine = _engine(folder)
    losses = [engine.step(batch_of(engine.plan, s)) for s in range(steps)]
    return losses, _everything(engine)


def run(function, plan, *args):
    return spawn(function, plan.mesh.devices, *args)[0]


MOVES = {
    "pipeline": plan_of(pp=2, dp=1, tp=1, microbatches=4),
    "interleaved with ZeRO 2 and tensor parallel": plan_of(
        pp=2, dp=1, tp=2, microbatches=4, schedule="interleaved1f1b", virtual=2
    ),
    "ZeRO 1": plan_of(dp=4, zero=1, microbatches=1),
    "ZeRO 2 over 2 of 4": plan_of(dp=4, replicate=2, zero=2, microbatches=1),
    "ZeRO 0": plan_of(dp=2, zero=0, microbatches=2),
    "one device": plan_of(microbatches=4),
    "pipeline with ZeRO 3": plan_of(pp=2, dp=2, zero=3, microbatches=2),
}


def test_a_checkpoint_moves_through_every_plan_bit_for_bit(tmp_path):
    """One chain of saves and loads: each plan reads what the one before it wrote."""
    folder = write(tmp_path / "first", WIDE, tied=True)
    expected = run(_train_and_save, WIDE, folder, tmp_path / "c", 2, True)
    previous = tmp_path / "c"
    for i, (name, plan) in enumerate(MOVES.items()):
        folder = write(tmp_path / f"b{i}", plan, tied=True)
        found, updates = run(_load_and_save, plan, folder, previous, tmp_path / f"c{i}", True)
        assert updates == 2
        assert found.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(found[n], expected[n])] == [], name
        previous = tmp_path / f"c{i}"


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path):
    folder = write(tmp_path / "build", WIDE)
    stage = folder / "stages" / "stage_0.py"
    stage.write_text(stage.read_text().replace("h = enter(h, self.tp)", "h = enter(F.dropout(h, 0.2), self.tp)"))
    losses, expected = run(_uninterrupted, WIDE, folder, 4)
    run(_train_and_save, WIDE, folder, tmp_path / "c", 2)
    resumed, found = run(_continue, WIDE, folder, tmp_path / "c", 4)
    assert resumed == losses[2:]
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


def _killed_while_saving(folder, root, victim):
    """Save, train, and die in the middle of the next save."""
    import torch.distributed as dist
    import torch.distributed.checkpoint.filesystem as filesystem

    engine = _engine(folder)
    engine.save(root)
    engine.step(batch_of(engine.plan, 0))
    if dist.get_rank() == victim:
        write_item = filesystem._write_item

        def die_at_the_second(*args, **kwargs):
            if die_at_the_second.called:
                (root / "died").write_text(", ".join(p.name for p in root.iterdir()))
                os.kill(os.getpid(), signal.SIGKILL)
            die_at_the_second.called = True
            return write_item(*args, **kwargs)

        die_at_the_second.called = False
        filesystem._write_item = die_at_the_second
    engine.save(root)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint(tmp_path, victim):
    plan = plan_of(dp=2, zero=2, microbatches=2)
    folder = write(tmp_path / "build", plan)
    with pytest.raises(RuntimeFault):
        spawn(_killed_while_saving, 2, folder, tmp_path / "c", victim, timeout=30)
    assert ".step-1.partial" in (tmp_path / "c" / "died").read_text(), "it died before or after writing, not while"
    assert (tmp_path / "c" / "latest").read_text() == "step-0"
    found, updates = spawn(_load_and_save, 2, folder, tmp_path / "c", tmp_path / "d")[0]
    assert updates == 0
    assert all(torch.equal(found[n], t) for n, t in reference().state_dict().items())


def _disk_full_while_saving(folder, root):
    engine = _engine(folder)
    engine.save(root)
    engine.step(batch_of(engine.plan, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        engine.save(root)
    except RuntimeFault as fault:
        message = str(fault)
    else:
        message = ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    engine.save(root)  # and once there is room, it works again
    return message


def test_a_full_disk_while_saving_is_reported_and_leaves_the_previous_checkpoint(tmp_path):
    plan = plan_of(dp=2, zero=2, microbatches=2)
    folder = write(tmp_path / "build", plan)
    for message in spawn(_disk_full_while_saving, 2, folder, tmp_path / "c", timeout=30):
        assert "step-1" in message and "previous one is kept" in message
    assert (tmp_path / "c" / "latest").read_text() == "step-1"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["latest", "step-0", "step-1"]


def test_saving_the_same_step_again_never_writes_over_a_checkpoint(tmp_path):
    engine = _engine(write(tmp_path / "build", plan_of()))
    assert [engine.save(tmp_path / "c").name for _ in range(3)] == ["step-0", "step-0-1", "step-0-2"]
    assert sorted(p.name for p in (tmp_path / "c").glob("step*")) == ["step-0-1", "step-0-2"]


def test_a_checkpoint_of_another_model_names_the_tensors_that_do_not_fit(tmp_path):
    _train_and_save(write(tmp_path / "a", plan_of()), tmp_path / "c", 1)
    other = write(tmp_path / "b", plan_of(blocks=3))
    engine = Engine(other, source=Tensors.of(reference(blocks=3)), optimizer=ADAMW)
    with pytest.raises(CheckpointError, match=r"unknown to the model.*blocks\.3\.") as caught:
        engine.load(tmp_path / "c")
    assert "missing" not in str(caught.value)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    folder = write(tmp_path / "a", plan_of())
    _train_and_save(folder, tmp_path / "c", 1)
    engine = Engine(folder, source=Tensors.of(reference()), optimizer=Optimizer(name="sgd", state="float64"))
    with pytest.raises(CheckpointError, match="state of adamw, the job's optimizer is sgd"):
        engine.load(tmp_path / "c")


def test_a_damaged_or_absent_checkpoint_is_refused(tmp_path):
    engine = _engine(write(tmp_path / "a", plan_of()))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        engine.load(tmp_path / "nowhere")
    saved = engine.save(tmp_path / "c")
    (saved / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        engine.load(tmp_path / "c")
    shutil.rmtree(saved)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        engine.load(tmp_path / "c")


def test_each_tensor_is_written_once_whatever_the_number_of_replicas(tmp_path):
    plan = plan_of(dp=2, tp=2, zero=0, microbatches=2)
    folder = write(tmp_path / "build", plan, frozen=("embed",))
    run(_train_and_save, plan, folder, tmp_path / "c", 1)
    elements = sum(p.numel() for n, p in reference().named_parameters()) * 3
    elements -= 2 * reference().embed.weight.numel()  # frozen: no moments
    written = sum(f.stat().st_size for f in (tmp_path / "c" / "step-1").glob("*.distcp"))
    names = 3 * len(list(reference().parameters()))
    assert elements * 8 < written < elements * 8 + names * 2 * 2500  # bytes; torch.save adds up to 2.5 kB a rectangle
    assert json.loads((tmp_path / "c" / "step-1" / "state.json").read_text())["step"] == 1
