"""Plans as JSON and as text: what is written reads back equal, and has the contract's keys."""

import json

import pytest

from autopar.errors import PlanError
from autopar.plan.file import read_plan, writable, write_plan
from autopar.plan.plan import Bytes, Cost, MeshShape, ModelFacts, Plan, PlanDocument, RunnerUp, Search, Seconds, Stage
from autopar.plan.text import summary

STAGES = (
    Stage(blocks=(0, 2), recompute=("none", "full", "full"), peak_bytes=3 * 2**30, seconds=Seconds(forward=0.1)),
    Stage(blocks=(3, 5), recompute=("none", "full", "full"), peak_bytes=3 * 2**30, seconds=Seconds(forward=0.1)),
    Stage(blocks=(6, 7), recompute=("none", "none"), peak_bytes=2**30, seconds=Seconds(forward=0.1)),
)
PLAN = Plan(mesh=MeshShape(pp=3, dp=2, tp=4), zero=1, microbatches=8, stages=STAGES, unsplit=("aten.odd.default",))
COST = Cost(
    step_seconds=2.0,
    compute_seconds=1.0,
    exposed_communication_seconds=0.25,
    bubble_seconds=0.5,
    optimizer_seconds=0.25,
    tokens_per_second=1e5,
    mfu=0.5,
    peak_bytes=3 * 2**30,
    bytes=Bytes(parameters=2 * 2**30, activations=2**30),
)
SEARCH = Search(seconds=1, trace_seconds=0.5, status="optimal", objective=2.0, bound=1.99, gap=0.005, candidates=12)
OTHER = RunnerUp(
    summary="tp 8", mesh=MeshShape(tp=8), zero=0, microbatch=1, schedule="1f1b", step_seconds=2.2, peak_bytes=1
)
FACTS = ModelFacts(parameters=100, trainable_parameters=100, flops_per_token=6e9)
DOCUMENT = PlanDocument(model=FACTS, plan=PLAN, cost=COST, search=SEARCH, runners_up=(OTHER,), binding=("memory",))


def test_a_plan_reads_back_equal(tmp_path):
    write_plan(DOCUMENT, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == read_plan(tmp_path) == DOCUMENT
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_json_counts_the_blocks_that_are_recomputed():
    stage = json.loads(DOCUMENT.model_dump_json())["plan"]["stages"][0]
    assert stage["recompute"] == {"none": 1, "selective": 0, "full": 2}
    assert Stage.model_validate(stage) == STAGES[0]


def test_text_has_the_decision_the_ledger_and_like_stages_on_one_line():
    text = summary(DOCUMENT, "tiny on eight")
    for words in (
        "tiny on eight: 100 parameters",
        "pp 3 · dp 2 · cp 1 · tp 4 = 24 devices; ZeRO 1",
        "2 s = compute 1 s + exposed communication 250 ms + bubble 500 ms + optimizer 250 ms",
        "gap 0.50%",
        "stages 0–1",
        "blocks 0–5, recompute full in 2 each",
        "stage 2 ",
        "not split      aten.odd.default",
        "tp 8: 2.2 s (+10.0%)",
    ):
        assert words in text, words


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    with pytest.raises(PlanError, match="there is no folder"):
        writable(tmp_path / "no" / "plan.json")
    with pytest.raises(PlanError, match="it is a folder"):
        writable(tmp_path)
    writable(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot write /proc/plan.json"):
        write_plan(DOCUMENT, "/proc/plan.json")
