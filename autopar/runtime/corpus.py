"""The tokens of all documents in memory-mapped files, made once for each text and tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from autopar.errors import AutoparError
from autopar.runtime.examples import Document, documents, files_of
from autopar.runtime.readers import Broken
from autopar.runtime.tokenizers import Tokenizer, special_id, tokenizer_of
from autopar.runtime.tokenizers.train import suffix, train
from autopar.spec.data import Data, NewTokenizer

IDS, PLACES, FLAGS = np.dtype("<u4"), np.dtype("<i8"), np.dtype("u1")
TOGETHER = 2**20  # characters that are encoded in one call
LONGEST = 2**20  # characters of a piece: a longer document is cut at line ends to be encoded


@dataclass(frozen=True)
class Facts:
    """What is known of a corpus without reading it. ``digest``: of tokens and places, equal on every host."""

    tokens: int
    documents: int
    highest: int
    special: dict[str, int]
    broken: int
    messages: list[str]
    digest: str


@dataclass(frozen=True)
class Corpus:
    """``ids`` (tokens,); ``starts`` (documents,): the first token of each; ``learned`` (tokens,), None where all are."""

    ids: np.ndarray
    starts: np.ndarray
    learned: np.ndarray | None
    facts: Facts

    @classmethod
    def read(cls, folder: Path) -> Corpus:
        """Memory-mapped. AutoparError when there are no tokens."""
        facts = Facts(**json.loads((folder / "facts.json").read_text()))
        if facts.tokens == 0:
            why = f"; {facts.broken} broken, first {facts.messages[0]}" if facts.broken else ""
            raise AutoparError(f"data: there is no text{why}")
        flags = folder / "learned.bin"
        return cls(
            np.memmap(folder / "ids.bin", IDS, "r"),
            np.memmap(folder / "starts.bin", PLACES, "r"),
            np.memmap(flags, FLAGS, "r") if flags.exists() else None,
            facts,
        )


def place_of(data: Data, base: Path, cache: Path) -> Path:
    """The cache folder for this text and tokenizer, whether or not it is there yet."""
    settings = data.model_dump(mode="json", exclude={"documents", "objective"})
    special = list(_special(data))
    parts = [settings, special, [_stamp(f) for f in files_of(data, base)]]
    for named in (data.tokenizer, data.template, data.dataset.path if data.dataset else None):
        path = Path(named).expanduser() if isinstance(named, str) and len(named) < 4096 and "\n" not in named else None
        if path is not None and path.exists():
            parts.append([_stamp(f) for f in (sorted(path.iterdir()) if path.is_dir() else [path])])
    return cache / f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def prepare(data: Data, base: Path, target: Path) -> None:
    """Write the cache, under another name until it is complete; train the tokenizer first where the job asks for it."""
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        broken = Broken()
        tokenizer, end = _tokenizer(data, base, target)
        special = {token: special_id(tokenizer, token, key) for token, key in _special(data).items()}
        flags = data.prompt is not None or data.chat is not None
        with _Writer(partial, tokenizer, end, flags=flags) as writer:
            for group in _grouped(documents(data, base, tokenizer, broken)):
                writer.add(group)
        writer.facts(special, broken)
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # otherwise another host that shares this disk was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _special(data: Data) -> dict[str, str]:
    """Special tokens that the objective writes → the key of the job that names them."""
    if data.objective.name != "glm":
        return {}
    names = data.objective.tokens
    return {getattr(names, key): f"data.objective.tokens.{key}" for key in type(names).model_fields}


def _tokenizer(data: Data, base: Path, target: Path) -> tuple[Tokenizer, int | None]:
    """The job's tokenizer, and the token that ends a document."""
    asked = data.tokenizer
    if isinstance(asked, NewTokenizer):
        path = (
            Path(asked.file)
            if asked.file
            else target.with_name(f"{target.name}-tokenizer") / f"tokenizer{suffix(asked)}"
        )
        if not path.exists():
            train(asked, lambda: ("".join(t for t, _ in d) for d in documents(data, base, None, Broken())), path)
        tokenizer = tokenizer_of(str(path))
        return tokenizer, special_id(tokenizer, data.end or asked.end, "data.end")
    tokenizer = tokenizer_of(asked)
    if data.end is not None:
        return tokenizer, special_id(tokenizer, data.end, "data.end")
    return tokenizer, None if data.chat is not None else tokenizer.end  # a chat template ends its turns itself


def _grouped(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that are worth one call of the tokenizer."""
    group: list[Document] = []
    size = 0
    for document in found:
        group.append(document)
        size += sum(len(text) for text, _ in document)
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Writer:
    """Appends encoded documents to the files of a cache."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, end: int | None, *, flags: bool):
        self.folder, self.tokenizer, self.end = folder, tokenizer, end
        self.files = contextlib.ExitStack()
        self.ids, self.starts = self._file("ids.bin"), self._file("starts.bin")
        self.flags = self._file("learned.bin") if flags else None
        self.digest = hashlib.sha256()
        self.count = self.made = 0
        self.highest = -1

    def add(self, group: list[Document]) -> None:
        if self.flags is None:
            self._plain(group)
        else:
            self._mixed(group)

    def _plain(self, group: list[Document]) -> None:
        pieces = [_pieces("".join(text for text, _ in document)) for document in group]
        found = iter(self.tokenizer.encode([p for each in pieces for p in each]))
        for each in pieces:
            self._write(np.concatenate([next(found).ids for _ in each]), None)

    def _mixed(self, group: list[Document]) -> None:
        """A token is learned where it begins in a piece that is."""
        encoded = self.tokenizer.encode(["".join(text for text, _ in document) for document in group], starts=True)
        for document, (ids, starts) in zip(group, encoded, strict=True):
            assert starts is not None
            ends = np.cumsum([len(text) for text, _ in document])
            learned = np.asarray([learned for _, learned in document], bool)
            piece = np.searchsorted(ends, starts, side="right").clip(max=len(document) - 1)
            self._write(ids, learned[piece])

    def _write(self, ids: np.ndarray, learned: np.ndarray | None) -> None:
        if self.end is not None:
            ids = np.append(ids, self.end)
            learned = None if learned is None else np.append(learned, True)
        if not len(ids):
            return
        self._put(self.starts, np.asarray([self.count], PLACES))
        self._put(self.ids, ids.astype(IDS))
        if self.flags is not None and learned is not None:
            self._put(self.flags, learned.astype(FLAGS))
        self.count, self.made, self.highest = self.count + len(ids), self.made + 1, max(self.highest, int(ids.max()))

    def _put(self, file: IO[bytes], values: np.ndarray) -> None:
        raw = values.tobytes()
        file.write(raw)
        self.digest.update(raw)

    def _file(self, name: str) -> IO[bytes]:
        return self.files.enter_context(open(self.folder / name, "wb"))

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the files; all that was written is on the disk before they get their name."""
        with self.files:
            for file in filter(None, (self.ids, self.starts, self.flags)):
                file.flush()
                os.fsync(file.fileno())

    def facts(self, special: dict[str, int], broken: Broken) -> None:
        """Write what is known of the whole."""
        highest = max([self.highest, *special.values()])
        digest = self.digest.hexdigest()
        facts = Facts(self.count, self.made, highest, special, broken.count, broken.messages, digest)
        (self.folder / "facts.json").write_text(json.dumps(asdict(facts), indent=1))


def _pieces(text: str) -> list[str]:
    """A long document in pieces that end with a line, where a line ends; each is encoded by itself."""
    found = []
    while len(text) > LONGEST:
        cut = text.rfind("\n", 0, LONGEST) + 1 or LONGEST
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text]
