"""Rows as the file keeps them: checked, and of each cell those of one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grc.bench.rows import FIELDS, check, read, write
from grc.bench.subject import BenchError

from .rows import row


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    rows = [row("grc", 10.0), row("eager", 20.5), row("aoti", None)]
    write(tmp_path / "new" / "rows.jsonl", rows)
    assert read(tmp_path / "new" / "rows.jsonl") == rows


def test_a_newer_run_takes_the_place_of_the_older_one_and_of_all_its_peers(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    write(file, [row("grc", 10.0), row("eager", 20.0)])
    write(file, [row("grc", 7.0, batch=1), row("grc", 6.0, machine="another")])
    write(file, [row("grc", 5.0), row("aoti", 9.0)])
    assert [(r["engine"], r["batch"], r["p50_us"]) for r in read(file)] == [
        ("grc", 1, 7.0),
        ("grc", 64, 6.0),
        ("grc", 64, 5.0),
        ("aoti", 64, 9.0),
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_has_every_field(name: str):
    lacking = {key: value for key, value in row("grc", 1.0).items() if key != name}
    with pytest.raises(BenchError, match=f"no valid {name}"):
        check(lacking)


@pytest.mark.parametrize("change", [{"batch": "64"}, {"p50_us": "fast"}, {"versions": None}, {"extra": 1}])
def test_a_field_of_another_kind_is_refused(change: dict[str, object]):
    with pytest.raises(BenchError, match=f"no valid {next(iter(change))}"):
        check(row("grc", 1.0, **change))


def test_a_wrong_answer_has_no_speed_in_a_file():
    with pytest.raises(BenchError, match="either a time or the reason"):
        check(row("eager", 1.0, refused="error 1e-1"))
    with pytest.raises(BenchError, match="either a time or the reason"):
        check(row("eager", None, refused=None))


def test_a_broken_line_is_named(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("grc", 1.0)) + "\n{}\n")
    with pytest.raises(BenchError, match=r"rows\.jsonl:2 is no row"):
        read(file)
    file.write_text(json.dumps(row("grc", 1.0)) + "\n{]\n")
    told = r"rows\.jsonl:2 is no row: Expecting property name enclosed in double quotes at column 2$"
    with pytest.raises(BenchError, match=told):
        read(file)
