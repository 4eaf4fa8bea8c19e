"""Seeds that follow from a seed and a name."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, name: str) -> int:
    """63 bits from a seed and a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
