"""Parquet, through pyarrow: a row is one record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from autopar.errors import AutoparError
from autopar.runtime.readers import Broken, Record

SUFFIXES = (".parquet",)
ROWS = 1024  # read at a time


def records(path: Path, fields: list[str], broken: Broken) -> Iterator[Record]:
    """The rows, with the columns ``fields`` alone. AutoparError where pyarrow, or a column, is not there."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise AutoparError(f"data.text: {path} needs the package pyarrow (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            missing = [f for f in fields if f not in columns]
            if missing:
                raise AutoparError(f"data: {path} has no column '{missing[0]}' (columns there: {', '.join(columns)})")
            number = 0
            for batch in file.iter_batches(ROWS, columns=fields):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise AutoparError(f"data.text: {path} cannot be read as Parquet: {error}") from None
