"""Plots: medians by engine and batch, and ratios to the best peer, drawn from rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grc.bench.rows import Row
from grc.bench.subject import BenchError
from grc.bench.table import Cell, cells, geometric_mean, time_of

COLOURS = {"grc": "#c2410c", "eager": "#a8a29e", "compile": "#60a5fa", "aoti": "#1d4ed8", "onnxruntime": "#059669"}
FORMATS = (".svg", ".png")


def plot_times(rows: Sequence[Row], path: Path) -> None:
    """A bar for each engine at each batch, in microseconds on a log scale; whiskers from the least to the p99.

    Raises BenchError when no engine has a time, the file is neither .svg nor .png, or matplotlib is missing.
    """
    found = [cell for cell in cells(rows) if any(time_of(row) is not None for row in cell.rows)]
    if not found:
        raise BenchError("no engine has a time to plot", "see the reasons that grc bench prints")
    pyplot = drawing(path)
    engines = [name for name in COLOURS if any(row["engine"] == name for cell in found for row in cell.rows)]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.6 * len(found)), 4.0), layout="constrained")
    width = 0.8 / len(engines)
    for number, name in enumerate(engines):
        timed = [
            (x, row) for x, cell in enumerate(found) for row in cell.rows if row["engine"] == name and time_of(row)
        ]
        places = [x + (number - (len(engines) - 1) / 2) * width for x, _ in timed]
        medians = [row["p50_us"] for _, row in timed]
        below = [max(row["p50_us"] - row["min_us"], 0.0) for _, row in timed]
        above = [max(row["p99_us"] - row["p50_us"], 0.0) for _, row in timed]
        axes.bar(places, medians, width, yerr=[below, above], label=name, color=COLOURS[name], ecolor="#44403c")
    axes.set_yscale("log")
    axes.set_ylabel("us a call: median, least to 99th percentile")
    axes.set_xticks(range(len(found)), [label(cell) for cell in found])
    axes.set_title(found[0].machine, fontsize=9)
    axes.legend(frameon=False, ncols=len(engines), fontsize=8)
    save(figure, pyplot, path)


def plot_ratios(rows: Sequence[Row], path: Path) -> None:
    """How many times faster grc is than its best peer, a bar a cell. Raises BenchError as `plot_times` does."""
    found = [cell for cell in cells(rows) if cell.ratio is not None]
    if not found:
        raise BenchError("no cell has both grc and a peer", "measure with grc bench --against eager,onnxruntime")
    pyplot = drawing(path)
    ratios = [cell.ratio for cell in found if cell.ratio is not None]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.45 * len(found)), 3.6), layout="constrained")
    colours = [COLOURS[cell.best_peer["engine"]] if cell.best_peer else "black" for cell in found]
    axes.bar(range(len(found)), ratios, color=colours)
    axes.axhline(1.0, color="#44403c", linewidth=0.8)
    axes.axhline(geometric_mean(ratios), color=COLOURS["grc"], linewidth=0.8, linestyle="--")
    axes.set_ylabel("best peer's median / grc's median")
    axes.set_xticks(
        range(len(found)), [f"{c.model} {c.precision} {c.ids[0]}{c.batch}" for c in found], rotation=70, fontsize=7
    )
    shown = sorted({cell.best_peer["engine"] for cell in found if cell.best_peer})
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in shown]
    axes.legend(handles, [f"best peer: {name}" for name in shown], frameon=False, fontsize=7)
    axes.set_title(f"{found[0].machine}; dashed: geometric mean {geometric_mean(ratios):.2f}", fontsize=8)
    save(figure, pyplot, path)


def label(cell: Cell) -> str:
    return f"{cell.model} {cell.precision}\n{cell.ids}\nbatch {cell.batch}"


def drawing(path: Path) -> Any:
    if path.suffix not in FORMATS:
        raise BenchError(f"{path.name} is neither {' nor '.join(FORMATS)}", "name the plot plot.svg")
    try:
        import matplotlib
    except ImportError:
        raise BenchError("matplotlib is not installed", "pip install 'grc-compiler[plot]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "grc"  # the same rows draw the same file
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, pyplot: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
