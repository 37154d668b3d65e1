"""The closing tables of compile and explain, in plain text so that they can be copied, searched and piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from grc.cli.errors import say
from grc.report.summary import MODEL, microseconds, size

MOST = 48  # characters of a source line that are shown


def put(text: str = "") -> None:
    """Data, on stdout."""
    sys.stdout.write(text + "\n")


def put_json(value: Any) -> None:
    put(json.dumps(value, indent=1))


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> Iterable[str]:
    """Rows in columns of equal width; the last column is as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        yield (indent + "  ".join([*cells, row[-1]])).rstrip()


def show_changes(summary: dict[str, Any]) -> None:
    """What fused, what missed and why, what was rolled back; a section that is empty is left out."""
    sections = [
        ("fused", ("where", "saves"), [(name(c), place(c), c["saves"]) for c in summary["fused"]]),
        ("missed", ("where", "why"), [(name(c), place(c), c["missed"]) for c in summary["missed"]]),
        ("rolled back", ("", "why"), [(r["pass"], "", r["why"]) for r in summary["rolled_back"]]),
    ]
    rows: list[tuple[str, ...]] = []
    for title, heads, entries in sections:
        if entries:
            rows += [("", "", ""), (title, *heads), *entries]
    for line in table(rows):
        put(line)


def show_precision(summary: dict[str, Any]) -> None:
    """What stayed higher than the smallest format that there is for it, what that alone would cost and why; the frontier of
    quality against bytes and estimated work; and what was measured beside the model in float32."""
    found = summary["precision"]
    if found is None:
        return
    rows: list[tuple[str, ...]] = []
    if found["higher"]:
        rows += [("", "", "", ""), ("kept higher", "as", "alone", "why")]
        rows += [(site["name"], site["format"], alone(site), site["reason"]) for site in found["higher"]]
    for line in table(rows):
        put(line)
    if others := summary["others"]:
        count = f"{len(others)} other parameter{'s' if len(others) > 1 else ''} of 1 KB and more"
        put(f"  kept as they are: {count}, {size(sum(o['bytes'] for o in others))}; grc inspect has why")
    put()
    heads = [limit.partition("=")[0] for limit in found["budget"]]
    points = [("bytes", "est. work", *heads, "")]
    for point in found["frontier"]:
        values = ["NaN" if (value := point["quality"][name]) is None else f"{value:.2g}" for name in heads]
        mark = "chosen" if point["chosen"] else "" if point["inside"] else f"outside of {', '.join(found['budget'])}"
        points.append((size(point["bytes"]), f"{point['work']:.0%}", *values, mark))
    for line in [*table(points), "", *table(list(time_rows(summary["times"])))]:
        put(line)
    for note in found["notes"]:
        say(f"note: {note}")


def time_rows(times: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """A row for each batch: what answers, and the model itself."""
    float32: dict[int, float] = next((row["p50_us"] for row in times if row["engine"] == MODEL), {})
    yield ("measured", "", "", "float32, eager")
    for batch, engine, median in sorted((b, row["engine"], row["p50_us"][b]) for row in times for b in row["answers"]):
        yield (f"batch {batch}", engine, microseconds(median), microseconds(float32[batch]) if batch in float32 else "")


def alone(site: dict[str, Any]) -> str:
    """What a site costs by itself in its smallest format, where that was tried."""
    return "" if site["loss"] is None else f"{site['loss']:.0%} of the budget"


def name(change: dict[str, Any]) -> str:
    return change["what"] + (f" x{change['count']}" if change["count"] > 1 else "")


def place(change: dict[str, Any]) -> str:
    source = change["source"]
    return f"{change['where']}  {source if len(source) <= MOST else source[: MOST - 1] + '…'}"


def show_closing(summary: dict[str, Any], path: str, count: int) -> None:
    """The last lines: name, size, speed and error, then what to try next."""
    speed = summary["speed"] or {}
    times = [
        f"{speed[k]:.1f}x {title}" for k, title in (("eager", "eager"), ("aotinductor", "AOTInductor")) if k in speed
    ]
    how = f"{', '.join(times)} at batch {speed['batch']}" if times else "speed not measured"
    put()
    put(f"  {path}   {size(count)}   {how}   largest error {summary['error']:.1e}")
    for note in summary["notes"]:
        say(f"note: {note}")
    for engine, reason in summary["rejected"].items():
        say(f"note: without {engine}: {reason}")
    put(f"  try: grc run {path} --example")
    for step in summary["next"]:
        put(f"       {step}")


def engine_lines(summary: dict[str, Any]) -> list[str]:
    return [f"batch {e['batch']}: {e['engine']} {microseconds(e['p50_us'])}" for e in summary["engines"]]


def timing_lines(records: Iterable[tuple[str, int, float, float]]) -> list[str]:
    """One line a pass: changes, seconds of the pass, seconds of its proof."""
    rows = [("pass", "changes", "pass s", "proof s")]
    rows += [(pass_name, str(made), f"{seconds:.3f}", f"{proof:.3f}") for pass_name, made, seconds, proof in records]
    return list(table(rows))
