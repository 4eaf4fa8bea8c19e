"""Experts of a mixture split over tp: each device has some of them, or a part of each."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_equal, job_of, prove_source, source_of

import autopar
from autopar.api import planned
from autopar.cluster.cluster import Cluster
from autopar.errors import PlanError
from autopar.models.batch import example_batch
from autopar.models.load import build

MIXTRAL = source_of("mixtral", num_hidden_layers=2)
DECLARED: dict[str, Any] = dict(
    family="llama", layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=61, moe={"experts": 4, "top": 2}
)
GATHERED = {**DECLARED, "moe": {"experts": 4, "top": 2, "dispatch": "gathered"}}
WHOLE_EXPERTS = {"*.experts.*": "S(0)"}


def placements(source: dict[str, Any], pins: dict[str, Any]) -> dict[str, str]:
    """Where the experts' parameters live under the best plan."""
    model = build(source, meta=True)
    job = job_of(pins)
    assert job.batch is not None
    batch = example_batch(model, job.batch.sequences, job.batch.length, source=source)
    found = planned(autopar.trace(model, batch), Cluster.load(job.cluster), job).plan.placements
    return {name: place for name, place in found.items() if ".experts." in name}


@pytest.mark.parametrize(
    ("source", "pins"),
    [
        (MIXTRAL, dict(tp=2)),
        (MIXTRAL, dict(tp=2, pp=2, dp=2, zero=2, microbatch=1)),
        (DECLARED, dict(tp=4)),
        (GATHERED, dict(tp=2, recompute="full")),
    ],
    ids=["mixtral", "mixtral in a pipeline", "declared", "declared and gathered"],
)
def test_whole_experts_on_every_device_equal_one_device(source: dict[str, Any], pins: dict[str, Any]) -> None:
    assert_equal(prove_source(source, {**pins, "placements": WHOLE_EXPERTS}))


@pytest.mark.parametrize("source", [MIXTRAL, DECLARED, GATHERED], ids=["mixtral", "declared", "declared and gathered"])
def test_pinned_experts_live_where_they_are_pinned(source: dict[str, Any]) -> None:
    whole = placements(source, dict(tp=2, placements=WHOLE_EXPERTS))
    assert len(whole) >= 4 and set(whole.values()) == {"S(0)@tp"}
    inner = placements(source, dict(tp=2, placements={"*.experts.down*": "S(2)"}))
    assert {p for n, p in inner.items() if ".down" in n} == {"S(2)@tp"}


def test_placements_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match=r"no parameter is called '\*\.expert\.\*'"):
        placements(DECLARED, dict(tp=2, placements={"*.expert.*": "S(0)"}))
    with pytest.raises(PlanError, match=r"of shape \[4, 48, 32\] cannot be S\(0\) on tp=3; it can be one of R, S\(1\)"):
        placements(DECLARED, dict(tp=3, placements={"*.experts.gate": "S(0)"}))
    with pytest.raises(PlanError, match="need tp > 1"):
        placements(DECLARED, dict(tp=1, placements=WHOLE_EXPERTS))
