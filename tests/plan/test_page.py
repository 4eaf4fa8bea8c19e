"""The page of a plan: whole HTML, every number of the document, nothing that a user could break it with."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from plan_samples import GIB, PROGRAM, choices, document, stages

from autopar.plan.draw import SECTIONS, page
from autopar.plan.page.html import Markup, tag
from autopar.plan.page.mesh import rank_of, replicas_shown
from autopar.plan.page.source import graphs
from autopar.plan.page.timeline import simulated, windows_of
from autopar.plan.plan import Bytes, MeshShape, Plan

VOID = {"meta", "input", "br"}


class Tree(HTMLParser):
    """Checks that every element is closed in order; collects ids, classes and outside addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.elements, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def classed(self, name, element=None):
        return [a for e, a in self.elements if name in (a.get("class") or "").split() and element in (None, e)]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def shown(doc, program=PROGRAM):
    return Tree(page(doc, program))


def test_the_page_is_whole_html_with_every_section_once_and_nothing_from_outside():
    text = page(document(pp=4, dp=2), PROGRAM)
    tree = Tree(text)
    assert [i for i in tree.ids if i in dict(SECTIONS)] and len(set(tree.ids)) == len(tree.ids)
    assert {name for name, _ in SECTIONS} <= set(tree.ids)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all("src" not in a and not (a.get("href") or "#").strip("#").startswith("/") for _, a in tree.elements)


def test_the_same_plan_gives_the_same_page():
    assert page(document(pp=4), PROGRAM) == page(document(pp=4), PROGRAM)


def test_the_headline_names_model_cluster_and_the_numbers_that_matter():
    text = shown(document(pp=2, dp=2)).text
    for words in (
        "llama-7b on 2 × dgx-h100",
        "7 B parameters · 16 devices",
        "pp 2 · dp 2 · cp 1 · tp 4",
        "20 s",
        "123,456",
    ):
        assert words in text
    for words in ("43.2%", "60.0 GiB", "79% of 76.0 GiB", "ZeRO1", "16 × 1 sequences a replica", "1f1b"):
        assert words in text


def test_every_pipeline_rank_has_a_bar_that_adds_up_to_its_bytes_and_shows_the_limit():
    doc = document(pp=16)
    tree = shown(doc)
    bars = tree.classed("rank")
    assert [int(a["data-rank"]) for a in bars] == list(range(16))
    assert [int(a["data-bytes"]) for a in bars] == [b.total for b in doc.rank_bytes]
    assert len(tree.classed("limit")) == 16
    widths = [
        float(re.search(r"width:([\d.]+)%", a["style"])[1]) for a in tree.classed("part", "span") if "GiB" in a["title"]
    ]
    of_first = sum(widths[:5])
    assert of_first == pytest.approx(60 / 76 / 1.02 * 100, abs=0.01)


def test_without_bytes_by_rank_only_the_fullest_is_stacked():
    tree = shown(document(pp=3, rank_bytes=()))
    assert [int(a["data-bytes"]) for a in tree.classed("rank")] == [60 * GIB, 59 * GIB, 58 * GIB]
    assert len(tree.classed("peak", "span")) == 2


def test_a_device_over_its_limit_is_marked():
    assert len(shown(document(memory_limit=50 * GIB)).classed("over")) == 1
    assert not shown(document(memory_limit=0)).classed("over") and not shown(document(memory_limit=0)).classed("limit")


def test_a_small_mesh_shows_every_device_once():
    tree = shown(document(pp=2, dp=3, cp=2, tp=2))
    assert sorted(int(a["title"].split()[1].rstrip(":")) for a in tree.classed("device")) == list(range(24))


def test_devices_are_numbered_with_pp_outermost_and_tp_innermost():
    shape = MeshShape(pp=2, dp=3, cp=2, tp=4)
    order = [rank_of(shape, p, d, c, t) for p in range(2) for d in range(3) for c in range(2) for t in range(4)]
    assert order == list(range(48))


def test_of_thousands_of_devices_a_replica_is_drawn_and_its_count_said():
    doc = document(pp=16, dp=128, tp=8)
    assert replicas_shown(doc.plan.mesh) == 1
    tree = shown(doc)
    assert len(tree.classed("device")) == 16 * 8
    assert "16,384 devices" in tree.text and "× 128" in tree.text


def test_a_huge_replica_is_drawn_by_its_edges():
    tree = shown(document(pp=40, tp=64))
    assert len(tree.classed("device")) == 24 * 32 and "16 more pipeline ranks" in tree.text


@pytest.mark.parametrize(("schedule", "virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved1f1b", 2)])
def test_a_short_schedule_is_drawn_box_by_box(schedule, virtual):
    doc = document(pp=4, virtual=virtual, plan={"schedule": schedule, "microbatches": 4})
    boxes = [a for e, a in shown(doc).elements if e == "rect" and "data-m" in a]
    want = {(kind, str(m), str(s)) for kind in "fb" for m in range(4) for s in range(4 * virtual)}
    assert len(boxes) == len(want) and {(a["class"][0], a["data-m"], a["data-s"]) for a in boxes} == want


def test_boxes_of_a_rank_do_not_overlap_and_their_widths_are_the_stages_seconds():
    text = page(document(pp=4, plan={"microbatches": 4}), PROGRAM)
    for row in re.findall(r'<g transform="[^"]*" data-rank.*?</g>', text):
        boxes = re.findall(r'<rect x="([\d.]+)" y="2" width="([\d.]+)" height="22" class="([fb])', row)
        spans = sorted((float(x), float(x) + float(w), k) for x, w, k in boxes)
        assert len(spans) == 8 and all(a[1] <= b[0] + 0.02 for a, b in zip(spans, spans[1:], strict=False))
        wide = {k: max(b - a for a, b, kind in spans if kind == k) for k in "fb"}
        assert wide["b"] + 0.6 == pytest.approx(2 * (wide["f"] + 0.6), rel=0.01)


@pytest.mark.parametrize(("schedule", "virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved1f1b", 4)])
def test_a_long_schedule_is_drawn_at_its_beginning_middle_and_end(schedule, virtual):
    plan = document(pp=8, virtual=virtual, plan={"schedule": schedule, "microbatches": 256}).plan
    done = simulated(plan)
    windows = windows_of(plan, done)
    assert len(windows) == 3 and windows[0].start == 0 and windows[2].end == done.seconds
    assert all(a.end <= b.start and a.at(a.end) < b.x for a, b in zip(windows, windows[1:], strict=False))
    assert len(page(document(pp=8, virtual=virtual, plan={"schedule": schedule, "microbatches": 256}))) < 400_000


def test_the_turn_of_a_long_gpipe_is_in_the_middle_window():
    plan = document(pp=4, plan={"schedule": "gpipe", "microbatches": 256}).plan
    middle = windows_of(plan, simulated(plan))[1]
    assert middle.start < 256 * 0.5 + 3 * 0.5 < middle.end


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("interleavedzerobubble", 2), ("zbvzerobubble", 2), ("dualpipev", 2)]
)
def test_gradients_of_weights_are_drawn_apart(schedule, virtual):
    doc = document(pp=4, virtual=virtual, plan={"schedule": schedule, "microbatches": 8})
    tree = shown(doc)
    boxes = [a for e, a in tree.elements if e == "rect" and "data-m" in a]
    drawn = {(a["class"][0], a["data-m"], a["data-s"]) for a in boxes}
    for s in range(4 * virtual):
        apart = {m for k, m, stage in drawn if k == "w" and stage == str(s)}
        assert apart == {str(m) for m in range(8)} or schedule == "dualpipev"
    assert "gradients of weights" in tree.text and len(drawn) == len(boxes)


def test_a_v_has_the_first_and_the_last_stage_on_its_first_rank():
    tree = shown(document(pp=4, virtual=2, plan={"schedule": "zbvzerobubble", "microbatches": 8}))
    assert "rank 0 · stages 0, 7" in tree.text and "rank 3 · stages 3, 4" in tree.text


def test_one_stage_needs_no_drawing():
    tree = shown(document(pp=1))
    assert "One stage: 16 micro-batches" in tree.text and not tree.classed("pipeline")


def test_the_ledger_shows_each_part_with_its_share():
    tree = shown(document())
    for words in ("compute15 s75.0%", "exposed communication3 s15.0%", "bubble1.5 s7.5%", "optimizer500 ms2.5%"):
        assert words in tree.text


def test_nodes_have_their_placement_their_moves_and_their_seconds():
    tree = shown(document())
    names = {a["data-node"] for a in tree.classed("node") if "data-node" in a}
    assert {"embedding", "linear", "relu", "linear_2", "add", "sum"} <= names
    assert "block_0 × 3" in tree.text and "30 ms + 50 ms" in tree.text
    assert "↳ %hidden S(1) → R all-gather, back reduce-scatter · 5 ms" in tree.text
    assert "↳ %hidden S(1) → R shared with %linear" in tree.text
    assert "↳ %linear_2 P → S(1) reduce-scatter, back all-gather · 5 ms" in tree.text


def test_a_node_in_the_page_is_as_it_was():
    found = re.search(r'<div class="node operator" data-node="linear_2">.*?</div></div>', page(document(), PROGRAM))
    assert found is not None and found[0] == (
        '<div class="node operator" data-node="linear_2"><div class="what"><code><span class="name">%linear_2</span> = '
        '<span class="op">aten.linear</span><span class="args">(%mul, %down_weight)</span></code></div>'
        '<div class="type">f32[2, 16, 8]</div><div class="badges" title="S(2), S(1) → P"><span class="badge P">P</span></div>'
        '<div class="took"><span>30 ms + 50 ms</span><i style="width:100.0%"></i></div></div>'
    )


def test_parameters_and_calls_are_folded_and_alike_ones_share_a_line():
    text = shown(document()).text
    assert "7 parameters" in text and "calls of blocks: 3 × block_0" in text
    assert "block_0(%embedding, … 2 parameters)" in text
    assert "%p_blocks_*_up_weight" in text


def test_without_the_programs_text_the_plans_own_nodes_are_shown():
    tree = Tree(page(document()))
    assert "aten.linear(%mul, %down_weight)" in tree.text and "block_0 × 3" in tree.text
    found = {g.name: [line.name for line in g.lines] for g in graphs(document(), None)}
    assert found == {name: list(nodes) for name, nodes in choices().items()}


def test_without_facts_of_nodes_moves_are_read_from_placements():
    tree = shown(document(nodes={}))
    assert "↳ %linear_2 P → S(1)" in tree.text and not tree.classed("took")


def test_a_plan_that_splits_nothing_has_a_page_too():
    bare = Plan(mesh=MeshShape(), stages=stages(1, 0))
    doc = document(rank_bytes=(), nodes={}, runners_up=(), binding=(), title="", cluster="").model_copy(
        update={"plan": bare}
    )
    text = Tree(page(doc)).text
    assert "nothing is split" in text and "No other plan was worked out" in text and "1 device: " in text


def test_alike_parameters_share_a_row_of_the_table():
    text = shown(document()).text
    assert "blocks.*.up.weight× 3f32[32, 8]S(0) along tp" in text
    assert "table.weightf32[64, 8]R whole on every device of tp" in text


def test_the_search_shows_its_bound_and_how_much_slower_others_are():
    text = shown(document()).text
    assert "no plan in the search space is faster than 19.9 s, so this one is within 0.50% of the best" in text
    assert "1,234" in text and "+5.0%" in text and "50.0 GiB" in text and "memory: 60.0 of 76.0 GiB on stage 0" in text


def test_operators_without_a_rule_are_listed():
    assert "aten.odd.default" in shown(document(plan={"unsplit": ("aten.odd.default",)})).text
    assert "Every operator of the program has a rule" in shown(document()).text


def test_whatever_a_user_names_stays_text():
    evil = "</script><script>alert(1)</script><b onmouseover='x'>\"&"
    named = {"title": evil, "cluster": evil, "binding": (evil,)}
    doc = document(pp=2, plan={"placements": {evil: "S(0)@tp"}, "unsplit": (evil,)}, **named)
    tree = shown(doc, PROGRAM.replace("blocks.0.up.weight", evil).replace("%relu", "%<i>"))
    assert tree.text.count("<script>alert(1)</script>") >= 5
    assert [e for e, _ in tree.elements].count("script") == 3 - 1
    assert not any(e == "b" and a.get("onmouseover") for e, a in tree.elements)


def test_children_are_escaped_unless_they_are_markup():
    assert tag("p", "<b>", Markup("<i>"), 3, None, ["&"], title='"', cls="x") == (
        '<p title="&quot;" class="x">&lt;b&gt;<i>3&amp;</p>'
    )
    assert tag("rect", x=1.0, y=0.333) == '<rect x="1" y="0.33"/>'


def test_bytes_that_are_zero_have_no_part():
    doc = document(rank_bytes=(Bytes(parameters=GIB),))
    assert len([a for a in shown(doc).classed("part", "span") if "GiB" in a["title"]]) == 1


def test_a_page_is_made_without_torch():
    code = (
        "import sys; from autopar.plan import draw, explain; from autopar.plan.plan import *; "
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
