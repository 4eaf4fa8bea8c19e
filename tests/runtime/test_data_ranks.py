"""The data under real processes: one sequence of global batches on 1, 2 and 4 ranks, also after resuming on another number;
steps that do not wait for it; an error told on every rank."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time

import pytest
import torch
from handmade import plan_of, reference, write

from autopar.errors import AutoparError
from autopar.runtime.ahead import Ahead
from autopar.runtime.data import batches_of
from autopar.runtime.engine import Engine
from autopar.runtime.folder import BuildFolder
from autopar.runtime.sources import Tensors
from autopar.runtime.spawn import spawn
from autopar.spec.job import Optimizer

ADAMW = Optimizer(lr=1e-2, state="float64")
STEPS, SAVED = 5, 2
PLANS = {  # all with 8 sequences of 5 tokens a step
    1: plan_of(microbatches=4, microbatch=2),
    2: plan_of(tp=2, microbatches=2, microbatch=4),
    4: plan_of(pp=2, dp=2, zero=1, microbatches=2, microbatch=2),
}


def build(folder, ranks, text):
    """A build folder for so many ranks over the text."""
    return write(folder, PLANS[ranks], job=json.dumps({"data": {"text": [str(text)]}}))


def train(folder, checkpoint, load):
    """This rank's losses and a digest of its batches, of all steps or of those after the checkpoint."""
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    engine = Engine(folder, source=Tensors.of(reference()), optimizer=ADAMW, seed=3)
    if load:
        engine.load(checkpoint)
    ahead = Ahead(batches_of(BuildFolder.read(folder), engine.world, 3), engine.optimizer.updates, stop=STEPS)
    losses, digests = [], []
    for step in range(engine.optimizer.updates, STEPS):
        batch = ahead.batch(step)
        digests.append(hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest())
        losses.append(engine.step(batch))
        if step + 1 == SAVED and not load:
            engine.save(checkpoint)
    ahead.close()
    return losses, digests


def run(folder, ranks, checkpoint, load=False):
    if ranks == 1:
        before = os.environ.get("LOCAL_RANK")
        try:
            return [train(folder, checkpoint, load)]
        finally:
            os.environ.pop("LOCAL_RANK") if before is None else os.environ.update(LOCAL_RANK=before)
    return spawn(train, ranks, folder, checkpoint, load)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Bytes below the handmade model's vocabulary of 13; three and a half passes are trained on."""
    draw = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(torch.randint(1, 13, (60,), generator=draw).tolist()))
    return path


def test_every_number_of_ranks_has_the_same_batches_also_after_resuming_on_another(tmp_path, text):
    expected, found = None, {}
    for ranks in (1, 2, 4):
        folder = build(tmp_path / f"on{ranks}", ranks, text)
        results = found[ranks] = run(folder, ranks, tmp_path / f"saved{ranks}")
        expected = expected or results[0]
        for losses, digests in results:
            assert digests == expected[1] and losses == pytest.approx(expected[0], rel=1e-12)
    assert len(set(expected[1])) == STEPS
    for saved, ranks in ((1, 4), (4, 2), (2, 1)):
        for losses, digests in run(tmp_path / f"on{ranks}", ranks, tmp_path / f"saved{saved}", load=True):
            assert digests == expected[1][SAVED:], (saved, ranks)
            assert losses == pytest.approx(expected[0][SAVED:], rel=1e-10), (saved, ranks)


def prepare(folder):
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    read = BuildFolder.read(folder)
    engine = Engine(folder, source=Tensors.of(reference()))
    try:
        batches_of(read, engine.world, 0)
    except AutoparError as error:
        return str(error)
    return ""


def test_what_is_wrong_with_the_data_is_told_on_every_rank(tmp_path):
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "a.txt").write_text("words")
    job = json.dumps({"data": {"text": [str(tmp_path / "a.txt")], "tokenizer": str(tmp_path / "no.json")}})
    folder = write(tmp_path / "build", PLANS[2], job=job)
    told = spawn(prepare, 2, folder)
    assert len(told) == 2 and all("no.json' cannot be read as a tokenizer" in message for message in told)


class Slow:
    """Batches that each take ``seconds`` to make."""

    def __init__(self, seconds: float, broken: int = -1):
        self.seconds, self.broken, self.made = seconds, broken, []

    def describe(self) -> str:
        return "slow"

    def batch(self, step: int):
        time.sleep(self.seconds)
        if step == self.broken:
            raise AutoparError("the disk is gone")
        self.made.append(step)
        return {"input_ids": torch.full((1,), step)}


def test_a_step_does_not_wait_for_data_that_is_made_as_fast_as_it_is_used():
    ahead = Ahead(Slow(0.02), 0, stop=12)
    waited = []
    for step in range(12):
        begin = time.perf_counter()
        assert int(ahead.batch(step)["input_ids"]) == step
        waited.append(time.perf_counter() - begin)
        time.sleep(0.04)  # the step itself, which leaves the interpreter to others
    ahead.close()
    assert waited[0] >= 0.01, "the first batch is not there yet"
    assert sorted(waited[1:])[len(waited) // 2] < 0.005, waited


def test_batches_are_kept_ready_up_to_a_bound_and_the_thread_ends(tmp_path):
    slow = Slow(0.0)
    ahead = Ahead(slow, 3, stop=100, depth=2)
    deadline = time.monotonic() + 5
    while len(slow.made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert slow.made == [3, 4, 5]  # two are ready, one waits for room
    ahead.close()
    assert not any(t.name == "autopar-data" for t in threading.enumerate())


def test_an_error_while_a_batch_is_made_comes_at_its_step():
    ahead = Ahead(Slow(0.0, broken=2), 0, stop=5)
    assert [int(ahead.batch(i)["input_ids"]) for i in range(2)] == [0, 1]
    with pytest.raises(AutoparError, match="the disk is gone"):
        ahead.batch(2)
    ahead.close()
