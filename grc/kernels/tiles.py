"""Tiles of the Triton products: one for few rows, one for some and one for many, all compiled into one kernel."""

from __future__ import annotations

from typing import NamedTuple

PROGRAMS = 132 * 2  # at most: two for each multiprocessor of an H100, which take tiles one after another


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, and how many tiles of operands are on their way."""

    rows: int
    columns: int
    depth: int
    stages: int


def constants(few: Tile, some: Tile, many: Tile) -> dict[str, int]:
    """The three tiles as the kernels take them: FM, FN, FK and FS for few rows, S… for some, M… for many."""
    named = {"F": few, "S": some, "M": many}
    return {prefix + name: size for prefix, tile in named.items() for name, size in zip("MNKS", tile, strict=True)}
