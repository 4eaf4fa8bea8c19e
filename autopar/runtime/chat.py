"""Conversations as text, through a jinja chat template, and which part of it the assistant said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from autopar.errors import AutoparError

OPEN, CLOSE = "\ue000\ue001", "\ue001\ue000"  # around what `{% generation %}` encloses; private characters
Segment = tuple[str, bool]  # text, and whether it is learned


class Template:
    """A chat template, rendered as transformers renders it (blocks trimmed, sandboxed)."""

    def __init__(self, source: str, special: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise AutoparError(f"data.template: not a jinja template: {error}") from None
        self.special = dict(special)
        self.marks = "generation %}" in source or "generation -%}" in source

    def render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = False) -> str:
        """The text of a conversation; ``ask`` adds what comes before the assistant's next words."""
        text = self._render(messages, ask)
        return text.replace(OPEN, "").replace(CLOSE, "")

    def _render(self, messages: Sequence[Mapping[str, Any]], ask: bool) -> str:
        try:
            return self.template.render(messages=messages, add_generation_prompt=ask, tools=None, **self.special)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from None
        except Exception as error:  # whatever an expression of the template does with a strange message
            raise ValueError(f"the chat template fails on it: {type(error).__name__}: {error}") from None

    def segments(self, messages: Sequence[Mapping[str, Any]]) -> list[Segment]:
        """The conversation's text in pieces; those that the assistant says are learned.

        Where the template marks them itself (``{% generation %}``) it is believed; otherwise they are what an answer
        adds to the text before it. ValueError where a later turn changes the text of an earlier one.
        """
        return _marked(self._render(messages, False)) if self.marks else self._by_turns(messages)

    def _by_turns(self, messages: Sequence[Mapping[str, Any]]) -> list[Segment]:
        whole, at = self.render(messages), 0
        found: list[Segment] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:i], ask=True), self.render(messages[: i + 1])
            if not (whole.startswith(before) and whole.startswith(after) and at <= len(before) <= len(after)):
                raise ValueError(
                    f"the chat template writes turn {i + 1} in another way when it is the last; a template with "
                    "{% generation %} around what the assistant says would be right"
                )
            found += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        return [piece for piece in [*found, (whole[at:], False)] if piece[0]]


def messages_of(value: Any) -> list[dict[str, Any]]:
    """A record's conversation, checked; ValueError says what is wrong with it."""
    if not isinstance(value, list) or not value:
        raise ValueError("the conversation is no list of {role, content}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"turn {i + 1} of the conversation is no {{role, content}}")
    return value


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _marked(text: str) -> list[Segment]:
    found: list[Segment] = []
    for i, part in enumerate(text.split(OPEN)):
        said, _, rest = part.partition(CLOSE) if i else ("", "", part)
        found += [(said, True), (rest, False)]
    return [piece for piece in found if piece[0]]


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
