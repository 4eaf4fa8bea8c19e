"""The tokens of the training text, in one memory-mapped file that is made once."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from autopar.errors import AutoparError
from autopar.runtime.tokenizer import tokenizer_of
from autopar.spec.job import Data

DTYPE = np.dtype("<u4")


def files_of(data: Data, base: Path) -> list[Path]:
    """The files that ``data.text`` names, sorted; relative ones are looked for here and beside the build folder's job.

    AutoparError for an entry that matches nothing.
    """
    found: dict[Path, None] = {}
    for entry in data.text:
        places = [entry] if os.path.isabs(entry) else [entry, str(base / entry)]
        matches = next((m for p in places if (m := sorted(glob.glob(p, recursive=True)))), [])
        files = [Path(m) for m in matches if os.path.isfile(m)]
        if not files:
            raise AutoparError(f"data.text: '{entry}' matches no file (looked in {os.getcwd()} and {base})")
        found |= dict.fromkeys(files)
    return list(found)


def cache_of(data: Data, base: Path, cache: Path) -> Path:
    """The cache file for this text and tokenizer, whether or not it is there yet."""
    parts = [data.tokenizer]
    for file in files_of(data, base):
        stat = file.stat()
        parts.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return cache / f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.bin"


def tokenize(data: Data, base: Path, target: Path) -> None:
    """Write the cache, under another name until it is complete. Text that is not UTF-8 is read with replacements."""
    tokenizer = tokenizer_of(data.tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as out:
            texts = (file.read_text(errors="replace") for file in files_of(data, base))
            for document in tokenizer.documents(texts):
                out.write(np.asarray(document, dtype=DTYPE).tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read(target: Path) -> np.ndarray:
    """The tokens, memory-mapped. AutoparError when there are none."""
    if target.stat().st_size == 0:
        raise AutoparError("data.text: the files hold no text")
    return np.memmap(target, dtype=DTYPE, mode="r")
