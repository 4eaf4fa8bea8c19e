"""The pipeline's schedule as SVG: every forward and backward of every micro-batch, from the stages' seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.cost.schedules import BACKWARD, FORWARD, INPUT, Action
from autopar.cost.timeline import Timeline, simulate
from autopar.plan.page.html import Markup, joined, legend, section, tag
from autopar.plan.page.memory import label_of
from autopar.plan.plan import Plan, PlanDocument
from autopar.spec.quantity import show_seconds

WIDTH, LEFT, ROW, GAP = 1060.0, 64.0, 26.0, 34.0
DIGIT = 6.4  # what a digit of a micro-batch's number takes; boxes that are too narrow go without it
BOXES = 100  # a row with at most so many boxes is drawn whole
PERIODS = 26.0  # a window shows at most the time of so many micro-batches
Event = tuple[int, Action, float, float]
CLASSES = ("f", "b", "w", "b")


@dataclass(frozen=True)
class Window:
    """Seconds ``start`` to ``end`` of the step, drawn from ``x``."""

    start: float
    end: float
    x: float
    scale: float

    def at(self, seconds: float) -> float:
        return self.x + (min(max(seconds, self.start), self.end) - self.start) * self.scale


def timeline(document: PlanDocument) -> Markup:
    plan = document.plan
    if plan.mesh.pp == 1:
        stage = plan.stages[0].seconds
        times = f"{show_seconds(stage.forward)} forward and {show_seconds(stage.backward)} backward"
        note = f"One stage: {plan.microbatches} micro-batches one after another, {times} each; no device waits for another."
        return section("timeline", "Pipeline", note)
    done = simulated(plan)
    windows = windows_of(plan, done)
    waiting = 1 - sum(done.busy) / (len(done.busy) * done.seconds) if done.seconds else 0.0
    note = (
        f"{plan.microbatches} micro-batches through {len(plan.stages)} stages by {plan.schedule}, drawn from the stages' own "
        f"seconds, sending left out: {show_seconds(done.seconds)}, of which ranks wait {waiting:.1%}."
    )
    if plan.splits:
        note += (
            " Gradients of weights are drawn where the schedule computes them, apart from those of a stage's inputs."
        )
    if len(windows) > 1:
        note += " The beginning, a piece of the middle and the end are drawn; what lies between goes on alike."
    kinds = [("f", "forward"), ("b", "backward"), *([("w", "gradients of weights")] if plan.splits else [])]
    seconds = [[show_seconds(s.seconds.forward), show_seconds(s.seconds.backward)] for s in plan.stages]
    data = tag("script", Markup(json.dumps(seconds)), type="application/json", id="stage-seconds")
    return section(
        "timeline", "Pipeline", note, legend([*kinds, ("idle", "waiting")]), _picture(plan, done, windows), data
    )


def simulated(plan: Plan) -> Timeline:
    """The plan's schedule with every event."""
    forward = [s.seconds.forward for s in plan.stages]
    backward = [s.seconds.backward for s in plan.stages]
    if not all(f + b > 0 for f, b in zip(forward, backward, strict=True)):
        forward, backward = [1.0] * len(forward), [2.0] * len(backward)
    weight = [s.seconds.weight for s in plan.stages]
    if plan.splits and not any(weight):
        weight = [b if i == 0 else b / 2 for i, b in enumerate(backward)]
    parts = [(b - w, w) for b, w in zip(backward, weight, strict=True)] if plan.splits else []
    sends = [0.0] * (len(forward) - 1)
    return simulate(plan.schedule, forward, backward, sends, plan.mesh.pp, plan.microbatches, parts=parts, events=True)


def windows_of(plan: Plan, done: Timeline) -> list[Window]:
    """All of a short step; of a long one its beginning, a piece of the middle, and its end."""
    if 2 * plan.microbatches * plan.virtual_stages <= BOXES:
        return _laid([(0.0, done.seconds)])
    period = max(done.busy) / plan.microbatches
    most = PERIODS / max(1, plan.virtual_stages) * period
    first = max(min((e for _, (k, _, _), _, e in done.events if k in (BACKWARD, INPUT)), default=0.0), 0.0)
    filled = max(_first_backward(done, d) for d in range(len(done.busy)))
    drained = min(_last_forward(done, d) for d in range(len(done.busy)))
    head = min(filled + period, most)
    tail = min(done.seconds - drained + period, most)
    middle = 4 * period / max(1, plan.virtual_stages) ** 0.5
    if head + tail + middle >= 0.8 * done.seconds:
        return _laid([(0.0, done.seconds)])
    center = first if first > head else done.seconds / 2
    start = min(max(center - middle / 2, head), done.seconds - tail - middle)
    return _laid([(0.0, head), (start, start + middle), (done.seconds - tail, done.seconds)])


def _first_backward(done: Timeline, device: int) -> float:
    return min(end for d, (kind, _, _), _, end in done.events if d == device and kind in (BACKWARD, INPUT))


def _last_forward(done: Timeline, device: int) -> float:
    return max(start for d, (kind, _, _), start, _ in done.events if d == device and kind == FORWARD)


def _laid(spans: list[tuple[float, float]]) -> list[Window]:
    room = WIDTH - LEFT - 8 - GAP * (len(spans) - 1)
    scale = room / (sum(b - a for a, b in spans) or 1.0)
    found, x = [], LEFT
    for a, b in spans:
        found.append(Window(a, b, x, scale))
        x += (b - a) * scale + GAP
    return found


def _picture(plan: Plan, done: Timeline, windows: list[Window]) -> Markup:
    ranks = plan.mesh.pp
    height = ranks * ROW + 30
    events: list[list[Event]] = [[] for _ in range(ranks)]
    for event in done.events:
        events[event[0]].append(event)
    rows = [_rank(plan, events[rank], windows, rank) for rank in range(ranks)]
    ticks = [_tick(w, t, ranks * ROW) for w in windows for t in ((w.start, w.end) if len(windows) > 1 else _round(w))]
    gaps = [tag("text", "⋯", x=w.x - GAP / 2, y=ranks * ROW / 2 + 6, cls="skip") for w in windows[1:]]
    label = f"Timeline of {plan.schedule} over {ranks} pipeline ranks"
    picture = tag(
        "svg", rows, ticks, gaps, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_label=label, cls="pipeline"
    )
    return tag("div", picture, cls="scroll")


def _round(window: Window) -> Iterator[float]:
    span = window.end - window.start
    yield from (window.start + span * i / 4 for i in range(5))


def _tick(window: Window, seconds: float, y: float) -> Markup:
    x = window.at(seconds)
    anchor = "start" if seconds == window.start else "end" if seconds == window.end else "middle"
    line = tag("line", x1=x, x2=x, y1=0, y2=y + 4, cls="tick")
    return joined([line, tag("text", show_seconds(seconds), x=x, y=y + 18, text_anchor=anchor, cls="time")])


def _rank(plan: Plan, events: list[Event], windows: list[Window], rank: int) -> Markup:
    beds = [tag("rect", x=w.x, y=2, width=(w.end - w.start) * w.scale, height=ROW - 4, cls="idle") for w in windows]
    boxes = [box for w in windows for box in _boxes(plan, events, w)]
    name = tag("text", f"pp {rank}", tag("title", label_of(plan, rank)), x=4, y=17, cls="rankname")
    return tag("g", name, beds, boxes, transform=f"translate(0,{rank * ROW:g})", data_rank=rank)


def _boxes(plan: Plan, events: list[Event], window: Window) -> Iterator[Markup]:
    for _, (kind, stage, microbatch), start, end in events:
        if end <= window.start or start >= window.end:
            continue
        x, width = window.at(start), window.at(end) - window.at(start)
        tone = plan.stages_on(plan.rank_of(stage)).index(stage) % 4
        look = {"cls": f"{CLASSES[kind]} v{tone}", "data_m": microbatch, "data_s": stage}
        yield tag("rect", x=x, y=2, width=max(0.4, width - 0.6), height=ROW - 4, **look)
        if width >= DIGIT * (len(str(microbatch)) + 1) and start >= window.start and end <= window.end:
            yield tag("text", microbatch, x=x + width / 2, y=17, cls="mb")
