"""What every tokenizer can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """The tokens of one text. ``starts``: where each begins in the text, in characters (None where not asked for)."""

    ids: np.ndarray
    starts: np.ndarray | None = None


class Tokenizer(ABC):
    """``size``: ids are below it. ``end``: the token that ends a document (None: nothing does).

    ``template``: its chat template, jinja. ``special``: what that template calls ``bos_token``, ``eos_token`` and so on.
    """

    size: int
    end: int | None = None
    template: str | None = None
    special: Mapping[str, str] = {}

    @abstractmethod
    def encode(self, texts: Sequence[str], *, starts: bool = False) -> list[Encoded]:
        """The tokens of every text, nothing added; ``starts`` asks for the places too."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token as it is written in the vocabulary."""

    @abstractmethod
    def tokens(self) -> list[str]:
        """The vocabulary, in no particular order."""
