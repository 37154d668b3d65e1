"""Tiles of the Triton products: their least sizes, and for few, some and many rows one each, all in one kernel."""

from __future__ import annotations

from typing import NamedTuple

PROGRAMS = 132 * 2  # at most: two for each multiprocessor of an H100, which take tiles one after another


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, and how many tiles of operands are on their way."""

    rows: int
    columns: int
    depth: int
    stages: int


def lanes(count: int) -> int:
    """The size of a block that holds so many: a power of two, and no less than a factor of a product on tensor cores."""
    return 1 << max(count - 1, 15).bit_length()


def constants(**tiles: Tile) -> dict[str, int]:
    """Tiles as the kernels take them: constants(F=tile) gives FM, FN, FK and FS."""
    return {prefix + name: size for prefix, tile in tiles.items() for name, size in zip("MNKS", tile, strict=True)}
