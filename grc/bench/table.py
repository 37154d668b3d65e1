"""Tables: rows as text for a terminal and as Markdown for the documentation, with ratios of medians."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grc.bench.rows import CELL, Row

HEAD = ("batch", "engine", "form", "p50", "min", "p99", "spread", "error", "top-100", "grc is")


@dataclass(frozen=True)
class Cell:
    """All engines on one model at one batch size with one kind of ids, grc first, then by time."""

    model: str
    device: str
    precision: str
    batch: int
    ids: str
    machine: str
    rows: tuple[Row, ...]

    def row(self, engine: str) -> Row | None:
        """The engine's row, where it has a time."""
        return next((row for row in self.rows if row["engine"] == engine and time_of(row) is not None), None)

    @property
    def grc(self) -> Row | None:
        return self.row("grc")

    @property
    def best_peer(self) -> Row | None:
        peers = [row for row in self.rows if row["engine"] != "grc" and time_of(row) is not None]
        return min(peers, key=lambda row: row["p50_us"]) if peers else None

    @property
    def ratio(self) -> float | None:
        """The best peer's median over grc's: above 1 grc is faster. None where either has no time."""
        return self.over(self.best_peer)

    @property
    def wall(self) -> tuple[str, float] | None:
        """On a GPU: the best peer from the host's memory to the host's memory, and its median over grc's."""
        timed = [row for row in self.rows if row["wall_p50_us"] is not None and time_of(row) is not None]
        peers = [row for row in timed if row["engine"] != "grc"]
        if not peers or self.grc is None or self.grc["wall_p50_us"] is None:
            return None
        best = min(peers, key=lambda row: row["wall_p50_us"])
        return best["engine"], best["wall_p50_us"] / self.grc["wall_p50_us"]

    def over(self, peer: Row | None) -> float | None:
        return None if peer is None or self.grc is None else peer["p50_us"] / self.grc["p50_us"]


def time_of(row: Row) -> float | None:
    """A wrong answer has no time, whatever the row says."""
    return None if row["refused"] is not None else row["p50_us"]


def cells(rows: Iterable[Row]) -> list[Cell]:
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        place = tuple(row[name] for name in CELL)
        grouped.setdefault(place, []).append(row)
    found = []
    for place, group in grouped.items():
        ordered = sorted(group, key=lambda row: (row["engine"] != "grc", time_of(row) or math.inf))
        found.append(Cell(rows=tuple(ordered), **dict(zip(CELL, place, strict=True))))
    return sorted(found, key=lambda c: (c.machine, c.device, c.model, c.precision, c.ids, c.batch))


def geometric_mean(ratios: Sequence[float]) -> float:
    """Raises ValueError for no ratios."""
    if not ratios:
        raise ValueError("there are no ratios to average")
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def text_table(rows: Sequence[Row]) -> str:
    """The rows of one or more runs for a terminal, and what they come to in one line for each batch."""
    lines: list[str] = []
    machine = title = None
    for cell in cells(rows):
        if cell.machine != machine:
            machine, title = cell.machine, None
            lines += [*([""] if lines else []), machine]
        if (cell.model, cell.ids, cell.precision) != title:
            title = (cell.model, cell.ids, cell.precision)
            lines += ["", f"{cell.model} {cell.precision}, {cell.ids} ids"]
            lines += aligned([HEAD, *(line for c in cells(rows) if same_title(c, cell) for line in table_lines(c))])
        lines += refusals(cell)
        lines.append(summary(cell))
    return "\n".join(lines)


def same_title(a: Cell, b: Cell) -> bool:
    return (a.model, a.device, a.precision, a.ids, a.machine) == (b.model, b.device, b.precision, b.ids, b.machine)


def table_lines(cell: Cell) -> list[tuple[str, ...]]:
    lines = []
    for row in cell.rows:
        if time_of(row) is None:
            timing = ["-", "-", "-", "-"]
        else:
            timing = [*(duration(row[name]) for name in ("p50_us", "min_us", "p99_us")), f"{row['spread']:.0%}"]
        ratio = cell.over(row) if time_of(row) is not None and row["engine"] != "grc" else None
        lines.append(
            (
                str(cell.batch),
                row["engine"],
                short(row["form"]),
                *timing,
                "-" if row["max_error"] is None else f"{row['max_error']:.1e}",
                "-" if row["overlap100"] is None else f"{row['overlap100']:.3f}",
                "" if ratio is None else f"{ratio:.2f}x",
            )
        )
    return lines


def refusals(cell: Cell) -> list[str]:
    return [f"batch {cell.batch}: {row['engine']} has no time: {row['refused']}" for row in cell.rows if row["refused"]]


def summary(cell: Cell) -> str:
    if cell.grc is None or cell.best_peer is None or cell.ratio is None:
        return f"batch {cell.batch}: nothing to compare"
    wall = f", and {cell.wall[1]:.2f}x {cell.wall[0]} from host to host" if cell.wall else ""
    return f"batch {cell.batch}: grc is {cell.ratio:.2f}x its best peer, {cell.best_peer['engine']}{wall}"


def short(form: str) -> str:
    return form.partition(" (")[0]


def aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = {1, 2}
    return [
        "  ".join(
            v.ljust(w) if i in left else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """One line for each model, batch and kind of ids: grc, every peer, and the ratio of medians to the best of them."""
    found = cells(rows)
    peers = [name for name in ("eager", "compile", "aoti", "onnxruntime") if any(row["engine"] == name for row in rows)]
    walls = any(cell.wall for cell in found)
    wall = ["grc wall", "wall, grc / best peer"] if walls else []
    head = ["model", "ids", "batch", "grc", "spread", *peers, "grc / best peer", *wall, "error", "top-100"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for cell in found:
        by_name = {row["engine"]: row for row in cell.rows}
        own = by_name.get("grc")
        lines.append(
            [
                f"{cell.model} {cell.precision}",
                cell.ids,
                str(cell.batch),
                shown(own),
                "" if own is None or time_of(own) is None else f"{own['spread']:.0%}",
                *(shown(by_name.get(name)) for name in peers),
                ""
                if cell.ratio is None
                else f"**{cell.ratio:.2f}x** {cell.best_peer['engine'] if cell.best_peer else ''}",
                *(host_to_host(cell) if walls else ()),
                "" if own is None or own["max_error"] is None else f"{own['max_error']:.1e}",
                "" if own is None or own["overlap100"] is None else f"{own['overlap100']:.3f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def host_to_host(cell: Cell) -> tuple[str, str]:
    if cell.wall is None or cell.grc is None:
        return "", ""
    return duration(cell.grc["wall_p50_us"]), f"{cell.wall[1]:.2f}x {cell.wall[0]}"


def shown(row: Row | None) -> str:
    if row is None:
        return ""
    return "wrong or failed" if time_of(row) is None else duration(row["p50_us"])


def duration(microseconds: float) -> str:
    """Three digits: `63.1 us`, `2.80 ms`, `1.21 s`."""
    for unit, size in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        value = float(f"{microseconds / size:.2e}")
        if value < 1000 or unit == "s":
            return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 0.01))))}f} {unit}"
    raise AssertionError("seconds take any value")
