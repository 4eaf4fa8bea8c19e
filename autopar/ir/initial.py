"""First values of parameters that passes add: from a seed and the parameter's name, the same under every plan."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Initial:
    """``uniform``: between ±scale; ``normal``: with standard deviation scale; ``constant``: scale."""

    kind: Literal["uniform", "normal", "constant"]
    scale: float = 0.0

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """The value, on the CPU. Drawn in float64, whose random bits do not depend on the processor, then rounded."""
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


def kaiming_uniform(fan_in: int) -> Initial:
    """torch's default of a linear layer: uniform within ±1/√fan_in (`nn.Linear.reset_parameters`)."""
    return Initial("uniform", 1.0 / math.sqrt(fan_in))
