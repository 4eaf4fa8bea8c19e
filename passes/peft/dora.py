"""dora: weight-decomposed low-rank adapters (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from typing import ClassVar

from passes.peft.lora import Lora


class Dora(Lora):
    """`lora` with ``dora: true``: the norm of every row of W + scale · B A is trained apart from its direction."""

    name: ClassVar[str] = "dora"

    dora: bool = True
