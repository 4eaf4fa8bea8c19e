"""A spec file as plain data that remembers where every value stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autopar.errors import SpecError

Path_ = tuple[str | int, ...]
MAX_BYTES = 4 * 2**20  # a spec is written by people; a checkpoint given by mistake is not read to its end
MAX_VALUES = 100_000  # what aliases may unfold to
MAX_DEPTH = 64


@dataclass
class Source:
    """Plain data, and for the path of every value the place it was written at (``job.yaml:7``)."""

    data: Any
    label: str
    marks: dict[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_ = ()) -> str:
        """The place of the value at ``path``, or of the nearest value around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                return self.marks[path[:end]]
        return self.label

    def sub(self, key: str | int) -> Source:
        """The value under one key, with its marks."""
        marks = {path[1:]: mark for path, mark in self.marks.items() if path and path[0] == key}
        return Source(self.data[key], self.where((key,)), marks)

    def put(self, key: str | int, value: Source) -> None:
        """Set one key to another source's data, marks included."""
        self.data[key] = value.data
        for path in [p for p in self.marks if p and p[0] == key and len(p) > 1]:
            del self.marks[path]
        self.marks.setdefault((key,), value.where())
        self.marks.update({(key, *path): mark for path, mark in value.marks.items() if path})

    def error(self, message: str, path: Path_ = ()) -> SpecError:
        return SpecError(f"{self.where(path)}: {message}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: ``1e-4`` is a number, ``no`` is text, nothing is a date."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern in {
    "null": r"|~|null|Null|NULL",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text.replace("_", ""), 0 if text[:2] in ("0o", "0x") else 10),
    "float": _float,
    "str": str,
    "merge": str,
}


def read(path: Path, label: str = "") -> Source:
    """Read one YAML (or JSON) file; ``label`` is what messages call it (default: the path as given)."""
    label = label or str(path)
    if path.is_dir():
        raise SpecError(f"{label} is a folder (directory); a YAML file is expected")
    if not path.exists():
        raise SpecError(f"{label}: no such file")
    if not path.is_file():
        raise SpecError(f"{label} is not a regular file; a YAML file is expected")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecError(f"{label}: {path.stat().st_size:,} bytes are too many for a spec (at most {MAX_BYTES:,})")
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{label}: cannot be read: {error.strerror}") from None
    try:
        return parse(raw.decode("utf-8-sig"), label)
    except UnicodeDecodeError as error:
        message = f"{label}: not YAML: byte {error.start} is no character of UTF-8 text"
        raise SpecError(message) from None


def parse(text: str, label: str) -> Source:
    """Parse YAML text; every message starts with ``label:line``."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError(_syntax(error, text, label)) from None
    except RecursionError:
        raise SpecError(f"{label}: nested too deeply") from None
    if node is None:
        return Source(None, label)
    builder = _Builder(label)
    try:
        return Source(builder.build(node, ()), label, builder.marks)
    except RecursionError:
        raise SpecError(f"{label}: a value contains itself") from None


def value(text: str, label: str) -> Any:
    """One value in YAML's spelling, as written behind ``--set key=``."""
    return parse(text, label).data


def _syntax(error: yaml.YAMLError, text: str, label: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # a reader's error: a character that YAML does not allow
        at = getattr(error, "position", 0)
        code = getattr(error, "character", 0)
        line = text.count("\n", 0, at) + 1
        return f"{label}:{line}: not YAML: the character {_character(code)} is not allowed"
    line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    problem = getattr(error, "problem", None) or "cannot be read"
    if "\t" in line[: mark.column + 1] and "'\\t'" in problem:
        problem = "a tab cannot indent or separate; use blanks"
    elif "single document" in (getattr(error, "context", "") or ""):
        problem = "one document is expected, another begins"
    return f"{label}:{mark.line + 1}: not valid YAML: {problem} (line {mark.line + 1}, column {mark.column + 1})"


def _character(code: int | str) -> str:
    return repr(chr(code)) if isinstance(code, int) else repr(code)


class _Builder:
    """Nodes to plain data: duplicate keys and tags refused, aliases unfolded up to a bound."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.marks: dict[Path_, str] = {}
        self.count = 0

    def fail(self, node: yaml.Node, message: str) -> SpecError:
        return SpecError(f"{self.label}:{node.start_mark.line + 1}: {message}")

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            what = f"{MAX_DEPTH} levels" if len(path) > MAX_DEPTH else f"{MAX_VALUES:,} values"
            raise self.fail(node, f"more than {what}; are aliases nested in '{'.'.join(map(str, path[:2]))}'?")
        self.marks.setdefault(path, f"{self.label}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            self.allow(node, "map")
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self.allow(node, "seq")
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def allow(self, node: yaml.Node, *names: str) -> str:
        name = node.tag.removeprefix("tag:yaml.org,2002:")
        if name not in names:
            tag = "!!" + name if node.tag != name else name
            raise self.fail(node, f"the tag {tag!r} is not allowed; a spec holds plain values, no Python objects")
        return name

    def scalar(self, node: yaml.Node) -> Any:
        name = self.allow(node, *_SCALARS)
        try:
            return _SCALARS[name](node.value)
        except ValueError:
            raise self.fail(node, f"{node.value!r} cannot be read as {name}") from None

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        data: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be a word, not a list or a mapping")
            if key.tag.endswith(":merge"):
                for base in self.bases(item):
                    inherited = {**self.mapping(base, path), **inherited}
                continue
            if key.value in data:
                raise self.fail(key, f"the key '{key.value}' stands here twice")
            self.marks[(*path, key.value)] = f"{self.label}:{key.start_mark.line + 1}"
            data[key.value] = self.build(item, (*path, key.value))
        return {**inherited, **data}

    def bases(self, node: yaml.Node) -> Iterator[yaml.MappingNode]:
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(item, yaml.MappingNode):
                raise self.fail(item, "'<<' merges mappings only")
            self.count += 1
            if self.count > MAX_VALUES:
                raise self.fail(item, f"more than {MAX_VALUES:,} values")
            yield item
