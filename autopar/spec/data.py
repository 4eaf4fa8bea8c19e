"""The data of a job: where text comes from, how it becomes tokens, and what is learned from them."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from autopar.spec.base import Count, Flag, Real, Spec, Texts
from autopar.spec.source import Source

STDLIB = "stdlib:"
Share = Annotated[Real, Field(ge=0, le=1)]
_OWN = {"causal_lm": set(), "prefix_lm": {"prefix"}, "glm": {"masked", "span", "long", "tokens"}}


class GlmTokens(Spec):
    """The special tokens of blank infilling, as the tokenizer writes them (ChatGLM-6B's by default)."""

    mask: str = "[MASK]"  # stands for a short blank
    long: str = "[gMASK]"  # stands for a blank that reaches to the end
    start: str = "<sop>"
    end: str = "<eop>"


class Objective(Spec):
    """What is predicted. ``causal_lm``: each next token.

    ``prefix_lm``: a random share of every sequence, within ``prefix``, is seen in both directions and not predicted.
    ``glm``: blank infilling (Du et al. 2022): ``masked``: share of the tokens in short blanks of ``span`` tokens on
    average; ``long``: share of the sequences with one blank to the end instead, of at least half of the tokens.
    """

    name: Literal["causal_lm", "prefix_lm", "glm"] = "causal_lm"
    prefix: tuple[Share, Share] = (0.0, 0.9)
    masked: Annotated[Real, Field(gt=0, lt=1)] = 0.15
    span: Annotated[Real, Field(ge=1)] = 3.0
    long: Share = 0.5
    tokens: GlmTokens = GlmTokens()

    @model_validator(mode="after")
    def _own_options(self) -> Objective:
        foreign = sorted(self.model_fields_set - {"name"} - _OWN[self.name])
        changed = [f for f in foreign if getattr(self, f) != type(self).model_fields[f].default]
        if changed:
            raise ValueError(f"'{self.name}' has no {' and no '.join(changed)}")
        if self.prefix[0] > self.prefix[1]:
            raise ValueError(f"prefix must be [least, most], not {list(self.prefix)}")
        return self


class NewTokenizer(Spec):
    """A tokenizer trained on the job's own text before the first step.

    ``bpe``, ``byte_bpe`` (GPT-2's), ``wordpiece`` and ``unigram`` make a tokenizer.json; ``sentencepiece_unigram`` and
    ``sentencepiece_bpe`` a SentencePiece model that falls back to bytes. ``vocab``: tokens, special ones included.
    ``file``: where to keep it, from the job's folder; a file that is there already is used as it is.
    """

    train: Literal["bpe", "byte_bpe", "wordpiece", "unigram", "sentencepiece_unigram", "sentencepiece_bpe"]
    vocab: Count
    special: Texts = ()
    end: str = "<|endoftext|>"
    lowercase: Flag = False
    file: str = ""


class Dataset(Spec):
    """A data set of Hugging Face's `datasets`: a folder of `save_to_disk`, or what `load_dataset` takes."""

    path: str
    name: str | None = None
    split: str = "train"
    files: dict[str, Texts] | None = None  # `data_files` by split, for the loaders named csv, json, parquet …


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _kind(value: Any) -> str:
    return "a new one" if isinstance(value, (dict, NewTokenizer)) else "name"


ObjectiveField = Annotated[Objective, BeforeValidator(_named)]
TokenizerField = Annotated[
    Annotated[str, Tag("name")] | Annotated[NewTokenizer, Tag("a new one")], Discriminator(_kind)
]


class Data(Spec):
    """Training text. ``text``: files or globs (text, JSONL or Parquet by suffix; ``stdlib:json/*.py`` is Python's own
    source); or ``dataset``. ``tokenizer``: ``bytes``; a tokenizer.json, SentencePiece .model, GGUF file or folder; or
    one to train.

    A record's text is its ``field``; or ``prompt`` and ``answer``, the fields of a pair; or ``chat``, the field of a
    list of {role, content}. Prompts, and what other roles than the assistant say, are read but not learned.
    ``template``: a jinja chat template or its file (default: the tokenizer's own). ``end``: the token that ends a
    document (default: the tokenizer's own). ``documents``: whether a token sees documents packed before its own into
    the same sequence (``joined``), or none but its own (``separate``).
    """

    text: Texts = ()
    dataset: Annotated[Dataset | None, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)] = None
    tokenizer: TokenizerField = "bytes"
    field: str = "text"
    prompt: str | None = None
    answer: str | None = None
    chat: str | None = None
    template: str | None = None
    end: str | None = None
    documents: Literal["joined", "separate"] = "joined"
    objective: ObjectiveField = Objective()

    @model_validator(mode="after")
    def _one_form(self) -> Data:
        if self.text and self.dataset is not None:
            raise ValueError("has both text and dataset; one of them is right")
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("needs prompt and answer together, or neither")
        if self.prompt is not None and self.chat is not None:
            raise ValueError("has both prompt and chat; one of them is right")
        if self.template is not None and self.prompt is None and self.chat is None:
            raise ValueError("has a template but neither chat nor prompt, so there is nothing to put in it")
        return self

    @property
    def given(self) -> bool:
        """Whether there is any data at all."""
        return bool(self.text) or self.dataset is not None

    @property
    def plain(self) -> bool:
        """Whether the model's inputs are those of plain causal language modelling."""
        return self.documents == "joined" and self.objective.name == "causal_lm"


def locate(data: Data, source: Source, folder: Path | None) -> Data:
    """``data`` with every path made absolute: from the current folder first, then from ``folder``, the job's own.

    SpecError, with file and line, for text that matches no file and for a tokenizer or template that is not there.
    """
    bases = [Path.cwd(), *([folder.resolve()] if folder else [])]
    changed: dict[str, Any] = {"text": tuple(_pattern(p, i, source, bases) for i, p in enumerate(data.text))}
    if isinstance(data.tokenizer, str) and data.tokenizer != "bytes":
        found = _existing(data.tokenizer, bases)
        if found is None:
            message = f"data.tokenizer: no such file or folder '{data.tokenizer}' ('bytes' needs none)"
            raise source.error(message, ("data", "tokenizer"))
        changed["tokenizer"] = found
    elif isinstance(data.tokenizer, NewTokenizer) and data.tokenizer.file:
        kept = bases[-1] / Path(data.tokenizer.file).expanduser()
        changed["tokenizer"] = data.tokenizer.model_copy(update={"file": str(kept)})
    if data.template is not None and is_file(data.template):
        found = _existing(data.template, bases)
        if found is None:
            raise source.error(f"data.template: no such file '{data.template}'", ("data", "template"))
        changed["template"] = found
    if data.dataset is not None and (found := _existing(data.dataset.path, bases)):
        changed["dataset"] = data.dataset.model_copy(update={"path": found})
    return data.model_copy(update=changed)


def is_file(template: str) -> bool:
    """Whether a template names its file rather than being written out."""
    return "{" not in template and "\n" not in template


def matches(pattern: str, bases: Iterable[str | Path]) -> list[Path]:
    """The files of a pattern, sorted, below the first base that has any."""
    if pattern.startswith(STDLIB):
        pattern = str(Path(sysconfig.get_paths()["stdlib"], pattern.removeprefix(STDLIB)))
    pattern = os.path.expanduser(pattern)
    for base in ("",) if os.path.isabs(pattern) else bases:
        found = [Path(m) for m in sorted(glob.glob(os.path.join(base, pattern), recursive=True)) if os.path.isfile(m)]
        if found:
            return found
    return []


def _pattern(pattern: str, index: int, source: Source, bases: list[Path]) -> str:
    if not matches(pattern, bases):
        places = " and ".join(dict.fromkeys(map(str, bases)))
        where = "" if os.path.isabs(pattern) or pattern.startswith(STDLIB) else f" (looked in {places})"
        raise source.error(f"data.text: '{pattern}' matches no file{where}", ("data", "text", index))
    if os.path.isabs(os.path.expanduser(pattern)) or pattern.startswith(STDLIB):
        return pattern
    return next(str(base / pattern) for base in bases if matches(pattern, [base]))


def _existing(name: str, bases: list[Path]) -> str | None:
    """The full path of a file or folder below one of the bases; one that could be no path is not there."""
    try:
        places = [base / Path(name).expanduser() for base in bases]
        return next((str(p) for p in places if p.exists()), None)
    except (OSError, ValueError, RuntimeError):
        return None
