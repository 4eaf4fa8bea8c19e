"""recompute: what may be computed again in the backward pass; what is worth it, the solver decides."""

from __future__ import annotations

from typing import ClassVar

from autopar.errors import PassError, suggestion
from autopar.ir.groups import GROUPS, allowed
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass


class Recompute(Pass):
    """Only operators of ``groups`` may run again: names of groups (norm, activation, attention …) or globs of module names.

    Without this pass, or without ``groups``, everything may. An empty list: nothing.
    """

    name: ClassVar[str] = "recompute"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    groups: tuple[str, ...] | None = None

    def rewrite(self, program: Program) -> None:
        program.recompute = None
        for wanted in self.groups or ():
            if wanted not in GROUPS:
                check(program, wanted)
        program.recompute = self.groups


def check(program: Program, glob: str) -> None:
    """Raise `PassError` where a glob names no module."""
    program.recompute = (glob,)
    if not any(allowed(program, name, graph) for name, graph in program.graphs()):
        raise PassError(
            f"recompute: {glob!r} is no group and matches no module{suggestion(glob, GROUPS)}; groups: {', '.join(GROUPS)}"
        )
