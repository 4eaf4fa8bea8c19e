"""Quantities as people write them (``80 GiB``, ``900 GB/s``, ``3 us``) to SI numbers and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_PREFIXES = _DECIMAL | _BINARY
BYTES = {f"{prefix}B": factor for prefix, factor in _PREFIXES.items()}
BANDWIDTH = {f"{unit}/s": factor for unit, factor in BYTES.items()} | {
    f"{prefix}{bit}": factor / 8 for prefix, factor in _DECIMAL.items() for bit in ("bit/s", "b/s")
}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
FLOPS = {f"{prefix}FLOP/s": factor for prefix, factor in _DECIMAL.items()}
MOST = 1e300  # no quantity of a machine is larger
_NUMBER = re.compile(r"\s*([-+]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S*(?:\s*/\s*s)?)\s*")


def short(value: object, length: int = 60) -> str:
    """A value as it was written, cut to a length that fits into a message."""
    text = repr(value) if not isinstance(value, int) or abs(value) < MOST else "a very large number"
    return text if len(text) <= length else f"{text[: length - 1]}…"


def quantity(value: object, units: Mapping[str, float], example: str) -> float:
    """The number of ``value`` in SI units: a plain number, or text with one of ``units``.

    Raises ValueError with a message that names the unit, or says what would be right by ``example``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be a quantity such as '{example}', not {short(value)}")
    if isinstance(value, (int, float)):
        number = float(value) if abs(value) < MOST else math.inf
    else:
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise ValueError(f"must be a quantity such as '{example}', not {short(value)}")
        number = float(match[1].replace(",", "").replace("_", "")) * _factor(match[2], units, value, example)
        number = float(f"{number:.12g}")  # 2.039 TB/s without the dust of binary fractions
    if not math.isfinite(number) or number <= 0:
        what = "positive" if number <= 0 else "a finite number"
        raise ValueError(f"must be {what}, such as '{example}', not {short(value)}")
    return number


def _factor(unit: str, units: Mapping[str, float], value: str, example: str) -> float:
    unit = unit.replace(" ", "")
    if not unit:
        return 1.0
    if unit in units:
        return units[unit]
    known = ", ".join(list(units)[:8])
    raise ValueError(f"has the unit {short(unit)} in {short(value)}; write it such as '{example}' (units: {known}, …)")


def bytes_(value: object) -> int:
    """``80 GiB`` → 85899345920."""
    return round(quantity(value, BYTES, "80 GiB"))


def bandwidth(value: object) -> float:
    """``900 GB/s`` or ``400 Gbit/s`` → bytes per second."""
    return quantity(value, BANDWIDTH, "900 GB/s")


def seconds(value: object) -> float:
    """``3 us`` → 3e-06; zero is allowed."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return quantity(value, SECONDS, "3 us")


def flops(value: object) -> float:
    """``989e12`` or ``989 TFLOP/s`` → FLOP/s."""
    return quantity(value, FLOPS, "989e12")


def show_bytes(number: float) -> str:
    """Bytes for people: ``37.2 GiB``."""
    for unit in ("GiB", "MiB", "KiB"):
        if abs(number) >= BYTES[unit]:
            return f"{number / BYTES[unit]:,.1f} {unit}"
    return f"{number:.0f} B"


def show_seconds(number: float) -> str:
    """Seconds for people: ``12.3 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 else f"{number:,.0f} s"
    return "0 s" if number == 0 else f"{number / 1e-9:.3g} ns"
