"""A SentencePiece ``.model``: unigram or BPE over raw text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from autopar.runtime.tokenizers.base import Encoded, Tokenizer


def reads(path: Path) -> bool:
    return path.suffix == ".model" and path.is_file()


@final
class Piece(Tokenizer):
    """``end`` is the model's own ``</s>``."""

    def __init__(self, model: Any):
        self.model, self.size = model, model.vocab_size()
        self.end = model.eos_id() if model.eos_id() >= 0 else None
        known = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.special = {key: model.id_to_piece(i) for key, i in known.items() if i >= 0}

    def encode(self, texts: Sequence[str], *, starts: bool = False) -> list[Encoded]:
        if not starts:
            found = self.model.encode(list(texts), num_threads=os.cpu_count() or 1)
            return [Encoded(np.asarray(ids, np.uint32)) for ids in found]
        placed = self.model.encode(list(texts), return_type="offset_mapping")
        begins = [np.asarray([begin for begin, _ in p["offsets"]], np.int64) for p in placed]
        return [Encoded(np.asarray(p["ids"], np.uint32), b) for p, b in zip(placed, begins, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(i) for i in ids])

    def id_of(self, token: str) -> int | None:
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None  # unknown pieces come back as <unk>

    def tokens(self) -> list[str]:
        return [self.model.id_to_piece(i) for i in range(self.size)]


def load(path: Path) -> Piece:
    from sentencepiece import SentencePieceProcessor

    return Piece(SentencePieceProcessor(model_file=str(path)))
