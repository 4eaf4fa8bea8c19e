"""Bounds before stages are cut: never above what a candidate comes to, and most candidates need no more."""

from __future__ import annotations

import pytest

from autopar import api
from autopar.solve import bounds
from autopar.solve.outcome import Outcome, settle
from autopar.solve.prepare import PROMISE
from autopar.solve.search import Search, ordered, prepared
from autopar.solve.stages import Cutter
from autopar.spec.job import Job

JOB = {"model": "llama-2-7b", "cluster": {"name": "dgx-a100", "hosts": 1}, "batch": {"sequences": 64, "length": 4096},
       "passes": [{"mixed_precision": {"compute": "bfloat16"}}], "pins": {"pp": 2}}  # fmt: skip
CACHE: api.Cache = {}


def searched(**pins: object):  # noqa: ANN201 - the parts of a search
    job = Job.model_validate(JOB | {"pins": {**JOB["pins"], **pins}})
    program, _ = api.program_of(job, CACHE)
    source, setting, batch = prepared(program, api.cluster_of(job), job)
    return source, setting, ordered(source, setting, batch, job.pins)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_no_bound_is_above_what_its_candidate_comes_to(recompute: str | None) -> None:
    source, setting, found = searched(recompute=recompute)
    compared = 0
    for _, c in found:
        blocks, cutter = source.blocks(c), Cutter(source.blocks(c), c, setting)
        spans = cutter.cut()[1] if c.virtual == 1 else source.even(c)[1]
        made = settle(cutter, spans) if spans else "full"
        if not isinstance(made, Outcome):
            continue
        compared += 1
        if c.virtual == 1:
            assert not bounds.hopeless(blocks, c, setting, made.seconds / PROMISE), c
        else:
            assert PROMISE * bounds.carried(blocks, c, setting, spans) <= made.seconds, c
    assert compared > 20


def test_few_candidates_are_cut_and_scheduled() -> None:
    source, setting, found = searched()
    search = Search(source, setting)
    search.run(found, float("inf"))
    assert search.best is not None and search.seen < len(found) / 3
