"""What a proof runs: a batch that goes with the pins, on as many devices as they take."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.proof import batch_of
from autopar.spec.job import Job


@pytest.mark.parametrize(
    ("pins", "devices", "sequences"),
    [
        (dict(), 4, 8),
        (dict(dp=3), 3, 9),
        (dict(tp=1, pp=1, microbatch=2), 3, 12),
        (dict(dp=2, microbatch=8), 2, 32),
        (dict(pp=4, microbatch=4), 4, 16),
        (dict(pp=3), 3, 9),
        (dict(tp=2, pp=2, microbatch=1), 8, 8),
    ],
    ids=str,
)
def test_the_small_batch_goes_with_every_pin(pins: dict[str, Any], devices: int, sequences: int) -> None:
    job = Job.model_validate({"batch": {"sequences": 1024, "length": 4096}, "pins": pins})
    batch = batch_of(job, devices)
    assert (batch.sequences, batch.length) == (sequences, 16)
