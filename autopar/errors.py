"""What can go wrong for a user: one class each. All of them end a command with exit status 2 and one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoparError(Exception):
    """The user's input is wrong, or nothing fits. The message says what, where, and what would be right."""


class SpecError(AutoparError):
    """A spec file, a job or a command line that cannot be read as what it should be."""


class TraceError(AutoparError):
    """A model that cannot be traced into a graph: which module, and why."""


class PassError(AutoparError):
    """A pass that is unknown, or whose options or targets do not fit the program."""


class KernelError(AutoparError):
    """A kernel called with operands it does not take: which, and what it takes."""


class PlanError(AutoparError):
    """A plan that is impossible under the pins, or that does not belong to the program at hand."""


class InfeasibleError(PlanError):
    """Nothing fits the cluster: what is missing, on which stage, and the cheapest relaxations."""


class CheckpointError(AutoparError):
    """A checkpoint or a weights file that does not fit: which tensors."""


class RuntimeFault(AutoparError):
    """A run that a user's environment broke: a rank that died, a full disk."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
