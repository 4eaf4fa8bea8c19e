"""Models that mix the sequences of a batch: neither replicas nor micro-batches leave their result what it is."""

from __future__ import annotations

from autopar.errors import PlanError
from autopar.ir.mixing import mixes_batch
from autopar.ir.program import Program
from autopar.spec.job import Job


def whole_batches(program: Program, job: Job) -> Job:
    """The job with one replica and one micro-batch pinned where the program mixes sequences, unchanged where not.

    Raises `PlanError`, naming the operators, where the pins ask for more.
    """
    found = program.memo.setdefault("mixes_batch", None)
    if found is None:
        found = program.memo["mixes_batch"] = mixes_batch(program)
    if not found or job.batch is None:
        return job
    pins, sequences = job.pins, job.batch.sequences
    wrong = [f"dp {pins.dp}"] if pins.dp not in (None, 1) else []
    wrong += [f"microbatch {pins.microbatch}"] if pins.microbatch not in (None, sequences) else []
    if wrong:
        raise PlanError(
            f"pins: {' and '.join(wrong)} would change the model's result, which depends on the batch as a whole "
            f"({found[0]}{' and others' if len(found) > 1 else ''}); dp 1 and microbatch {sequences} would be right"
        )
    return job.model_copy(update={"pins": pins.model_copy(update={"dp": 1, "microbatch": sequences})})
