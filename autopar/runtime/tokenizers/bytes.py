"""A token is a byte of UTF-8; NUL, which text does not hold, ends a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from autopar.runtime.tokenizers.base import Encoded, Tokenizer

SPECIAL = ("[MASK]", "[gMASK]", "<sop>", "<eop>")  # ids from 256 on; only blank infilling writes them


@final
class Bytes(Tokenizer):
    """Needs no file."""

    size = 256 + len(SPECIAL)
    end = 0

    def encode(self, texts: Sequence[str], *, starts: bool = False) -> list[Encoded]:
        return [self._one(text, starts) for text in texts]

    def _one(self, text: str, starts: bool) -> Encoded:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        return Encoded(ids, np.cumsum((ids & 0xC0) != 0x80) - 1 if starts else None)  # 10xxxxxx continues a character

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 < i < 256).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        return 256 + SPECIAL.index(token) if token in SPECIAL else None

    def tokens(self) -> list[str]:
        return list(SPECIAL)
