"""The scripts on top of the rows: goals of the CPU run, and the page that is drawn from the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cpu import GOALS, against_goals
from benchmarks.plots import DOCUMENT, NOT_MEASURED, README, RESULTS, SERVING, filled
from grc.bench.rows import write
from grc.bench.table import cells

from .rows import row

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"


def test_every_zoo_model_has_its_goals():
    assert sorted(GOALS) == sorted(file.stem for file in ZOO.glob("*.py"))


def test_a_missed_goal_is_listed_and_a_met_one_is_not():
    rows = [row("grc", 100.0), row("eager", 160.0), row("grc", 100.0, batch=1), row("aoti", 260.0, batch=1)]
    text = "\n".join(against_goals(cells(rows)))
    assert "geometric mean 2.04 over 2 cells" in text
    assert "dlrm uniform at batch 64: 1.60 of 1.7, best peer eager" in text
    assert "at batch 1:" not in text


def test_zipf_ids_are_held_to_the_floor_only():
    fast = [row("grc", 100.0, ids="zipf"), row("eager", 160.0, ids="zipf")]
    assert against_goals(cells(fast))[-1] == "every goal is met"
    slow = [row("grc", 100.0, ids="zipf"), row("eager", 90.0, ids="zipf")]
    assert any("dlrm zipf at batch 64: 0.90 of 1.0" in line for line in against_goals(cells(slow)))


@pytest.mark.parametrize("document", [README, DOCUMENT, SERVING], ids=lambda document: document.name)
def test_a_page_says_what_the_committed_rows_say(document: Path):
    assert document.read_text() == filled(document.read_text(), RESULTS)


def test_the_table_of_servers_puts_them_beside_each_other(tmp_path: Path):
    text = "<!-- begin: serving -->\n<!-- end: serving -->\n"
    assert NOT_MEASURED in filled(text, tmp_path)
    about = {
        "model": "dlrm",
        "machine": "CPU",
        "versions": {"grc": "1"},
        "date": "2026-01-01",
        "command": "run",
        "engines": ["eager"],
    }
    figures = {"p50_us": 1500, "p99_us": 2500, "requests_s": 900.4, "cpu_us": 450.0, "spread_p99": 1.25}
    rows = [
        {"server": server, "encoding": "json", "clients": 8, "errors": 0, "memory_bytes": 2e8, **figures, **about}
        for server in ("fused", "own")
    ]
    (tmp_path / "serving.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = filled(text, tmp_path).splitlines()
    assert "### dlrm, CPU" in lines and "2026-01-01; grc 1; engine inside: eager." in lines
    assert lines[-7:-5] == [
        "| json | 8 | own | 1.50 ms | 2.50 ms | 900 | 450 us | 1.2x | 200 MB |",
        "| json | 8 | fused | 1.50 ms | 2.50 ms | 900 | 450 us | 1.2x | 200 MB |",
    ]


def test_the_headline_counts_only_cells_with_all_compilers(tmp_path: Path):
    def measured(models: int) -> str:
        rows = [row("grc", 100.0, batch=1), row("eager", 5000.0, batch=1)]
        for name in ("dlrm", "din", "gr", "hstu")[:models]:
            times = {"grc": 100.0, "eager": 900.0, "compile": 400.0, "aoti": 250.0, "onnxruntime": None}
            rows += [row(engine, p50, model=name) for engine, p50 in times.items()]
        write(tmp_path / "cpu.jsonl", rows)
        return filled("<!-- begin: headline -->\n<!-- end: headline -->\n", tmp_path)

    assert NOT_MEASURED in measured(3)
    assert "| CPU, 2 threads, avx512 | fp32 | 4 | **2.5x** (2.50 to 2.5) | **9.0x** (9.00 to 9.0) |" in measured(4)


def test_the_page_is_filled_between_its_markers_only(tmp_path: Path):
    text = "before\n<!-- begin: cpu -->\nold\n<!-- end: cpu -->\nafter\n"
    assert NOT_MEASURED in filled(text, tmp_path)
    write(tmp_path / "cpu.jsonl", [row("grc", 100.0), row("eager", 250.0), row("aoti", None)])
    fresh = filled(text, tmp_path)
    assert fresh.startswith("before\n<!-- begin: cpu -->\n### CPU, 2 threads, avx512\n")
    assert fresh.endswith("<!-- end: cpu -->\nafter\n")
    assert "**2.50x** eager" in fresh
    assert "- aoti on dlrm, batch 64: it failed" in fresh
    assert "old" not in fresh
    assert filled(fresh, tmp_path) == fresh


def test_a_marker_that_nothing_fills_is_an_error(tmp_path: Path):
    with pytest.raises(KeyError, match="marker tpu"):
        filled("<!-- begin: tpu -->\n<!-- end: tpu -->\n", tmp_path)
