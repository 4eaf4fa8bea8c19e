"""Prefix language modelling (Raffel et al. 2020, section 3.2.1): a prefix is seen in both directions, the rest predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np

from autopar.runtime.objectives.base import IGNORED, Objective, Row, Window, at_least
from autopar.runtime.objectives.causal_lm import plain
from autopar.spec.data import Objective as Options


@final
@dataclass(frozen=True)
class PrefixLM(Objective):
    """``share``: the least and the most of a row that its prefix takes, uniformly; at least one token is predicted."""

    separate: bool
    share: tuple[float, float]

    @property
    def inputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"prefix_length"} | ({"document_ids"} if self.separate else set()))

    def window(self, length: int) -> int:
        at_least(length, 2, "prefix_lm")
        return length

    def row(self, window: Window, length: int, draw: np.random.Generator) -> Row:
        prefix = min(int(draw.uniform(*self.share) * length), length - 1)
        row = plain(window, self.separate)
        labels = np.where(np.arange(length) < prefix, IGNORED, row["labels"])
        return {**row, "labels": labels, "prefix_length": np.asarray(prefix)}


def make(options: Options, separate: bool, id_of: Callable[[str], int]) -> PrefixLM:
    return PrefixLM(separate, options.prefix)
