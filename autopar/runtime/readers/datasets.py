"""Data sets of Hugging Face's `datasets`, where that is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.runtime.readers import Record
from autopar.spec.data import Dataset

SUFFIXES = ()  # named by `data.dataset`, not by a file


def rows(spec: Dataset, fields: list[str]) -> Iterator[Record]:
    """The rows of the data set's split. AutoparError where it, its split or a column is not there."""
    found = _loaded(spec)
    columns = list(found.column_names)
    missing = [f for f in fields if f not in columns]
    if missing:
        raise AutoparError(f"data.dataset: '{spec.path}' has no column '{missing[0]}' (there: {', '.join(columns)})")
    yield from enumerate(found.select_columns(fields), 1)


def _loaded(spec: Dataset) -> Any:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise AutoparError("data.dataset: needs the package datasets (pip install datasets)") from None
    files = None if spec.files is None else {split: list(names) for split, names in spec.files.items()}
    folder = Path(spec.path).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(folder))
            return found[spec.split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(spec.path, spec.name, split=spec.split, data_files=files)
    except Exception as error:  # whatever the library raises on what is not there
        raise AutoparError(f"data.dataset: '{spec.path}' cannot be loaded: {error}") from None
