"""What is kept and what is made again: the best choice of all, on small graphs tried one by one, and beside torch's knapsack."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from autopar.cost.saving import Saving, Selection, Step, Tensor
from autopar.errors import PlanError
from autopar.solve.saving import cheapest, hull, least, within
from benchmarks._joint import joint, problem


def drawn(seed: int) -> Saving:
    """A graph of a dozen steps: each reads some tensors before it; some tensors are wanted, some may not be kept."""
    rng = random.Random(seed)
    found = Saving([Tensor("given", 64.0 * rng.randint(1, 9), None, rng.random() < 0.5)])
    for i in range(rng.randint(5, 10)):
        reads = rng.sample(range(len(found.tensors)), min(len(found.tensors), rng.randint(1, 3)))
        inner = 8.0 * rng.randint(0, 9) * (rng.random() < 0.3)
        found.steps.append(Step(f"s{i}", rng.randint(1, 50) / 7, tuple(reads), inner, rng.random() < 0.85))
        for k in range(1 + (rng.random() < 0.2)):
            keep = rng.random() < 0.9 or not found.steps[i].may
            found.tensors.append(Tensor(f"t{i}.{k}", 64.0 * rng.randint(1, 30), i, rng.random() < 0.5, keep))
    return found


def every(problem: Saving) -> list[Selection]:
    names = [s.name for s in problem.steps]
    subsets = itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names) + 1))
    return [made for chosen in subsets if (made := problem.selection(set(chosen))) is not None]


def possible(seed: int) -> Saving:
    """A drawn problem in which keeping everything is a choice, as it is in every block."""
    found = drawn(seed)
    wanted = {t for s in found.steps for t in s.reads}
    tensors = [Tensor(t.name, t.bytes, t.step, t.wanted, t.keepable or t.wanted) for t in found.tensors]
    assert wanted
    return Saving(tensors, found.steps)


@pytest.mark.parametrize("seed", range(12))
def test_a_budget_is_met_with_the_least_seconds_of_all_choices(seed: int) -> None:
    what = possible(seed)
    choices = every(what)
    sizes = sorted({c.bytes for c in choices})
    for budget in {sizes[0], sizes[len(sizes) // 3], sizes[len(sizes) // 2], sizes[-1]}:
        best = min(c.seconds for c in choices if c.bytes <= budget)
        made = within(what, budget)
        assert made.bytes <= budget and made.seconds == pytest.approx(best, abs=1e-9)
    with pytest.raises(PlanError, match="least is"):
        within(what, sizes[0] - 1)


@pytest.mark.parametrize("seed", range(12))
def test_the_hull_is_that_of_all_choices_and_each_corner_the_best_of_its_budget(seed: int) -> None:
    what = possible(seed)
    choices = every(what)
    assert least(what).bytes == min(c.bytes for c in choices)
    corners = hull(what, points=99)
    for c in corners:
        assert c.seconds == pytest.approx(min(o.seconds for o in choices if o.bytes <= c.bytes), abs=1e-9)
    for price in (0.5, 5.0, 50.0, 500.0):
        best = min(c.bytes + price * c.seconds for c in choices)
        made = cheapest(what, price)
        assert made.bytes + price * made.seconds <= best * (1 + 1e-2) + len(what.steps)  # whole bytes
        ends = [what.selection(frozenset()), *corners]
        assert min(c.bytes + price * c.seconds for c in ends if c) == pytest.approx(best, rel=5e-3, abs=len(what.steps))


class Block(nn.Module):
    """A transformer block without dropout, its norm written out."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.first, self.second = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        n = self.norm(x, self.first)
        q, k, v = (f(n).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1)
        x = x + self.o((scores @ v).transpose(1, 2).reshape(b, s, h))
        n = self.norm(x, self.second)
        return x + self.down(torch.nn.functional.silu(self.gate(n)) * self.up(n))


@pytest.mark.parametrize("solver", ["dp", "greedy", "ilp"])
@pytest.mark.parametrize("budget", [0.2, 0.4, 0.6, 0.8])
def test_at_least_as_good_as_torchs_knapsack_on_the_same_graph(budget: float, solver: str) -> None:
    torch.manual_seed(0)
    graph, theirs = joint(Block(), torch.randn(2, 32, 64), budget, solver)
    what = problem(graph)
    same = what.selection(theirs.again)
    assert same is not None, "what torch chooses is a choice of the problem"
    assert same.bytes <= theirs.bytes * (1 + 1e-9)
    ours = within(what, theirs.bytes)
    assert ours.bytes <= theirs.bytes and ours.seconds <= same.seconds * (1 + 1e-9)
