"""`explain`: where seconds and bytes go, why a node is placed as it is, and how two plans differ."""

import pytest
from plan_samples import GIB, document

from autopar import cli
from autopar.errors import PlanError
from autopar.plan.explain import BAR, bar, explain
from autopar.plan.file import read_plan, write_plan


def test_the_ledger_has_bars_in_proportion_and_adds_up():
    text = explain(document())
    rows = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ") and "%" in line}
    assert rows["compute"].count("█") == round(0.75 * BAR) and "15 s" in rows["compute"] and "75.0%" in rows["compute"]
    shares = [float(rows[n].split()[-1].rstrip("%")) for n in ("compute", "exposed communication", "bubble")]
    assert sum(shares) + 2.5 == pytest.approx(100)
    assert rows["free"].split()[-3:] == ["16.0", "GiB", "21.1%"]


def test_a_bar_is_as_long_as_its_share():
    assert bar(0) == " " * BAR and bar(1) == "█" * BAR and len(bar(0.333)) == BAR
    assert bar(2) == bar(1) and bar(0.5 / BAR).rstrip() == "▌"


def test_what_binds_and_the_runners_up_are_named_with_their_reasons():
    text = explain(document(pp=2))
    for words in (
        "memory: 60.0 of 76.0 GiB on stage 0",
        "1. tp 8 · zero 2",
        "21 s, +5.0% slower; 10.0 GiB less memory",
    ):
        assert words in text
    assert "none of 1,234 candidates can take less than 19.9 s (gap 0.50%)" in text
    assert "pp 1 " in text and "59.0 GiB" in text


def test_the_slowest_of_unequal_stages_is_named():
    doc = document(pp=2)
    first, last = doc.plan.stages
    slow = last.model_copy(update={"seconds": last.seconds.model_copy(update={"forward": 2.0})})
    text = explain(document(pp=2, plan={"stages": (first, slow)}))
    assert "pace: stage 1 takes 3 s a micro-batch, 33.3% above the mean" in text
    assert "pace" not in explain(doc)


def test_why_tells_a_nodes_placement_its_neighbours_and_what_moves():
    assert explain(document(), why="block_0.linear").splitlines() == [
        "block_0.linear: aten.linear → f32[2, 16, 8], one of the nodes of a block that stands 3 times",
        "  made        S(2) (split along dim 2 over tp)",
        "  computing   10 ms forward, 20 ms backward for one micro-batch",
        "  reads       %hidden: S(1) → R: all-gather, back reduce-scatter · 5 ms (one move, shared with %linear_1)",
        "  reads       %up_weight: S(0), read as it is",
        "  read by     %relu: S(2), read as it is",
        "  its moves   5 ms for one micro-batch, in and out (30 ms of computing)",
    ]


def test_a_move_that_two_readers_share_counts_once():
    text = explain(document(), why="hidden")
    assert text.count("%linear") == 2 and "its moves   5 ms" in text


def test_why_takes_a_bare_name_and_tells_of_every_graph_that_has_it():
    assert (
        explain(document(), why="linear_2")
        == explain(document(), why="%linear_2")
        == explain(document(), why="block_0.linear_2")
    )
    both = document(plan={"choices": document().plan.choices | {"block_1": document().plan.choices["block_0"]}})
    text = explain(both, why="linear_2")
    assert "block_0.linear_2" in text and "block_1.linear_2" in text


def test_why_takes_parameters_and_globs_and_follows_them_into_blocks():
    one = explain(document(), why="blocks.1.up.weight")
    assert "blocks.1.up.weight: S(0) (split along dim 0 over tp)" in one
    assert "read by     block_0.linear: S(0), read as it is" in one and "ZeRO 1" in one
    many = explain(document(), why="*.down.weight")
    assert "blocks.*.down.weight × 3: S(1)" in many and "block_0.linear_2" in many
    assert "program.embedding: R, read as it is" in explain(document(), why="table.weight")


def test_why_of_nothing_names_what_is_near():
    with pytest.raises(PlanError, match=r"no node and no parameter 'block_0.linaer_2'; near it: block_0.linear_2"):
        explain(document(), why="block_0.linaer_2")
    with pytest.raises(PlanError, match="near it: block_0.relu"):
        explain(document(), why="reluu")
    with pytest.raises(PlanError, match="blocks.0.up.weight"):
        explain(document(), why="blocks.0.upp.weight")
    with pytest.raises(PlanError, match=r"named as GRAPH.NODE \(graphs here: program, block_0\)"):
        explain(document(), why="zzzzzz")


def test_why_of_a_plan_without_facts_says_that_they_are_missing():
    text = explain(document(nodes={}), why="linear_2")
    assert "operands placed S(2), S(1)" in text and "plan the job again" in text


def test_a_difference_names_what_was_decided_otherwise_and_what_it_costs():
    other = document(
        pp=2,
        tp=2,
        plan={"zero": 3, "placements": {"blocks.0.up.weight": "R", "table.weight": "R"}},
        cost={"step_seconds": 30.0, "peak_bytes": 30 * GIB},
    )
    lines = {line[:20].strip(): line.split() for line in explain(document(), other=other).splitlines()}
    assert lines["pp"] == ["pp", "1", "2", "differs"] and lines["dp"] == ["dp", "1", "1"]
    assert lines["zero"][1:] == ["1", "3", "differs"]
    assert lines["step"][-1] == "+50.0%" and lines["peak memory"][-1] == "-50.0%"
    text = explain(document(), other=other)
    assert "this plan   0–2" in text and "the other   0–2, 3–5" in text
    assert "blocks.0.up.weight" in text and "blocks.*.down.weight" in text and "× 3" in text


def test_a_plan_differs_in_nothing_from_itself():
    text = explain(document(), other=document())
    assert "differs" not in text and "all 7 parameters are placed alike" in text


def test_why_and_diff_go_together():
    text = explain(document(), why="linear_2", other=document())
    assert "block_0.linear_2" in text and "this plan" in text


def test_the_commands_read_a_plan_file_that_names_its_cluster(tmp_path, capsys):
    write_plan(document(pp=2), tmp_path / "x.json")
    assert cli.main(["explain", str(tmp_path / "x.json"), "--why", "linear_2"]) == 0
    assert "block_0.linear_2" in capsys.readouterr().out
    assert cli.main(["view", str(tmp_path / "x.json"), "-o", str(tmp_path / "x.html")]) == 0
    assert "2 × dgx-h100" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert cli.main(["explain", str(tmp_path / "x.json"), "--why", "nix"]) == 2
    assert "no node and no parameter 'nix'" in capsys.readouterr().err


def test_a_plan_with_facts_of_nodes_reads_back_equal(tmp_path):
    write_plan(document(pp=2), tmp_path / "x.json")
    assert read_plan(tmp_path / "x.json") == document(pp=2)
    assert '"forward": "none"' not in (tmp_path / "x.json").read_text(encoding="utf-8")
