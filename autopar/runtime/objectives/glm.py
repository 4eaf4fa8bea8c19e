"""GLM's blank infilling (Du et al. 2022, section 2.1), laid out as ChatGLM-6B reads it.

A row is part A, the text with a mask token in place of each blank, then part B: for each blank, in random order, a start
token and the blank's tokens; an end token closes the last. A sees all of A; B sees A and what comes before it in B: the
mask of a prefix as long as A. The first position counts through A, and in B stays where the blank's mask token stands;
the second is 0 in A and counts from 1 through each blank. A start token carries the label "end" of the blank before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from autopar.runtime.objectives.base import IGNORED, Objective, Row, Window, at_least, firsts
from autopar.spec.data import Objective as Options

FEWEST = 8  # tokens in a row: a blank, its three special tokens, and text around it


class Special(NamedTuple):
    mask: int
    long: int
    start: int
    end: int


@final
@dataclass(frozen=True)
class Glm(Objective):
    """``masked``: share of the text in short blanks, ``span`` tokens each on average; ``long``: share of rows with one blank
    to the end instead."""

    separate: bool
    masked: float
    span: float
    long: float
    special: Special

    @property
    def inputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"position_ids", "prefix_length"} | ({"document_ids"} if self.separate else set()))

    def window(self, length: int) -> int:
        at_least(length, FEWEST, "glm")
        return length - 3

    def blanks(self, length: int) -> int:
        """Short blanks in a row: each takes two tokens beside its own, and one more ends the row."""
        return max(1, round(self.masked * length / (self.span + 2 * self.masked)))

    def row(self, window: Window, length: int, draw: np.random.Generator) -> Row:
        if draw.random() < self.long:
            spans, mask = _long(window, draw, self.separate), self.special.long
        else:
            blanks = min(self.blanks(length), (length - 4) // 4)
            kept = length - 2 * blanks - 1
            at = int(draw.integers(len(window.ids) - kept + 1))
            window = Window(*(part[at : at + kept] for part in window))
            spans, mask = _short(kept, blanks, self.span, draw), self.special.mask
            if self.separate:
                spans = _within(spans, window.documents)
        return self._laid(window, spans, mask, draw)

    def _laid(self, window: Window, spans: np.ndarray, mask: int, draw: np.random.Generator) -> Row:
        """``spans`` (blanks, 2): where each begins and ends in the window, in order."""
        ids, learned, documents = window
        stays = np.ones(len(ids), bool)
        for begin, end in spans:
            stays[begin + 1 : end] = False
        a = ids.copy()
        a[spans[:, 0]] = mask
        place = np.cumsum(stays) - 1  # of each token of the window in A
        begins = place[firsts(documents)] if self.separate else np.zeros(len(ids), np.int64)
        parts = [
            (
                a[stays],
                np.full(stays.sum(), IGNORED),
                (place - begins)[stays],
                np.zeros(stays.sum(), np.int64),
                documents[stays],
            )
        ]
        last = IGNORED
        for begin, end in spans[draw.permutation(len(spans))]:
            n = end - begin
            labels = np.where(learned[begin:end], ids[begin:end], IGNORED)
            parts.append(
                (
                    np.append(self.special.start, ids[begin:end]),
                    np.append(last, labels),
                    np.full(n + 1, place[begin] - begins[begin]),
                    np.arange(1, n + 2),
                    np.full(n + 1, documents[begin]),
                )
            )
            last = self.special.end
        _, _, first, second, document = parts[-1]
        parts.append((np.asarray([last]), np.asarray([last]), first[-1:], second[-1:] + 1, document[-1:]))
        tokens, labels, first, second, document = (np.concatenate(column) for column in zip(*parts, strict=True))
        row = {"input_ids": tokens, "labels": labels, "position_ids": np.stack([first, second])}
        row |= {"prefix_length": np.asarray(stays.sum())}
        return {**row, "document_ids": document - document.min()} if self.separate else row


def _long(window: Window, draw: np.random.Generator, separate: bool) -> np.ndarray:
    """One blank to the end, of at least half of the text (of the last document's, where each is by itself)."""
    n = len(window.ids)
    first = int(firsts(window.documents)[-1]) if separate else 0
    size = max(1, int(draw.uniform(0.5, 1.0) * (n - first)))
    return np.asarray([[max(n - size, 1), n]])


def _short(n: int, blanks: int, mean: float, draw: np.random.Generator) -> np.ndarray:
    """Blanks of Poisson lengths, at least 1, apart from each other by at least one token."""
    sizes = np.maximum(draw.poisson(mean, blanks), 1)
    while sizes.sum() > n - blanks:  # as good as never: what fits the share fits the text
        sizes[sizes.argmax()] = max(1, sizes.max() - (sizes.sum() - n + blanks))
    free = n - int(sizes.sum()) - (blanks - 1)
    gaps = np.diff(np.sort(draw.integers(free + 1, size=blanks)), prepend=0)
    begins = np.cumsum(gaps) + np.concatenate([[0], np.cumsum(sizes[:-1])]) + np.arange(blanks)
    return np.stack([begins, begins + sizes], axis=1)


def _within(spans: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Blanks that end where their document does."""
    ends = np.searchsorted(documents, documents[spans[:, 0]], side="right")
    return np.stack([spans[:, 0], np.minimum(spans[:, 1], ends)], axis=1)


def make(options: Options, separate: bool, id_of: Callable[[str], int]) -> Glm:
    names = options.tokens
    special = Special(id_of(names.mask), id_of(names.long), id_of(names.start), id_of(names.end))
    return Glm(separate, options.masked, options.span, options.long, special)
