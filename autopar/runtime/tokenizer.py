"""Text to whole numbers: bytes, a tokenizer file, a tokenizer's folder, or the one in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import AutoparError

BYTE_SEPARATOR = 0  # NUL: does not occur in text


@dataclass(frozen=True)
class Tokenizer:
    """``encode`` makes the tokens of one document; ``separator`` ends each (None: nothing does)."""

    encode: Callable[[str], Iterable[int]]
    separator: int | None

    def documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        for text in texts:
            end = [] if self.separator is None else [self.separator]
            yield [*self.encode(text), *end]


def tokenizer_of(name: str) -> Tokenizer:
    """``bytes`` (a token is a UTF-8 byte, NUL ends a document), a ``tokenizer.json``, a folder, or a ``.gguf`` file."""
    if name == "bytes":
        return Tokenizer(lambda text: text.encode(), BYTE_SEPARATOR)
    path = Path(name)
    if not path.exists():
        raise AutoparError(f"data.tokenizer: no such file or folder '{name}' ('bytes' needs none)")
    try:
        if path.suffix == ".json":
            from tokenizers import Tokenizer as Fast

            fast = Fast.from_file(str(path))
            return Tokenizer(lambda text: fast.encode(text, add_special_tokens=False).ids, None)
        return _transformers(path)
    except Exception as error:  # whatever a foreign parser raises on a foreign file
        raise AutoparError(f"data.tokenizer: '{name}' cannot be read as a tokenizer: {error}") from None


def _transformers(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    if path.suffix == ".gguf":
        loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    else:
        loaded = AutoTokenizer.from_pretrained(path)
    return Tokenizer(
        lambda text: loaded(text, add_special_tokens=False, verbose=False)["input_ids"], loaded.eos_token_id
    )
