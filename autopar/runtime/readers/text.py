"""Plain text: a file is one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from autopar.runtime.readers import Broken, Record, opened

SUFFIXES = (".txt", ".md", ".rst")  # and every other that no reader claims


def records(path: Path, fields: list[str], broken: Broken) -> Iterator[Record]:
    """One record. Bytes that are no UTF-8 are replaced, and their lines counted as broken."""
    with opened(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("utf-8-sig", errors="replace")
        for number, line in enumerate(raw.split(b"\n"), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                broken.add(str(path), number, f"byte {error.start + 1} of the line is no UTF-8; it was replaced")
    yield 1, text.replace("\r\n", "\n").replace("\r", "\n")
