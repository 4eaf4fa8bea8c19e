"""The parts a decoder may be made of: one file each under `autopar/models/<kind>/`; a file's presence registers its part."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from autopar.errors import suggestion
from autopar.spec.quantity import short

FOLDER = Path(__file__).resolve().parent.parent / "models"


@cache
def parts(kind: str) -> tuple[str, ...]:
    """The names of all parts of a kind (``activations``, ``blocks``, ``norms``, …), sorted. Imports none of them."""
    return tuple(sorted(p.stem for p in (FOLDER / kind).glob("*.py") if not p.stem.startswith("_")))


def _known(kind: str) -> AfterValidator:
    def check(name: str) -> str:
        known = parts(kind)
        if name not in known:
            raise ValueError(
                f"is {short(name)}, which is unknown{suggestion(name, known)} (one of: {', '.join(known)})"
            )
        return name

    return AfterValidator(check)


Block = Annotated[str, _known("blocks")]
Dispatch = Annotated[str, _known("dispatch")]
Norm = Annotated[str, _known("norms")]
Positions = Annotated[str, _known("positions")]
Projection = Annotated[str, _known("projections")]
Scaling = Annotated[str, _known("scalings")]
