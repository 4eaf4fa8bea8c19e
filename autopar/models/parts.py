"""Parts by name: every file of a part's folder defines ``make``, which the spec's name calls."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def part(kind: str, name: str) -> Callable[..., Any]:
    """The ``make`` of the file ``<kind>/<name>.py`` beside this one; a DecoderSpec names only files that are there."""
    make: Callable[..., Any] = import_module(f"{__package__}.{kind}.{name}").make
    return make
