"""What an objective is given, and what it makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from autopar.errors import AutoparError

IGNORED = -100
Row = dict[str, np.ndarray]


class Window(NamedTuple):
    """Tokens that stand next to each other: ``ids``, whether each is ``learned``, its document's number from 0; (n,)."""

    ids: np.ndarray
    learned: np.ndarray
    documents: np.ndarray


class Objective(ABC):
    """``inputs``: what it makes and the model must read, beside tokens and labels, or it would learn something else."""

    inputs: frozenset[str] = frozenset()

    def window(self, length: int) -> int:
        """Tokens of text in a row of ``length``. AutoparError where the row is too short for the objective."""
        return length

    @abstractmethod
    def row(self, window: Window, length: int, draw: np.random.Generator) -> Row:
        """One row, int64: ``input_ids`` and ``labels`` (length,), and the objective's own inputs.

        Labels stand where their tokens do (the model predicts them one place before); those not learned are −100.
        """


def at_least(length: int, least: int, name: str) -> None:
    if length < least:
        raise AutoparError(
            f"batch.length: data.objective {name} needs at least {least} tokens in a sequence, not {length}"
        )


def firsts(documents: np.ndarray) -> np.ndarray:
    """For every token, where its document begins in the window; (n,)."""
    begins = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1))
    return begins[np.searchsorted(begins, np.arange(len(documents)), side="right") - 1]


def apart(row: Row, documents: np.ndarray) -> Row:
    """The row with each document by itself: its number, positions from 0, and no prediction across its beginning."""
    begins = firsts(documents)
    own = np.arange(len(documents)) - begins
    labels = np.where((own == 0) & (begins > 0), IGNORED, row["labels"])
    return {**row, "labels": labels, "document_ids": documents - documents[0], "position_ids": own}
