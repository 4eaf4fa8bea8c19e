"""JSONL: a line is one record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from autopar.runtime.readers import Broken, Record, opened

SUFFIXES = (".jsonl", ".ndjson")


def records(path: Path, fields: list[str], broken: Broken) -> Iterator[Record]:
    """The lines that are JSON; the others are counted as broken, empty ones passed over."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                broken.add(str(path), number, f"byte {error.start + 1} of the line is no UTF-8")
            except ValueError as error:
                broken.add(str(path), number, f"not JSON: {error}")
            except RecursionError:
                broken.add(str(path), number, "nested too deeply")
