"""Step times of published runs, predicted: the targets of the tables, on some rows of each (docs/accuracy.md has all)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.validation.predict import layer_seconds, predict
from tests.validation.published import (
    Row,
    beyond,
    fms,
    foundry,
    megatron,
    megatron_core,
    megatron_v100,
    recomputed,
    table,
    torchtitan,
)

MEAN, LARGEST = 0.06, 0.15


def errors(rows: Iterable[Row], job: Callable[[Row], dict[str, Any]], code: str = "") -> list[float]:
    """Relative errors; the rows are asserted to be comparable."""
    found = []
    for row in rows:
        assert not beyond(row), row
        found.append(predict(job(row), recomputed(row), code).cost.step_seconds / row["seconds"] - 1)
    return found


class TargetMissed(Exception):
    """The mean is above its target, though no worse than it was when last looked at."""


missed = pytest.mark.xfail(raises=TargetMissed, strict=True)
"""A table whose mean misses the target: getting worse fails, and so does meeting it, so that this mark goes."""


def assert_close(found: list[float], known: float = MEAN) -> None:
    """The mean is at most the target, or ``known`` where that is missed; the largest error at most its target."""
    told, mean = ", ".join(f"{e:+.1%}" for e in found), sum(map(abs, found)) / len(found)
    assert mean <= known, told
    assert max(map(abs, found)) <= LARGEST, told
    if mean > MEAN:
        raise TargetMissed(told)


def own(row: Row) -> dict[str, Any]:
    return megatron(row, sequence_parallel=row["sequence_parallel"], recompute=row["recompute"])


def test_megatron_of_2022_takes_as_long_as_predicted() -> None:
    assert_close(errors(table("korthikanti_iteration")["rows"][:4], own, "megatron"))


def test_megatron_of_2021_takes_as_long_as_predicted() -> None:
    rows = table("megatron_sc21_table1")["rows"]
    assert_close(errors([rows[0], rows[2], rows[4]], megatron, "megatron"))


def test_a_strong_scaling_of_megatron_takes_as_long_as_predicted() -> None:
    assert_close(errors([r for r in table("megatron_sc21_table2")["rows"] if r["zero"] == 0], megatron, "megatron"))


def test_sharded_training_on_a100_takes_as_long_as_predicted() -> None:
    rows = [r for r in table("torchtitan")["rows"] if r["device"].startswith("A100") and "seconds" in r]
    assert len(rows) == 8
    assert_close(errors(rows, torchtitan))


def test_sharded_training_on_h100_takes_as_long_as_predicted() -> None:
    rows = [r for r in table("torchtitan")["rows"] if "compile" in r and r["tp"] == 1 and not beyond(r)]
    assert [r["devices"] for r in rows] == [8, 8, 128, 128]
    assert_close(errors(rows, torchtitan))


@pytest.mark.parametrize("device", ["a100_80gb", "h100_80gb"])
def test_sharded_training_from_8_to_512_devices_takes_as_long_as_predicted(device: str) -> None:
    rows = [r for r in table("llm_foundry")["rows"] if r["device"] == device and r["name"] in ("MPT-7b", "MPT-13b")]
    assert_close(errors(rows, foundry))


@missed
def test_megatron_core_without_tensor_parallelism_takes_as_long_as_predicted() -> None:
    assert_close(errors(table("megatron_core_h100")["rows"][:1], megatron_core), known=0.09)


def test_one_layer_takes_as_long_as_predicted_with_and_without_recompute() -> None:
    row, found = table("korthikanti_iteration")["rows"][0], []
    for r in table("korthikanti_layer")["rows"]:
        job = megatron(row, sequence_parallel=r["sequence_parallel"], recompute=r["recompute"])
        ours = layer_seconds(job, ("none", "selective", "full").index(r["recompute"]))
        found.append(1e3 * sum(ours) / (r["forward"] + r["backward"]) - 1)
    assert_close(found)


# ------------------------------------------------------------------ held out: no number was chosen to fit these rows


def test_held_out_sharded_training_over_slow_networks_takes_as_long_as_predicted() -> None:
    """400 and 800 Gbit/s for eight devices."""
    assert_close(errors(table("fms_fsdp")["rows"], fms))


def test_held_out_training_on_v100_takes_as_long_as_predicted() -> None:
    assert_close(errors(table("megatron_v100")["rows"], megatron_v100, "megatron"))


@missed
def test_held_out_sharded_training_on_a100_of_40_gb_takes_as_long_as_predicted() -> None:
    """The mean misses its target: all rows are too fast, those that fill the memory most (docs/accuracy.md has all)."""
    rows = [
        r for r in table("llm_foundry_a100_40gb")["rows"] if r["name"] in ("MPT-3b", "MPT-7b") and r["length"] == 2048
    ]
    assert_close(errors(rows, foundry), known=0.09)
