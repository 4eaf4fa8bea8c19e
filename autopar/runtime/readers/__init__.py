"""Files of records. A file here reads one format: its ``SUFFIXES``, and ``records(path, fields, broken)``."""

from __future__ import annotations

import gzip
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

Record = tuple[int, Any]  # its line or row, from 1, and a str or a mapping
SHOWN = 20


class Broken:
    """Counts what cannot be used, and remembers the first messages, each with file and line."""

    def __init__(self) -> None:
        self.count = 0
        self.messages: list[str] = []

    def add(self, place: str, line: int, why: str) -> None:
        self.count += 1
        if len(self.messages) < SHOWN:
            self.messages.append(f"{place}:{line}: {why}")


def reader_of(path: Path) -> Callable[[Path, list[str], Broken], Iterator[Record]]:
    """The reader of a file by its suffix (``.gz`` after it is unpacked); plain text where no format claims it."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    found = next((m for m in modules if suffix.lower() in m.SUFFIXES), None)
    return (found or importlib.import_module(f"{__name__}.text")).records


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it is compressed."""
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]  # noqa: SIM115
