"""First values of parameters that passes add: from a seed and the parameter's name, the same under every plan."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from autopar.errors import PassError


@dataclass(frozen=True)
class Initial:
    """``uniform``: between ±scale; ``normal``: with standard deviation scale; ``constant``: scale.

    ``norms``: the norms of the rows (or, without ``rows``, the columns) of the parameter ``of``.
    """

    kind: Literal["uniform", "normal", "constant", "norms"]
    scale: float = 0.0
    of: str = ""
    rows: bool = True

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """The value, on the CPU. Drawn in float64, whose random bits do not depend on the processor, then rounded."""
        if self.kind == "norms":
            raise PassError(f"{name} begins as the norms of {self.of}, which has no value here (meta)")
        if self.kind == "constant":
            return torch.full(shape, self.scale, dtype=dtype)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        value = torch.empty(shape, dtype=torch.float64)
        if self.kind == "uniform":
            value.uniform_(-self.scale, self.scale, generator=generator)
        else:
            value.normal_(0.0, self.scale, generator=generator)
        return value.to(dtype)

    def measured(self, weight: torch.Tensor) -> torch.Tensor:
        """``norms`` of a weight at hand, in float32 at least."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return torch.linalg.vector_norm(wide, dim=1 if self.rows else 0)


def kaiming_uniform(fan_in: int) -> Initial:
    """torch's default of a linear layer: uniform within ±1/√fan_in (`nn.Linear.reset_parameters`)."""
    return Initial("uniform", 1.0 / math.sqrt(fan_in))


def norms(weight: str, *, rows: bool) -> Initial:
    """The norms of a weight's rows (columns): what DoRA's magnitudes begin as."""
    return Initial("norms", of=weight, rows=rows)
