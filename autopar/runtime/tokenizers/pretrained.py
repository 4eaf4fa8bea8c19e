"""A tokenizer that transformers reads: the folder of a checkpoint, or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from autopar.errors import AutoparError
from autopar.runtime.tokenizers.base import Encoded, Tokenizer


def reads(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".gguf"


@final
class Pretrained(Tokenizer):
    """Encodes as transformers does, without the tokens it would add."""

    def __init__(self, model: Any):
        self.model, self.size = model, len(model)
        self.end = model.eos_token_id
        self.template = model.chat_template if isinstance(model.chat_template, str) else None
        self.special = {k: v for k, v in model.special_tokens_map.items() if isinstance(v, str)}

    def encode(self, texts: Sequence[str], *, starts: bool = False) -> list[Encoded]:
        if starts and not self.model.is_fast:
            kind = type(self.model).__name__
            raise AutoparError(f"data.tokenizer: {kind} does not tell where tokens begin; give its tokenizer.json")
        asked = {"return_offsets_mapping": True} if starts else {}
        found: Any = self.model(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **asked
        )
        places: Any = found["offset_mapping"] if starts else [None] * len(texts)
        return [
            Encoded(np.asarray(ids, np.uint32), None if at is None else np.asarray([a for a, _ in at], np.int64))
            for ids, at in zip(found["input_ids"], places, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))

    def id_of(self, token: str) -> int | None:
        return self.model.get_vocab().get(token)

    def tokens(self) -> list[str]:
        return list(self.model.get_vocab())


def load(path: Path) -> Pretrained:
    from transformers import AutoTokenizer

    if path.suffix == ".gguf":
        return Pretrained(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    return Pretrained(AutoTokenizer.from_pretrained(path))
