"""The selections of recompute that a plan uses, as the plan describes them."""

from __future__ import annotations

from torch import fx

from autopar.cost.regions import RECOMPUTE
from autopar.ir.groups import groups
from autopar.ir.program import Program
from autopar.plan.plan import KINDS, Selected
from autopar.solve.blocks import Profile
from autopar.solve.stages import mode_name


class Selections:
    """Names modes of blocks, and remembers which selections were named."""

    def __init__(self, profile: Profile) -> None:
        self.known = profile.selections
        self.used: dict[str, set[int]] = {}

    def __call__(self, block: str, mode: int) -> str:
        """The name of a block's mode; where it has fewer selections than others, of its last."""
        if mode < len(RECOMPUTE):
            return RECOMPUTE[mode]
        number = min(mode - len(RECOMPUTE), len(self.known.get(block, ())) - 1)
        if number < 0:
            return KINDS[0]
        self.used.setdefault(block, set()).add(number)
        return mode_name(number + len(RECOMPUTE))

    def groups(self, program: Program) -> dict[str, dict[str, Selected]]:
        """What the named selections are, by block and name."""
        return {
            block: {mode_name(i + len(RECOMPUTE)): self.described(program, block, i) for i in sorted(numbers)}
            for block, numbers in self.used.items()
        }

    def described(self, program: Program, block: str, number: int) -> Selected:
        graph, made = program.blocks[block], self.known[block][number]
        order = {n.name: i for i, n in enumerate(graph.nodes)}
        return Selected(
            again=tuple(sorted(made.again, key=lambda name: (order[name.partition(">")[0]], name))),
            saved=made.kept,
            groups=kinds(graph, made.again),
            saved_bytes=round(made.bytes),
            seconds=made.seconds,
        )


def kinds(graph: fx.Graph, again: frozenset[str]) -> tuple[str, ...]:
    """The groups of what runs again, most operators first."""
    known = {n.name: g for n, g in groups(graph).items()}
    found = ["communication" if ">" in name else min(known[name]) for name in sorted(again)]
    return tuple(sorted(set(found), key=lambda g: (-found.count(g), g)))
