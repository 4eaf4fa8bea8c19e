"""Random valid plans over every family, for a fixed time: not only the plan that is chosen must be right."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from cases import FAMILIES, assert_equal, prove_source, source_of

SECONDS = 60.0
SEED = 20261124


def draw(rng: random.Random) -> tuple[str, dict[str, Any], int]:
    """A family, pins, and a seed for the placements."""
    pp, dp, tp = rng.choice([(1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 4), (2, 2, 2)])
    pins: dict[str, Any] = dict(pp=pp, dp=dp, tp=tp, recompute=rng.choice(["none", "full", "selective"]))
    pins["microbatch"] = rng.choice([1, 2]) if pp > 1 else rng.choice([m for m in (1, 2, 4, 8) if m * dp <= 8])
    if dp > 1:
        pins["zero"] = rng.choice([0, 1, 2, 3])
    if pp > 1:
        pins["schedule"] = rng.choice(["1f1b", "gpipe"])
    return rng.choice(sorted(FAMILIES)), pins, rng.randrange(2**31)


@pytest.fixture
def random_placements(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Every strategy and every move gets a random price, so the ILP gives a random valid assignment."""
    from autopar.solve.formulation import Formulation

    rng = random.Random()
    monkeypatch.setattr(Formulation, "node_cost", lambda self, item, s: rng.random())
    return rng


def test_random_plans_equal_one_device(random_placements: random.Random) -> None:
    rng, until, proved = random.Random(SEED), time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        family, pins, seed = draw(rng)
        random_placements.seed(seed)
        assert_equal(prove_source(source_of(family), pins))
        proved += 1
    assert proved >= 3
