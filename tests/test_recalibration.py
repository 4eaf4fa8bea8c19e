"""A run that was slower than predicted: where the seconds are, and what the machine as it is measured would ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar import recalibration
from autopar.api import compile_job
from autopar.cluster import calibrate
from autopar.errors import PlanError
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.runtime.report import RECALIBRATE, disagreement
from autopar.spec.job import Job

TINY = {"family": "llama", "layers": 2, "hidden": 32, "ffn": 48, "heads": 4, "kv_heads": 2, "vocab": 64}


def machine(devices: int, flops: float, bandwidth: float) -> dict[str, Any]:
    device = {"name": "core", "memory": 2**32, "bandwidth": 2e10, "flops_per_second": {"float32": flops}}
    link = {"span": "host", "bandwidth": bandwidth, "latency": 1e-5}
    return {"name": "measured", "device": device, "devices_per_host": devices, "hosts": 1, "links": [link]}


def job(**pins: Any) -> Job:
    cluster = machine(2, 1e11, 1e10)
    return Job.model_validate(
        {"model": TINY, "cluster": cluster, "batch": {"sequences": 8, "length": 16}, "pins": pins}
    )


def test_a_slower_link_is_found_and_a_plan_that_talks_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_job(job(tp=2), tmp_path / "build")
    asked = []

    def slower(devices: int) -> dict[str, Any]:
        asked.append(devices)
        return machine(devices, 1e11, 1e6)

    monkeypatch.setattr(calibrate, "calibrate", slower)
    found = recalibration.recalibrated(folder)
    assert asked == [2] and found["measured"] is None
    planned, again = found["planned"].cost, found["again"].cost
    assert again.compute_seconds == pytest.approx(planned.compute_seconds)
    assert again.exposed_communication_seconds > 10 * planned.exposed_communication_seconds
    told = recalibration.text(found)
    assert "what was most unlike the prediction: exposed communication" in told
    assert "% less" in told and "tp 2" not in told, "the pin holds"


def test_a_machine_as_it_was_taken_for_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_job(job(), tmp_path / "build")
    monkeypatch.setattr(calibrate, "calibrate", lambda devices: machine(devices, 1e11, 1e10))
    found = recalibration.recalibrated(folder)
    assert found["again"].cost == found["planned"].cost
    assert recalibration.text(found).endswith("the plan is still the best one")


def test_a_module_of_python_says_what_to_do(tmp_path: Path) -> None:
    model = build(TINY, meta=False)
    batch = example_batch(model, 8, 16, source=TINY)
    folder = autopar.compile(model, machine(1, 1e11, 1e10), batch=batch).save(tmp_path / "build")
    with pytest.raises(PlanError, match="made from a module in Python; compile it again"):
        recalibration.recalibrated(folder)


PREDICTED = {"step_seconds": 1.0, "data_seconds": 0.0, "passes_seconds": 0.9, "update_seconds": 0.1}


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ((0.0, 1.0, 0.1), None),
        ((0.0, 1.8, 0.2), "2.00 times what was predicted; most of the difference is forward, backward"),
        ((0.9, 0.9, 0.1), "1.90 times what was predicted; most of the difference is waiting for data: 0.9000 s"),
        ((0.0, 0.9, 0.7), "most of the difference is the update: 0.7000 s, 0.1000 s predicted"),
        ((0.0, 0.3, 0.1), "0.40 times what was predicted; most of the difference is forward, backward"),
    ],
)
def test_the_part_that_was_predicted_worst_is_named(measured: tuple[float, float, float], words: str | None) -> None:
    parts = dict(zip(("data_seconds", "passes_seconds", "update_seconds"), measured, strict=True))
    told = disagreement(PREDICTED, {"step_seconds": sum(measured), **parts})
    if words is None:
        assert told == []
        return
    assert words in told[0]
    assert (RECALIBRATE in told) == ("data" not in told[0])
