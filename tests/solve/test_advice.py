"""Advice: what more of the cluster, other pins, another strategy would save; every number is a plan's own."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from autopar import api, cli
from autopar.cluster.cluster import Cluster
from autopar.solve import advice
from autopar.solve.search import solve
from autopar.spec.job import Job, Pins
from autopar.spec.load import load_job

TINY = {
    "model": {"hf": "llama", "config": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4,
              num_attention_heads=8, num_key_value_heads=4, vocab_size=512)},
    "cluster": "dgx-a100",
    "batch": {"sequences": 16, "length": 512},
}  # fmt: skip


def job_of(tmp_path, **changes) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return load_job(str(path), [])


CACHE: dict = {}


def planned(job: Job):
    program, _ = api.program_of(job, CACHE)
    return program, api.cluster_of(job), api.plan_job(job, CACHE)


def test_no_advice_is_better_than_the_plan_that_was_made_of_it(tmp_path):
    job = job_of(tmp_path, pins={"tp": 8, "recompute": "full"})
    program, cluster, document = planned(job)
    found = advice.unpinned(program, cluster, job, document)
    best = api.plan_job(job.model_copy(update={"pins": Pins()}), CACHE)
    longer = float(re.search(r"this one takes ([\d.]+)% longer", found[0])[1]) / 100
    assert document.cost.step_seconds / best.cost.step_seconds - 1 == pytest.approx(longer, abs=1e-3)
    assert 2 <= len(found) <= 4
    for line in found[1:]:
        less = float(re.search(r"([\d.]+)% less", line)[1]) / 100
        assert 0 < less <= 1 - best.cost.step_seconds / document.cost.step_seconds + 1e-3
    told = {line.split(":")[0].split(" ")[0] for line in found[1:]}
    assert told <= {"tp", "recompute"}


def test_pins_that_cost_nothing_are_said_to(tmp_path):
    job = job_of(tmp_path)
    program, cluster, document = planned(job)
    assert advice.unpinned(program, cluster, job, document) == []
    pins = Pins(tp=document.plan.mesh.tp, zero=document.plan.zero)
    pinned = job.model_copy(update={"pins": pins})
    again = api.plan_job(pinned, CACHE)
    assert again.cost.step_seconds == pytest.approx(document.cost.step_seconds, rel=1e-3)
    assert advice.unpinned(program, cluster, pinned, again) == ["the pins cost nothing: no plan without them is faster"]


def test_more_memory_and_faster_links_are_priced_by_plans_on_such_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(advice, "WORTH", 0.0)
    job = job_of(tmp_path, pins={"tp": 8})
    program, cluster, document = planned(job)
    lines = advice.shadow_prices(program, cluster, job, document)
    assert lines[0] == "4.0 GiB more memory per device would save nothing worth telling"
    link = next(x for x in lines if "inside a host" in x)
    saved = float(re.search(r"would save ([\d.]+)%", link)[1]) / 100
    better = advice.faster(Cluster.load("dgx-a100"), "host")
    assert saved == pytest.approx(
        1 - solve(program, better, job).cost.step_seconds / document.cost.step_seconds, abs=1e-3
    )
    assert not any("between hosts" in x for x in lines), "there is one host"


def test_other_strategies_of_a_node_cost_more_than_the_plans_own(tmp_path):
    job = job_of(tmp_path, pins={"tp": 8})
    program, cluster, document = planned(job)
    graph = next(g for g in document.plan.choices if g != "program")
    node = next(n for n in document.plan.choices[graph] if "linear" in n)
    lines = advice.alternatives(program, cluster, job, document, (graph, node))
    assert sum(x.endswith("the plan's") for x in lines) == 1
    assert any("more a micro-batch" in x for x in lines) and any("does not go with the rest" in x for x in lines)
    whole = next(x for x in lines if x.startswith("R, R → R"))
    assert "more a micro-batch" in whole


def test_explain_and_plan_give_the_advice_of_a_job(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**TINY, "pins": {"tp": 8, "recompute": "full"}}))
    assert cli.main(["explain", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["advice"]
    assert list(found) == ["what more of it would save", "what the pins cost"]
    assert cli.main(["explain", str(path), "--why", "linear"]) == 0
    assert "the other strategies of block_0.linear" in capsys.readouterr().out
    assert cli.main(["plan", str(path)]) == 0
    assert "what the pins cost\n  the best plan without pins takes" in capsys.readouterr().out


def test_a_second_plan_of_a_program_is_the_same_as_a_first(tmp_path):
    job = job_of(tmp_path)
    cache: dict = {}
    first = api.plan_job(job, cache)
    changed = api.plan_job(job.model_copy(update={"pins": Pins(zero=1)}), cache)
    fresh = api.plan_job(job.model_copy(update={"pins": Pins(zero=1)}), {})
    assert changed.plan == fresh.plan and changed.cost == fresh.cost
    split = api.plan_job(job.model_copy(update={"pins": Pins(tp=8, zero=0)}), cache)
    whole = job.model_copy(update={"pins": Pins(tp=8, zero=0, placements={"*.gate_proj.*": "S(0)"})})
    assert api.plan_job(whole, cache).cost == api.plan_job(whole, {}).cost != split.cost
    assert api.plan_job(job, cache).plan == first.plan
