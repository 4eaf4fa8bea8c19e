"""How much of a device a matrix product fills: tiles of the result in waves over the device's units."""

from __future__ import annotations

import math
from functools import lru_cache

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.97), (128, 64, 0.85), (64, 128, 0.85), (64, 64, 0.7))
"""Rows, columns, and the rate of one unit beside that with the largest tiles. cuBLAS' tiles, larger ones reusing more of what
they read: NVIDIA, Matrix Multiplication Background User's Guide, sections 3.1 and 4. The rates of the smaller ones are
assumptions, between their reuse, rows · columns / (rows + columns), and none."""
FILL = 96
"""Depth that a tile spends on filling its pipeline and writing its result: an assumption, three steps of 32."""
SPLITS = (1, 2, 3, 4, 6, 8)
"""Parts that a product's depth may be divided into where its tiles alone do not fill the device (cuBLAS' split-K)."""
SHORTEST = 512  # depth of one part at least


@lru_cache(maxsize=65536)
def filling(product: tuple[int, int, int, int] | None, units: int | None) -> float:
    """The share of a large product's rate that one (count, rows, columns, depth) reaches on a device of ``units``
    multiprocessors; 1 where either is not known."""
    if product is None or units is None or 0 in product:
        return 1.0
    return max(reached(product, units, tile, parts) for tile in TILES for parts in splits(product[3]))


def splits(depth: int) -> tuple[int, ...]:
    return tuple(s for s in SPLITS if s == 1 or depth // s >= SHORTEST)


def reached(product: tuple[int, int, int, int], units: int, tile: tuple[int, int, float], parts: int) -> float:
    """With one tile and one division of the depth: the useful share of all waves, by a unit's own rate."""
    count, rows, columns, depth = product
    tall, wide, speed = tile
    tiles = count * math.ceil(rows / tall) * math.ceil(columns / wide) * parts
    each = math.ceil(depth / parts)
    useful = count * rows * columns * depth / (math.ceil(tiles / units) * units * tall * wide * (each + FILL))
    return speed * useful
