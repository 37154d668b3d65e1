"""Ways to launch a kernel: one of them is taken, whether the count is known or not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from grc.kernels.ways import as_measured, by_count

WAYS = [("few", 4), ("some", 16)]


@pytest.mark.parametrize(
    ("count", "way"), [(0, "few"), (1, "few"), (4, "few"), (5, "some"), (16, "some"), (17, "many"), (10**6, "many")]
)
def test_one_way_is_taken(count: int, way: str) -> None:
    assert by_count(count, WAYS, "many") == [(way, 1)]
    unknown = by_count(np.int64(count), WAYS, "many")  # as a size that torch does not know, it is no int
    assert [name for name, _ in unknown] == ["few", "some", "many"]
    assert [name for name, asked in unknown if asked == 1] == [way] and sum(asked for _, asked in unknown) == 1


class Tile(NamedTuple):
    rows: int
    warps: int


def test_tiles_are_read_as_they_were_measured() -> None:
    assert as_measured(7, None, Tile(8, 1)) == [(Tile(8, 1), 1)]
    tiles = [4, 8, 1, 16, 8, 2, 0, 64, 4]
    for count, tile in [(1, Tile(8, 1)), (4, Tile(8, 1)), (5, Tile(8, 2)), (16, Tile(8, 2)), (17, Tile(64, 4))]:
        assert as_measured(count, tiles, Tile(0, 0)) == [(tile, 1)]
        assert [(t, 1) for t, asked in as_measured(np.int64(count), tiles, Tile(0, 0)) if asked] == [(tile, 1)]
