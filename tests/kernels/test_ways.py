"""Ways to launch a kernel: one of them is taken, whether the count is known or not."""

from __future__ import annotations

import numpy as np
import pytest

from grc.kernels.ways import by_count

WAYS = [("few", 4), ("some", 16)]


@pytest.mark.parametrize(
    ("count", "way"), [(0, "few"), (1, "few"), (4, "few"), (5, "some"), (16, "some"), (17, "many"), (10**6, "many")]
)
def test_one_way_is_taken(count: int, way: str) -> None:
    assert by_count(count, WAYS, "many") == [(way, 1)]
    unknown = by_count(np.int64(count), WAYS, "many")  # as a size that torch does not know, it is no int
    assert [name for name, _ in unknown] == ["few", "some", "many"]
    assert [name for name, asked in unknown if asked == 1] == [way] and sum(asked for _, asked in unknown) == 1
