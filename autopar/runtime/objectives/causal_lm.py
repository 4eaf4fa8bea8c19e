"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np

from autopar.runtime.objectives.base import IGNORED, Objective, Row, Window, apart
from autopar.spec.data import Objective as Options


@final
@dataclass(frozen=True)
class CausalLM(Objective):
    separate: bool

    @property
    def inputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"document_ids"} if self.separate else ())

    def row(self, window: Window, length: int, draw: np.random.Generator) -> Row:
        return plain(window, self.separate)


def plain(window: Window, separate: bool) -> Row:
    """The window as it stands, its unlearned tokens without labels."""
    labels = np.where(window.learned, window.ids, IGNORED)
    row = {"input_ids": window.ids, "labels": labels, "position_ids": np.arange(len(labels))}
    return apart(row, window.documents) if separate else row


def make(options: Options, separate: bool, id_of: Callable[[str], int]) -> CausalLM:
    return CausalLM(separate)
