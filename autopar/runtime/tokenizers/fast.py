"""A ``tokenizer.json``: BPE, byte-level BPE, WordPiece, Unigram and what else the library `tokenizers` knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from autopar.runtime.tokenizers.base import Encoded, Tokenizer


def reads(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


@final
class Fast(Tokenizer):
    """``end``, ``template`` and ``special`` come from a ``tokenizer_config.json`` beside the file, where there is one."""

    def __init__(self, model: Any, config: dict[str, Any]):
        self.model = model
        self.size = max(model.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.special = {k: t for k, v in config.items() if k.endswith("_token") and (t := _text(v)) is not None}
        self.end = model.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None
        template = config.get("chat_template")
        self.template = template if isinstance(template, str) else None

    def encode(self, texts: Sequence[str], *, starts: bool = False) -> list[Encoded]:
        batch = self.model.encode_batch if starts else self.model.encode_batch_fast
        found = batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.asarray(e.ids, np.uint32), np.asarray([a for a, _ in e.offsets], np.int64) if starts else None)
            for e in found
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))

    def id_of(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def tokens(self) -> list[str]:
        return list(self.model.get_vocab())


def load(path: Path) -> Fast:
    from tokenizers import Tokenizer as Model

    beside = path.with_name("tokenizer_config.json")
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    model = Model.from_file(str(path))
    model.no_padding()
    model.no_truncation()  # a file may ask for either; training text is cut by the job's own length
    return Fast(model, config)


def _text(value: Any) -> str | None:
    """A special token is written as text, or as {content: …}."""
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None
