"""A model's tokenizer: its kind, its vocabulary, whether every text has tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autopar.cost.values import tensors
from autopar.ir.ops import Embedding, view
from autopar.ir.program import Program
from autopar.spec.origin import ModelOrigin


def tokenizer(origin: ModelOrigin, program: Program) -> str:
    """``byte-level BPE, vocabulary 50,257``; the vocabulary is the rows of the first embedding."""
    kind, fallback = _declared(origin) if origin.decoder is not None else _stored(origin.hf or "")
    tables = [tensors(e.weight)[0].shape[0] for n in program.graph.nodes if isinstance(e := view(n), Embedding)]
    words = [kind, f"vocabulary {max(tables):,}" if tables else "", "byte fallback" if fallback else ""]
    return ", ".join(filter(None, words))


def _declared(origin: ModelOrigin) -> tuple[str, bool]:
    spec = origin.decoder
    assert spec is not None, "asked before"
    return spec.tokenizer, bool(spec.byte_fallback)


def _stored(name: str) -> tuple[str, bool]:
    """What a checkpoint's own tokenizer.json tells."""
    file = Path(name).expanduser() / "tokenizer.json"
    if not name or not file.is_file():
        return "", False
    model: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = str((model.get("model") or {}).get("type") or "")
    level = "byte-level " if "ByteLevel" in json.dumps(model.get("pre_tokenizer") or {}) else ""
    return level + kind, bool((model.get("model") or {}).get("byte_fallback"))
