"""Names that differ in a number alone, as the parameters of repeated blocks do."""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")


def starred(name: str) -> str:
    """``blocks.*.norm.weight`` for ``blocks.12.norm.weight``."""
    return NUMBER.sub("*", name)
