"""Rows: one JSON object for each engine at each batch size, the only source of tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grc.bench.subject import BenchError
from grc.runtime.values import json_of

Row = dict[str, Any]
NUMBER, TEXT, MAYBE = (int, float), (str,), (int, float, type(None))

FIELDS: dict[str, tuple[type, ...]] = {
    "model": TEXT,
    "device": TEXT,
    "precision": TEXT,
    "batch": (int,),
    "ids": TEXT,  # "uniform" or "zipf"
    "engine": TEXT,  # "grc" or the peer's name
    "form": TEXT,  # the settings that won, or the engine inside of the artifact
    "p50_us": MAYBE,  # on CUDA by events; None where the engine failed or answers wrongly
    "p99_us": MAYBE,
    "min_us": MAYBE,
    "spread": MAYBE,  # the middle half's width over the median
    "calls": (int,),
    "wall_p50_us": MAYBE,  # CUDA only: from pinned host input to pinned host output
    "wall_p99_us": MAYBE,
    "max_error": MAYBE,  # against the fp64 oracle, relative to the largest answer or to 1
    "overlap100": MAYBE,
    "refused": (str, type(None)),  # why there is no time
    "build_s": MAYBE,
    "load_s": MAYBE,
    "bytes": (int, type(None)),
    "pool": (int,),  # how many different requests went round
    "allocator": TEXT,
    "machine": TEXT,
    "versions": (dict,),
    "date": TEXT,
    "command": TEXT,
}
CELL = ("model", "device", "precision", "batch", "ids", "machine")  # what engines are compared in, all of one run


def check(row: Row) -> Row:
    """The row, if it has the fields of a row and no time beside a fault. Raises BenchError."""
    wrong = [name for name, types in FIELDS.items() if name not in row or not isinstance(row[name], types)]
    wrong += [name for name in row if name not in FIELDS]
    if wrong:
        raise BenchError(f"the row has no valid {wrong[0]}", "write rows with grc bench --output")
    if (row["p50_us"] is None) is (row["refused"] is None):
        raise BenchError("a row has either a time or the reason why there is none", "measure again")
    return row


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. Raises BenchError for a line that is no row."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(check(json_of(line)))
        except (ValueError, BenchError) as error:
            raise BenchError(f"{path.name}:{number} is no row: {error}", "remove the line") from error
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add the rows of a run to a file. They take the place of all rows for the same model, batch, ids and machine: times of
    another run are not compared with theirs."""
    fresh = [check(row) for row in rows]
    measured = {cell(row) for row in fresh}
    kept = [row for row in read(path) if cell(row) not in measured] + fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)


def cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)
