"""A shuffle that needs no memory: where an index goes follows from the index and a key."""

from __future__ import annotations

import numpy as np

ROUNDS = 6


def shuffled(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each index (int64, below ``size``) goes: a permutation of 0 … size − 1, another one for every key.

    A Feistel network over the next even power of two, walked until it falls below ``size`` (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 4).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    at = indices.astype(np.uint64)
    outside = np.ones(len(at), bool)
    while outside.any():
        at[outside] = _network(at[outside], half, low, key)
        outside = at >= np.uint64(size)
    return at.astype(np.int64)


def _network(at: np.ndarray, half: np.uint64, low: np.uint64, key: int) -> np.ndarray:
    left, right = at >> half, at & low
    for turn in range(ROUNDS):
        left, right = right, left ^ (_mixed(right, key + turn * 0x9E3779B97F4A7C15) & low)
    return (left << half) | right


def _mixed(x: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
