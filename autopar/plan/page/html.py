"""HTML as text: elements whose attributes and children are escaped unless they are elements themselves."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "hr", "input", "meta", "rect", "line", "path", "use"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. ``cls`` is ``class``, ``_`` in a name becomes ``-``; True is a bare attribute, None and False are left out."""
    text = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID and not children:
        return Markup(f"<{name}{text}/>")
    return Markup(f"<{name}{text}>{joined(children)}</{name}>")


def joined(children: Child) -> Markup:
    """Children side by side: markup as it is, everything else escaped."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, (str, int, float)):
        return Markup(escape(str(children)))
    return Markup("".join(map(joined, children)))


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(coordinate(value))}"'


def coordinate(value: str | int | float) -> str:
    """A number as short text, the same on every machine: two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], **attributes: str | None) -> Markup:
    """A table in a box that scrolls sideways where it is too wide. A cell that is a ``td`` element stays as it is."""
    top = tag("thead", tag("tr", [h if _is(h, "th") else tag("th", h) for h in head]))
    body = tag(
        "tbody",
        [row if _is(row, "tr") else tag("tr", [c if _is(c, "td") else tag("td", c) for c in row]) for row in rows],
    )  # noqa: E501
    return tag("div", tag("table", top, body, **attributes), cls="scroll")


def _is(child: object, name: str) -> bool:
    return isinstance(child, Markup) and child.startswith(f"<{name}")


def number(text: Child) -> Markup:
    """A table cell that holds a number."""
    return tag("td", text, cls="num")


def section(anchor: str, title: str, note: Child, *children: Child) -> Markup:
    """A titled part of the page; ``note`` is the sentence under its title."""
    head = [tag("h2", title), tag("p", note, cls="note") if note else None]
    return tag("section", head, children, id=anchor)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """(class of the colour, label) pairs."""
    return tag("ul", [tag("li", tag("i", cls=f"key {color}"), label) for color, label in entries], cls="legend")
