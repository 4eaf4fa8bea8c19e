"""Memory of published runs and closed forms: states exact, torchtitan's peaks, and runs that do not fit."""

from __future__ import annotations

import pytest
import torch

from autopar.cost.memory import Sharding, states
from autopar.cost.precision import Precision
from autopar.errors import InfeasibleError
from tests.validation.predict import peak_of_every_second_product, predict
from tests.validation.published import Row, alternates, beyond, table, torchtitan

GIB = 2**30
MARGIN = 0.05  # what a plan leaves to what the allocator holds beside tensors: ``search.memory_margin``
HALF = torch.float16
ADAM = Precision(HALF, HALF, HALF, HALF, HALF, torch.float32, HALF)
"""The paper's: 2 + 2 bytes a parameter and its gradient, 12 of state, the master copy being one of three tensors."""


def unit(gigabytes: float) -> float:
    """One of the last digit that is printed."""
    digits = str(gigabytes).rstrip("0").partition(".")[2]
    return 10.0 ** -len(digits) * (0.6 if digits else 1.01)


def test_every_state_of_the_zero_paper_is_exact() -> None:
    for row in table("zero")["rows"]:
        n, dp, zero = row["parameters"], row["dp"], row["zero"]
        made = states(Sharding(zero, dp, ADAM, moments=3), n, 0.0, 0.0, 0.0)
        beside = {1: 1, 2: 1}.get(zero, 0) * 2 * n / dp if dp > 1 else 0.0  # FSDP's shards beside what is whole
        ours = (made.parameters + made.gradients + made.optimizer - beside) / 1e9
        assert abs(ours - row["gigabytes"]) <= unit(row["gigabytes"]), (row, ours)


def test_the_peaks_of_torchtitan_are_within_five_percent_on_average() -> None:
    rows = [r for r in table("torchtitan")["rows"] if "memory_gib" in r and alternates(r) and not beyond(r)]
    assert len(rows) == 4
    found = []
    for row in rows:
        ours = peak_of_every_second_product(torchtitan({**row, "recompute": "full"})) / GIB / (1 - MARGIN)
        found.append(ours / row["memory_gib"] - 1)
    assert sum(map(abs, found)) / len(found) <= 0.05, found
    assert max(map(abs, found)) <= 0.15, found


def ran_out(row: Row) -> bool:
    return bool(row.get("out_of_memory"))


@pytest.mark.parametrize("row", [r for r in table("torchtitan")["rows"] if ran_out(r)], ids=lambda r: r["recompute"])
def test_what_ran_out_of_memory_does_not_fit(row: Row) -> None:
    with pytest.raises(InfeasibleError):
        predict(torchtitan(row, memory=None))
    peak = predict(torchtitan(row), share=0.5).cost.peak_bytes
    assert peak > 80 * GIB  # nor with every second block recomputed


def test_what_ran_with_all_blocks_recomputed_fits() -> None:
    rows = [r for r in table("torchtitan")["rows"] if r["device"] == "A100-80GB" and r.get("recompute") == "full"]
    assert len(rows) == 2
    for row in rows:
        assert predict(torchtitan(row, memory=None)).cost.peak_bytes < 80 * GIB
