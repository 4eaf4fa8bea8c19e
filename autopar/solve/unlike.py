"""Where a pipeline over unlike devices is cut: every stage has times and a limit of its own.

With unlike devices the first sum of equation (1) of `stages` depends on the cuts, too. For a bound θ on the maximum, the least
sum of stages whose terms are at most θ is found by dynamic programming; θ runs from the least possible maximum up to where
nothing can be gained. What (1) does not see is found by moving blocks between stages under the schedule itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from autopar.cluster.layout import Layout
from autopar.cost.schedules import device_of
from autopar.cost.timeline import simulate
from autopar.solve.outcome import Outcome, Refusal, settle
from autopar.solve.pipeline import Array, Candidate
from autopar.solve.stages import SINGLE, Cutter, walk

BOUNDS = 8  # values of θ above the least that are tried
ALL_CUTS = 40  # so many cuts are all tried under the schedule
NEAR = 1.05  # a cut this much slower than the best plan so far is still worth bettering
MOVES = 150  # of blocks between stages, tried at most
WIDE = 8  # so many stages exchange blocks with every other; more with the next alone
Spans = list[tuple[int, int]]
Times = tuple[list[float], float, float]


class Mixed:
    """A `Cutter` for each share of a layout, asked by stage."""

    def __init__(self, candidate: Candidate, layout: Layout, parts: list[Cutter]) -> None:
        self.candidate, self.layout, self.parts = candidate, layout, parts
        self.n = parts[0].n
        self.flight = parts[0].flight
        self.links: dict[int, tuple[float, float]] = {}
        self.agains: dict[int, Array] = {}
        self.matrices: dict[tuple[int, bool, bool], tuple[Array, ...]] = {}

    @property
    def setting(self):  # noqa: ANN201 - a Setting
        """What does not differ between devices."""
        return self.parts[0].setting

    def home(self, s: int) -> int:
        """The pipeline rank of a stage."""
        return device_of(self.candidate.schedule, self.candidate.mesh.pp, s)

    def at(self, s: int) -> Cutter:
        return self.parts[self.layout.of[self.home(s)]]

    def sending(self, s: int, j: int) -> float:
        """Seconds to send a micro-batch from stage s, which ends before block j, to the next."""
        return self.sends(s, float(self.parts[0].blocks.cuts[j - 1]))

    def sends(self, s: int, bytes: float) -> float:
        if s not in self.links:
            self.links[s] = self.line(s)
        latency, bandwidth = self.links[s]
        return latency + bytes / bandwidth if bytes else 0.0

    def line(self, s: int) -> tuple[float, float]:
        """Latency and bandwidth from stage s to the next."""
        a, b = (self.layout.of[self.home(k)] for k in (s, s + 1))
        if a != b:
            link = self.layout.between(a, b)
        else:
            share = self.layout.shares[a]
            mesh = self.candidate.mesh.model_copy(update={"pp": share.ranks, "dp_replicate": 1})
            link = share.cluster.axis_link(mesh, "pp")
        return link.latency, link.bandwidth * link.efficiency

    def cell(self, s: int, i: int, j: int) -> tuple[float, float, float, float]:
        """Stage s with blocks i … j-1: forward, backward, recompute of a micro-batch, and seconds once a step."""
        c, part = self.candidate, self.at(s)
        key = (self.layout.of[self.home(s)], s == 0, s == c.stages - 1)
        if key not in self.matrices:
            span = part.span(s)
            part.terms(s)
            more = max(c.microbatches - 1, SINGLE)
            once = part.fixed_terms[key[1:]] - more * (span.forward + span.backward)
            self.matrices[key] = span.forward, span.backward, once
        forward, backward, once = self.matrices[key]
        return float(forward[i, j]), float(backward[i, j]), float(self.again(s)[i, j]), float(once[i, j])

    def again(self, s: int) -> Array:
        if s not in self.agains:
            part = self.at(s)
            self.agains[s] = part.again(s, part.span(s), part.setting.limit)
        return self.agains[s]

    def cut(self) -> tuple[float, Spans]:
        """The least value of (1) and the blocks of every stage; infinite and empty where nothing fits."""
        n, c = self.n, self.candidate
        if c.stages == 1 or c.stages > max(n, 1):
            return self.at(0).cut()
        legal = np.triu(np.ones((n + 1, n + 1), bool), 1)
        terms = [np.where(legal, self.at(s).terms(s), np.inf) for s in range(c.stages)]
        low, spans = longest(terms)
        if not spans:
            return float("inf"), []
        sums = [self.once(s) for s in range(c.stages)]
        single = max(c.microbatches - 1, SINGLE) != c.microbatches - 1
        found = []
        for theta in thresholds(terms, sums, low):
            total, spans = cheapest(terms, sums, theta)
            found.append((total + (0.0 if single else reached(terms, spans)), spans))
        return min(found, key=lambda f: f[0])

    def once(self, s: int) -> Array:
        """Seconds of one micro-batch through stage s and on to the next, for every [i, j]."""
        span = self.at(s).span(s)
        after = np.zeros(self.n + 1)
        if s < self.candidate.stages - 1:
            after[1 : self.n] = [2 * self.sends(s, float(b)) for b in self.parts[0].blocks.cuts[: self.n - 1]]
        return span.forward + span.backward + after[None, :]


# ------------------------------------------------------------------ dynamic programming


def longest(terms: list[Array]) -> tuple[float, Spans]:
    """The least maximum of the stages' terms."""
    best, links = np.full(terms[0].shape[0], np.inf), []
    best[0] = -np.inf
    for term in terms:
        value = np.maximum(best[:, None], term)
        links.append(np.argmin(value, axis=0))
        best = np.min(value, axis=0)
    n = len(best) - 1
    return (float(best[n]), walk(links, n)) if np.isfinite(best[n]) else (float("inf"), [])


def cheapest(terms: list[Array], sums: list[Array], theta: float) -> tuple[float, Spans]:
    """The least sum of stages whose terms are at most ``theta``."""
    best, links = np.full(terms[0].shape[0], np.inf), []
    best[0] = 0.0
    for term, each in zip(terms, sums, strict=True):
        value = best[:, None] + np.where(term <= theta, each, np.inf)
        links.append(np.argmin(value, axis=0))
        best = np.min(value, axis=0)
    n = len(best) - 1
    return float(best[n]), walk(links, n)


def thresholds(terms: list[Array], sums: list[Array], low: float) -> list[float]:
    """Values of θ: the least, and some of those above it with which the sum can fall by as much."""
    low = low * (1 + 1e-12)
    most = max(float(t[np.isfinite(t)].max(initial=low)) for t in terms)
    gain = cheapest(terms, sums, low)[0] - cheapest(terms, sums, most)[0]
    if gain <= 1e-9 * low:
        return [low]
    values = np.unique(np.concatenate([t[(t > low) & (t <= low + gain)] for t in terms]))
    if len(values) > BOUNDS:
        values = values[np.linspace(0, len(values) - 1, BOUNDS).astype(int)]
    return [low, *map(float, values)]


def reached(terms: list[Array], spans: Spans) -> float:
    return max(float(t[i, j]) for t, (i, j) in zip(terms, spans, strict=True))


def spread(times: list[Times]) -> tuple[float, Spans]:
    """Contiguous runs of blocks, one at least each, with the least maximum, where stage s would take ``times[s]``: seconds
    of every block, of what the first stage has before them, of what the last has after them."""
    n, stages = len(times[0][0]), len(times)
    if n == 0:
        return (times[0][1] + times[0][2], [(0, 0)]) if stages == 1 else (float("inf"), [])
    made: dict[int, Array] = {}
    terms = []
    for s, (each, first, last) in enumerate(times):
        if id(each) not in made:
            sums = np.concatenate([[0.0], np.cumsum(each)])
            made[id(each)] = np.where(np.triu(np.ones((n + 1, n + 1), bool), 1), sums[None, :] - sums[:, None], np.inf)
        terms.append(made[id(each)] + (first if s == 0 else 0.0) + (last if s == stages - 1 else 0.0))
    return longest(terms)


# ------------------------------------------------------------------ under the schedule itself


def improved(cutter: Mixed, spans: Spans, limit: float) -> Outcome | Refusal:
    """The outcome of the best cut that is found from ``spans``; a refusal where none is below ``limit`` seconds."""
    if cutter.candidate.evenly or len(spans) == 1:
        return settle(cutter, spans, limit)
    made = settle(cutter, spans, NEAR * limit)
    if math.comb(cutter.n - 1, len(spans) - 1) <= ALL_CUTS:
        made = best_of(cutter, made, every(cutter.n, len(spans)), limit)
    elif isinstance(made, Outcome):
        made = climbed(cutter, made, limit)
    return "slow" if isinstance(made, Outcome) and made.seconds >= limit else made


def climbed(cutter: Mixed, made: Outcome, limit: float) -> Outcome:
    """Blocks moved from one stage to another for as long as the schedule is estimated to gain; the outcome of the last."""
    spans = [part.blocks for part in made.parts]
    best, tried, better = estimate(cutter, spans), 0, True
    while better and tried < MOVES:
        better = False
        for option in moved(spans):
            tried += 1
            seconds = estimate(cutter, option)
            if seconds < best * (1 - 1e-9):
                best, spans, better = seconds, option, True
                break
    other = settle(cutter, spans, min(limit, made.seconds))
    return other if isinstance(other, Outcome) and other.seconds < made.seconds else made


def estimate(cutter: Mixed, spans: Spans) -> float:
    """Seconds of a step by the matrices that cuts are made from: recompute is spread over a stage's blocks there."""
    c = cutter.candidate
    cells = [cutter.cell(s, i, j) for s, (i, j) in enumerate(spans)]
    if any(again == float("inf") for _, _, again, _ in cells):
        return float("inf")
    sends = [cutter.sending(s, j) for s, (_, j) in enumerate(spans[:-1])]
    line = simulate(c.schedule, [f for f, _, _, _ in cells], [b + again for _, b, again, _ in cells], sends, c.mesh.pp,
                    c.microbatches)  # fmt: skip
    return max(end + once for end, (_, _, _, once) in zip(line.ends, cells, strict=True))


def best_of(cutter: Mixed, made: Outcome | Refusal, options: Iterable[Spans], limit: float) -> Outcome | Refusal:
    """The best of ``made`` and what other cuts come to; of refusals the first that is "slow" (some cut fits)."""
    for spans in options:
        other = settle(cutter, spans, min(limit, made.seconds) if isinstance(made, Outcome) else limit)
        if isinstance(other, Outcome) and (isinstance(made, str) or other.seconds < made.seconds * (1 - 1e-12)):
            made = other
        elif made == "full" and other == "slow":
            made = "slow"
    return made


def every(n: int, stages: int) -> Iterator[Spans]:
    for inner in itertools.combinations(range(1, n), stages - 1):
        yield list(itertools.pairwise((0, *inner, n)))


def moved(spans: Spans) -> Iterator[Spans]:
    """Spans with one block moved from a stage to another, those between them shifted."""
    ends = [j for _, j in spans[:-1]]
    n = spans[-1][1]
    for a in range(len(ends)):
        for b in range(a, len(ends) if len(spans) <= WIDE else a + 1):
            for step in (-1, 1):
                new = [e + step if a <= k <= b else e for k, e in enumerate(ends)]
                if all(x < y for x, y in itertools.pairwise((0, *new, n))):
                    yield list(itertools.pairwise((0, *new, n)))
