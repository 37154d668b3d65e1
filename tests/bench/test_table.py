"""Ratios of medians, and tables that show no speed of a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from grc.bench.plot import plot_ratios, plot_times
from grc.bench.subject import BenchError
from grc.bench.table import cells, duration, geometric_mean, markdown_table, text_table

from .rows import row

ROWS = [row("eager", 300.0), row("grc", 100.0), row("onnxruntime", 170.0), row("aoti", 250.0)]


def test_the_ratio_is_the_best_peers_median_over_grcs():
    (cell,) = cells(ROWS)
    assert cell.ratio == pytest.approx(1.7)
    assert cell.best_peer is not None
    assert cell.best_peer["engine"] == "onnxruntime"
    assert [r["engine"] for r in cell.rows] == ["grc", "onnxruntime", "aoti", "eager"]


def test_a_wrong_peer_is_no_best_peer():
    wrong = {**row("onnxruntime", 1.0), "refused": "error 3.0e-01"}
    (cell,) = cells([row("grc", 100.0), row("eager", 300.0), wrong])
    assert cell.ratio == pytest.approx(3.0)
    text = text_table([row("grc", 100.0), row("eager", 300.0), wrong])
    assert "1.00 us" not in text
    assert "batch 64: onnxruntime has no time: error 3.0e-01" in text


def test_a_wrong_grc_has_no_ratio():
    (cell,) = cells([row("grc", None), row("eager", 300.0)])
    assert cell.ratio is None
    assert "nothing to compare" in text_table([row("grc", None), row("eager", 300.0)])


def test_rows_of_different_machines_are_never_compared():
    found = cells([row("grc", 100.0), row("eager", 900.0, machine="a slower one")])
    assert [cell.ratio for cell in found] == [None, None]


def test_the_text_table_says_all_there_is():
    text = text_table(ROWS)
    assert "CPU, 2 threads, avx512" in text
    assert "1.70x" in text
    assert "3.00x" in text
    assert "batch 64: grc is 1.70x its best peer, onnxruntime" in text
    assert "1.0e-07" in text


def test_the_markdown_table_has_a_line_for_each_cell():
    lines = markdown_table([*ROWS, row("grc", 1.0, batch=1), row("eager", None, batch=1)]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "wrong or failed" in lines[2]
    assert "**1.70x** onnxruntime" in lines[3]


def test_on_a_gpu_the_way_from_host_to_host_is_compared_too():
    """The peer that is fastest there may be another one, and faster than grc."""
    rows = [
        row("grc", 20.0, wall_p50_us=60.0), row("aoti", 30.0, wall_p50_us=48.0), row("compile", 25.0, wall_p50_us=90.0)
    ]  # fmt: skip
    (cell,) = cells(rows)
    assert cell.wall == ("aoti", pytest.approx(0.8))
    assert "grc is 1.25x its best peer, compile, and 0.80x aoti from host to host" in text_table(rows)
    head, _, line = markdown_table([*rows, row("grc", 1.0, batch=128)]).splitlines()[:3]
    assert "| grc wall | wall, grc / best peer |" in head and "| 60.0 us | 0.80x aoti |" in line
    assert "wall" not in markdown_table(ROWS)


def test_the_geometric_mean():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([4.0, 1.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no ratios"):
        geometric_mean([])


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0.5, "0.500 us"),
        (3.14159, "3.14 us"),
        (63.07, "63.1 us"),
        (190, "190 us"),
        (999.7, "1.00 ms"),
        (2.8e6, "2.80 s"),
    ],
)
def test_durations_have_three_digits(microseconds: float, text: str):
    assert duration(microseconds) == text


def test_plots_are_drawn_alike_from_the_same_rows(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for draw in (plot_times, plot_ratios):
        draw(ROWS, tmp_path / "a.svg")
        draw(ROWS, tmp_path / "b.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_a_plot_of_no_times_is_refused(tmp_path: Path):
    with pytest.raises(BenchError, match="no engine has a time"):
        plot_times([row("eager", None)], tmp_path / "a.svg")
    with pytest.raises(BenchError, match=r"neither \.svg nor \.png"):
        plot_times(ROWS, tmp_path / "a.gif")
