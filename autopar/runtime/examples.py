"""Records as documents: pieces of text, each learned or only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.runtime.chat import Segment, Template, messages_of
from autopar.runtime.readers import Broken, Record, reader_of
from autopar.runtime.tokenizers import Tokenizer
from autopar.spec.data import Data, is_file, matches

Document = list[Segment]


def files_of(data: Data, base: Path) -> list[Path]:
    """The files that ``data.text`` names, each once; relative ones are looked for here and below ``base``.

    AutoparError for an entry that matches nothing.
    """
    found: dict[Path, None] = {}
    for entry in data.text:
        files = matches(entry, ["", base])
        if not files:
            raise AutoparError(f"data.text: '{entry}' matches no file (looked in {Path.cwd()} and {base})")
        found |= dict.fromkeys(files)
    return list(found)


def documents(data: Data, base: Path, tokenizer: Tokenizer | None, broken: Broken) -> Iterator[Document]:
    """The documents of a job, in the order of files and lines. Without a tokenizer, its chat template is not known.

    What cannot be used is counted in ``broken``, with its file and line.
    """
    made = form_of(data, tokenizer)
    for place, (line, record) in _records(data, base, broken):
        try:
            document = made(record)
            for text, _ in document:
                text.encode()
        except UnicodeEncodeError:
            broken.add(place, line, "half of a surrogate pair, which is no character")
        except ValueError as error:
            broken.add(place, line, str(error))
        else:
            if any(text for text, _ in document):
                yield document


def fields_of(data: Data) -> list[str]:
    """The fields of a record that are read."""
    if data.chat is not None:
        return [data.chat]
    return [data.field] if data.prompt is None or data.answer is None else [data.prompt, data.answer]


def _records(data: Data, base: Path, broken: Broken) -> Iterator[tuple[str, Record]]:
    if data.dataset is not None:
        from autopar.runtime.readers.datasets import rows

        yield from ((data.dataset.path, row) for row in rows(data.dataset, fields_of(data)))
    for path in files_of(data, base):
        yield from ((str(path), record) for record in reader_of(path)(path, fields_of(data), broken))


def form_of(data: Data, tokenizer: Tokenizer | None) -> Callable[[Any], Document]:
    """How a record becomes a document. The function raises ValueError for one that does not fit."""
    template = _template(data, tokenizer)
    if data.chat is not None:
        assert template is not None
        chat = data.chat
        return lambda record: template.segments(messages_of(_field(record, chat)))
    if data.prompt is not None and data.answer is not None:
        return _pairs(data.prompt, data.answer, template)
    name = data.field
    return lambda record: [(record if isinstance(record, str) else _text(record, name), True)]


def _pairs(prompt: str, answer: str, template: Template | None) -> Callable[[Any], Document]:
    def made(record: Any) -> Document:
        asked, said = _text(record, prompt), _text(record, answer)
        if template is None:
            return [(asked, False), (said, True)]
        return template.segments([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])

    return made


def _template(data: Data, tokenizer: Tokenizer | None) -> Template | None:
    source = data.template
    if source is not None and is_file(source):
        source = Path(source).expanduser().read_text(encoding="utf-8")
    if source is None and data.chat is not None:
        source = tokenizer.template if tokenizer is not None else "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        if source is None:
            raise AutoparError(
                "data.chat: the tokenizer has no chat template; set data.template to one, or to its file"
            )
    return None if source is None else Template(source, tokenizer.special if tokenizer is not None else {})


def _field(record: Any, name: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"no record with a field '{name}', but {type(record).__name__}")
    if name not in record:
        raise ValueError(f"no field '{name}' (fields there: {', '.join(map(str, record))[:200]})")
    return record[name]


def _text(record: Any, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise ValueError(f"the field '{name}' is {type(value).__name__}, not text")
    return value
