"""report.html: the manifest as one page for people, with nothing to fetch from elsewhere."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from grc.report.summary import batches, medians, microseconds, size, summarise

COLOURS = {"inductor": "#2f6f4f", "aoti": "#8fb3a3", "onnxruntime": "#3b6ea8", "eager": "#b98a3e", "model": "#a9a9a9"}
OTHER = "#7a5c94"
BAR = 420  # pixels of the slowest time of a batch
ROW = 22
HEIGHT = 160  # pixels of the frontier


def write_report(manifest: dict[str, Any], folder: Path) -> None:
    """Write report.html into an artifact's folder. The manifest needs no list of files yet."""
    (folder / "report.html").write_text(render(manifest), encoding="utf-8")


def render(manifest: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("grc.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summary = summarise(manifest)
    environment.filters |= {"size": size, "microseconds": microseconds}
    return environment.get_template("report.html.j2").render(
        manifest=manifest,
        summary=summary,
        charts=charts(manifest),
        totals=totals(manifest),
        row=ROW,
        frontier=frontier(summary["precision"]),
    )


def charts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """One bar chart for each measured batch, the fastest engine first."""
    times = medians(manifest)
    found = []
    for batch in batches(manifest):
        rows = sorted((time, engine) for (engine, b), time in times.items() if b == batch)
        slowest = rows[-1][0]
        bars = [
            {"engine": engine, "time": time, "width": BAR * time / slowest, "colour": COLOURS.get(engine, OTHER)}
            for time, engine in rows
        ]
        found.append({"batch": batch, "bars": bars})
    return found


AXES = {"bytes": "bytes", "work": "estimated work: elements × bits, as a share of float32's"}


def frontier(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Two plots for each limit of the budget: bytes of all tables and layers, or their estimated work for a row, to the right,
    the metric upwards."""
    if found is None:
        return []
    plots = []
    for limit, axis in product(found["budget"], AXES):
        name, _, bound = limit.partition("=")
        known = [point for point in found["frontier"] if point["quality"][name] is not None]
        values = [point["quality"][name] for point in known]
        most = max(point[axis] for point in known) or 1
        low, high = min(0.0, *values), max(float(bound), *values) * 1.1 or 1.0
        if name.startswith("topk-overlap"):
            low, high = min(float(bound), *values) - 0.01, 1.0

        def up(value: float, low: float = low, high: float = high) -> float:
            return HEIGHT - HEIGHT * (value - low) / (high - low)

        points = [
            {**point, "x": BAR * point[axis] / most, "y": up(value), "value": value, "told": told(axis, point[axis])}
            for point, value in zip(known, values, strict=True)
        ]
        title, end = f"{name} against {AXES[axis]}", told(axis, most)
        plots.append(
            {
                "name": name,
                "title": title,
                "end": end,
                "bound": float(bound),
                "line": up(float(bound)),
                "points": points,
            }
        )
    return plots


def told(axis: str, value: float) -> str:
    return size(int(value)) if axis == "bytes" else f"{value:.0%}"


def totals(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of all parameters, of the tables alone, and floating-point operations for one row."""
    layers = manifest["layers"]
    return {
        "bytes": sum(layer["bytes"] for layer in layers),
        "tables": sum(layer["bytes"] for layer in layers if layer["kind"] == "table"),
        "flops": sum(layer["flops"] for layer in layers),
    }
