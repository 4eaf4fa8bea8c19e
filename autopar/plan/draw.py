"""A plan as one self-contained HTML page: no network, light and dark, readable without scripts."""

from __future__ import annotations

from importlib.resources import files

from autopar.plan.page.headline import headline
from autopar.plan.page.html import Markup, tag
from autopar.plan.page.ledger import binding, ledger
from autopar.plan.page.memory import memory
from autopar.plan.page.mesh import mesh
from autopar.plan.page.parameters import parameters
from autopar.plan.page.program import program as program_section
from autopar.plan.page.search import search, unsplit
from autopar.plan.page.timeline import timeline
from autopar.plan.plan import PlanDocument

SECTIONS = (
    ("ledger", "Time"), ("memory", "Memory"), ("mesh", "Mesh"), ("timeline", "Pipeline"),
    ("search", "Search"), ("program", "Program"), ("parameters", "Parameters"), ("unsplit", "Not split"),
)  # fmt: skip


def page(document: PlanDocument, program: str | None = None) -> str:
    """The page. ``program`` is the text of the static program that was planned (``str(program)``); without it the nodes are
    shown as far as the plan knows them. The same document gives the same text."""
    body = tag(
        "body",
        tag(
            "nav",
            [tag("a", name, href=f"#{anchor}") for anchor, name in SECTIONS],
            tag("button", "◐", id="theme", type="button", title="light or dark"),
        ),  # noqa: E501
        tag(
            "main",
            headline(document),
            binding(document),
            ledger(document),
            memory(document),
            mesh(document),
            timeline(document),
            search(document),
            program_section(document, program),
            parameters(document, program),
            unsplit(document),
        ),
        tag("div", id="tip"),
        tag("footer", f"Written by autopar from a plan of version {document.version}."),
        tag("script", _own("page.js")),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{document.title or 'Plan'} · autopar"),
        tag("style", _own("page.css")),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _own(name: str) -> Markup:
    """The text of a file beside the page's sections, which is ours and is not escaped."""
    return Markup(files("autopar.plan.page").joinpath(name).read_text(encoding="utf-8"))
