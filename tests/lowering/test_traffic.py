"""Buckets from traffic: the file, the time of a size that was not measured, and the best buckets against all others."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from grc.errors import LoweringError
from grc.lowering.traffic import expected, interpolated, learn, pieces, read_traffic, told


def seconds(batch: int) -> float:
    return 20e-6 + batch * 1e-6


def test_reads_sizes_and_counts(tmp_path: Path) -> None:
    file = tmp_path / "sizes.txt"
    file.write_text("1\n7 3\n\n7\n64,2\n")
    assert read_traffic(file) == {1: 1, 7: 4, 64: 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3\nmany\n", "sizes.txt:2 is 'many', not a batch size"),
        ("0\n", "sizes.txt:1 is '0', not a batch size"),
        ("1 2 3\n", "sizes.txt:1 is '1 2 3', not a batch size"),
        ("\n", "sizes.txt holds no batch sizes"),
    ],
)
def test_refuses_what_is_no_traffic(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sizes.txt"
    file.write_text(text)
    with pytest.raises(LoweringError) as refused:
        read_traffic(file)
    assert refused.value.message == message


def test_names_the_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"can't read .*none: No such file"):
        read_traffic(tmp_path / "none")


def test_times_lie_on_lines_between_measured_ones() -> None:
    between = interpolated({1: 10.0, 9: 18.0, 100: 20.0})
    assert [between(b) for b in (1, 5, 9, 100, 500)] == [10.0, 14.0, 18.0, 20.0, 20.0]


def test_large_requests_count_as_their_pieces() -> None:
    assert pieces({70: 2, 32: 1, 5: 1}, 32) == {32: 5, 6: 2, 5: 1}


@pytest.mark.parametrize("seed", range(8))
def test_no_other_buckets_are_better(seed: int) -> None:
    draw = random.Random(seed)
    traffic = Counter(draw.choice((1, 2, 3, 8, 13, 40, 41, 90)) for _ in range(50))
    sizes = sorted(traffic)
    best = min(
        expected(traffic, (*chosen, 100), seconds)
        for count in range(3)
        for chosen in itertools.combinations(sizes, count)
    )
    found = learn(traffic, 1, 100, seconds, most=3)
    assert found[-1] == 100 and len(found) <= 3
    assert expected(traffic, found, seconds) == pytest.approx(best)


def test_many_sizes_are_rounded_up() -> None:
    draw = random.Random(0)
    traffic = Counter(draw.randint(1, 16384) for _ in range(3000))
    found = learn(traffic, 1, 16384, seconds)
    assert len(found) == 8 and found[-1] == 16384 and all(size % 32 == 0 for size in found)
    assert expected(traffic, found, seconds) < expected(traffic, (1, 8, 32, 128, 512, 2048, 8192, 16384), seconds)


def test_says_what_was_gained() -> None:
    text = told({3: 9, 30: 1}, (3, 64), (1, 8, 64), seconds)
    assert text == "buckets 3, 64 learnt from 10 requests: 29.1 us expected, 33.6 with 1, 8, 64"
