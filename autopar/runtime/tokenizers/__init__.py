"""Text to whole numbers. A file here is a kind of tokenizer: ``reads(path)`` says whether it is its, ``load(path)`` reads it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from autopar.errors import AutoparError, suggestion
from autopar.runtime.tokenizers.base import Encoded, Tokenizer
from autopar.runtime.tokenizers.bytes import Bytes

__all__ = ["Encoded", "Tokenizer", "special_id", "tokenizer_of"]


def tokenizer_of(name: str) -> Tokenizer:
    """``bytes``; a ``tokenizer.json``; a SentencePiece ``.model``; a GGUF file; a folder with a tokenizer's files.

    Raises AutoparError where it is not there, or cannot be read as any of these.
    """
    if name == "bytes":
        return Bytes()
    path = Path(name).expanduser()
    if not path.exists():
        raise AutoparError(f"data.tokenizer: no such file or folder '{name}' ('bytes' needs none)")
    for kind in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{kind}")
        if getattr(module, "reads", None) is None or not module.reads(path):
            continue
        try:
            return module.load(path)
        except ImportError as error:
            needed = f"'{name}' needs the package {error.name}; pip install 'autopar[hf]' brings it"
            raise AutoparError(f"data.tokenizer: {needed}") from None
        except Exception as error:  # whatever a foreign parser raises on a foreign file
            raise AutoparError(f"data.tokenizer: '{name}' cannot be read as a tokenizer: {error}") from None
    raise AutoparError(
        f"data.tokenizer: '{name}' is no tokenizer; a tokenizer.json, a SentencePiece .model, a .gguf file or a folder "
        "with a tokenizer's files would be right"
    )


def special_id(tokenizer: Tokenizer, token: str, key: str) -> int:
    """The id of a special token that ``key`` of the job names; AutoparError where the tokenizer does not have it."""
    found = tokenizer.id_of(token)
    if found is None:
        near = suggestion(token, _special(tokenizer.tokens()))
        raise AutoparError(f"{key}: the tokenizer has no token '{token}'{near}")
    return found


def _special(tokens: Sequence[str]) -> list[str]:
    """Those that are written like special tokens."""
    return [t for t in tokens if len(t) > 2 and t[0] in "<[" and t[-1] in ">]"]
