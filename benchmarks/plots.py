"""Draw docs/performance-*.svg and the tables of README.md, docs/performance.md and docs/serving.md from
benchmarks/results/*.jsonl.

    python -m benchmarks.plots [--check]

`--check` writes nothing and fails when a document does not say what the rows say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from grc.bench.plot import plot_ratios, plot_times
from grc.bench.rows import Row, read
from grc.bench.table import cells, geometric_mean, markdown_table, time_of
from grc.report.summary import microseconds, size

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
SERVING = ROOT / "docs" / "serving.md"
README = ROOT / "README.md"
NOT_MEASURED = "Not measured yet."
COMPILERS = {"cpu": {"compile", "aoti", "onnxruntime"}, "gpu": {"compile", "aoti"}}
MOST = 4  # of the zoo's seven models
SHOWN = 6  # kernels of a replay
DRAWN = 5  # cells of a machine from which on its ratios are drawn
BLOCK = re.compile(r"(<!-- begin: ([\w-]+) -->\n).*?(<!-- end: \2 -->)", re.S)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the document with the rows")
    options = parser.parse_args()
    for document in (README, DOCUMENT, SERVING):
        text = document.read_text()
        fresh = filled(text, RESULTS)
        if options.check and fresh != text:
            sys.stderr.write(f"error: {document.name} is not what the rows say\nhint: python -m benchmarks.plots\n")
            return 1
        if not options.check:
            document.write_text(fresh)
    if options.check:
        return 0
    for name in measured(RESULTS):
        draw(name, read(RESULTS / f"{name}.jsonl"))
    return 0


def filled(text: str, results: Path) -> str:
    """The document with everything between its markers written anew. Raises KeyError for an unknown marker."""
    return BLOCK.sub(lambda match: match[1] + block(match[2], results) + "\n" + match[3], text)


def block(name: str, results: Path) -> str:
    if name == "headline":
        return headline(results)
    if name == "overhead":
        return overhead(results / "overhead.jsonl")
    if name == "precision":
        return precision(results / "precision.jsonl")
    if name == "serving":
        return serving(results / "serving.jsonl")
    if name in FIGURES:
        return figures(results / f"{name}.jsonl", FIGURES[name])
    if name not in ("cpu", "gpu"):
        raise KeyError(f"a document has a marker {name}, which nothing fills")
    rows = read(results / f"{name}.jsonl")
    return section(name, rows) if rows else NOT_MEASURED


def headline(results: Path) -> str:
    """How many times faster grc is, over the cells in which every general compiler was measured too, on each machine that
    has such cells of most models."""
    lines = [
        "| machine | precision | cells | over the best of its peers | over eager PyTorch |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name in reversed(measured(results)):
        whole = [
            cell
            for cell in cells(read(results / f"{name}.jsonl"))
            if cell.ratio is not None and COMPILERS[name] <= {row["engine"] for row in cell.rows}
        ]
        for machine, precision in sorted({(cell.machine, cell.precision) for cell in whole}):
            own = [cell for cell in whole if (cell.machine, cell.precision) == (machine, precision)]
            if len({cell.model for cell in own}) < MOST:
                continue
            best = [cell.ratio for cell in own if cell.ratio is not None]
            eager = [ratio for cell in own if (ratio := cell.over(cell.row("eager"))) is not None]
            less = f" of {len(eager)} cells" if len(eager) < len(own) else ""
            lines.append(f"| {machine} | {precision} | {len(own)} | {spread(best)} | {spread(eager)}{less} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_MEASURED


def spread(ratios: list[float]) -> str:
    """The geometric mean, and the least and the most."""
    return f"**{geometric_mean(ratios):.1f}x** ({min(ratios):.2f} to {max(ratios):.1f})" if ratios else "-"


def section(name: str, rows: list[Row]) -> str:
    """A table for each machine, with where, when and how it was measured."""
    parts = []
    for machine in sorted({row["machine"] for row in rows}):
        own = [row for row in rows if row["machine"] == machine]
        found = [cell for cell in cells(own) if cell.ratio is not None]
        means = [
            f"**{geometric_mean(ratios):.2f}x** over {len(ratios)} cells of {precision}"
            for precision in sorted({cell.precision for cell in found})
            if (ratios := [cell.ratio for cell in found if cell.precision == precision and cell.ratio is not None])
        ]
        versions = sorted({f"{k} {v}" for row in own for k, v in row["versions"].items()})
        dates = sorted({row["date"] for row in own})
        mean = f" Geometric mean of the ratios: {', '.join(means)}." if means else ""
        memory = " and ".join(sorted({row["allocator"] for row in own}))
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        parts.append(f"### {machine}\n\n{when}; {', '.join(versions)}; {memory}.{mean}\n\n{markdown_table(own)}")
        refused = [row for row in own if time_of(row) is None]
        if refused:
            parts.append(
                "\n".join(f"- {r['engine']} on {r['model']}, batch {r['batch']}: {r['refused']}" for r in refused)
            )
        commands = sorted({row["command"] for row in own})
        parts.append("```\n" + "\n".join(commands) + "\n```")
        if len(found) >= DRAWN:
            parts.append(f"![Ratios of medians]({ratios_of(name, machine)})")
    main = widest(rows)
    own = [row for row in rows if row["machine"] == main]
    parts.append(f"Times on {main}:")
    parts += [f"![Times of {model}]({times_of(name, model)})" for model in sorted({row["model"] for row in own})]
    return "\n\n".join(parts)


def widest(rows: list[Row]) -> str:
    """The machine that was measured most."""
    found = [cell.machine for cell in cells(rows)]
    return max(sorted(set(found)), key=found.count)


def ratios_of(name: str, machine: str) -> str:
    return f"performance-{name}-ratios-{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.svg"


def times_of(name: str, model: str) -> str:
    return f"performance-{name}-{model}.svg"


# The columns of the pages' smaller tables, by the key of a row.
FIGURES = {
    "cpu-kernels": {
        "op": "op", "rows": "rows", "batch": "batch", "hand_us": "by hand, us", "us": "grc's kernel, us",
        "ratio": "kernel / hand", "goal": "goal",
    },
    "gpu-builds": {
        "model": "model", "batch": "batch", "fastest": "fastest", "us": "us", "others": "grc's other candidates, us",
        "aoti": "plain AOTInductor, us", "eager": "eager, us", "ratio": "AOTInductor / fastest",
    },
    "gpu-call": {
        "batch": "batch", "copies": "copies by", "kernels": "kernels", "graph": "with copies", "replay": "launched and awaited",
        "fill": "fill", "check": "check", "call": "call", "over": "call - kernels",
    },
    "gpu-kernels": {
        "op": "op", "dtype": "rows", "batch": "batch", "us": "us", "GBps": "GB/s", "of_copy": "of copy bandwidth",
        "torch_us": "plain torch, us", "error": "error",
    },
    "gpu-profile": {
        "model": "model", "batch": "batch", "engine": "engine", "launches": "kernels", "span": "first to last, us",
        "busy": "any runs, us", "kernels": "where it goes, us",
    },
    "gpu-stress": {
        "model": "model", "threads": "threads", "streams": "streams", "replays": "replays", "different": "differ",
        "failed": "failed", "loads": "loads", "load_median_s": "s a load", "device_growth_bytes": "bytes more after all",
    },
    "gpu-streams": {"batch": "batch", "streams": "streams", "threads": "threads", "requests_per_s": "requests a second"},
}  # fmt: skip


def figures(file: Path, columns: dict[str, str]) -> str:
    """A table for each place of a file, below where, when and how it was measured."""
    if not file.exists():
        return NOT_MEASURED
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    places = [f"{row['machine']}; {row['versions']}; {row['date']}; `{row['command']}`" for row in rows]
    parts = []
    for place in sorted(set(places)):
        own = [row for row, where in zip(rows, places, strict=True) if where == place]
        own = beside_plain(own) if "fastest" in columns else own
        number = {key for key in columns if all(isinstance(row[key], (int, float)) for row in own)}
        if "launches" in columns:
            own = [{**row, "kernels": longest(row["kernels"])} for row in own]
        lines = [
            place,
            "",
            "| " + " | ".join(columns.values()) + " |",
            "| " + " | ".join("---:" if key in number else "---" for key in columns) + " |",
        ]
        parts.append("\n".join(lines + ["| " + " | ".join(shown(row[key]) for key in columns) + " |" for row in own]))
    return "\n\n".join(parts)


def longest(kernels: list[Row]) -> str:
    """The kernels of a replay that take most of it, in words."""
    rest = kernels[SHOWN:]
    names = [f"{k['count']} {short(k['name'])} {k['us']:.1f}" for k in kernels[:SHOWN]]
    return ", ".join(names + ([f"{len(rest)} others {sum(k['us'] for k in rest):.1f}"] if rest else []))


def short(name: str) -> str:
    """A kernel's name without its namespaces, arguments and templates."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1][:48]


def beside_plain(rows: list[Row]) -> list[Row]:
    """For each model and batch the fastest candidate of a build, its others, and the two that are not grc's."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["model"], row["batch"]), {})[row["engine"]] = row["p50_us"]
    lines = []
    for (model, batch), times in sorted(found.items()):
        ours = {name: us for name, us in times.items() if name.startswith("inductor")}
        best = min(ours, key=ours.__getitem__)
        others = ", ".join(f"{name} {us:.1f}" for name, us in sorted(ours.items()) if name != best)
        lines.append(
            {"model": model, "batch": batch, "fastest": best, "us": ours[best], "others": others, "aoti": times["aoti"],
             "eager": times["eager"], "ratio": f"{times['aoti'] / ours[best]:.2f}x"}
        )  # fmt: skip
    return lines


def shown(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 10
        else f"{value:.1f}"
        if isinstance(value, float)
        else str(value)
    )


def overhead(file: Path) -> str:
    if not file.exists():
        return NOT_MEASURED
    lines = ["| figure | engine | value | goal | machine | date |", "| --- | --- | ---: | ---: | --- | --- |"]
    for line in file.read_text().splitlines():
        row = json.loads(line)
        what = row["figure"] + (f", {row['model']} at batch {row['batch']}" if "model" in row else "")
        cells_ = [
            what,
            row["engine"],
            f"{row['value']:g} {row['unit']}",
            f"{row['goal']:g}",
            row["machine"],
            row["date"],
        ]
        lines.append("| " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def precision(file: Path) -> str:
    """A table for each machine and ISA: times, bytes and quality of every model by precision."""
    if not file.exists():
        return NOT_MEASURED
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    parts = []
    for machine, isa in sorted({(row["machine"], row["isa"]) for row in rows}):
        own = [row for row in rows if (row["machine"], row["isa"]) == (machine, isa)]
        dates = " to ".join(dict.fromkeys((min(r["date"] for r in own), max(r["date"] for r in own))))
        lines = [
            f"### {machine}, kernels for {isa}\n\n{dates}, budget {', '.join(own[0]['budget'])}.\n",
            "| model | precision | times by batch | weights | kept in | quality |",
            "| --- | --- | --- | ---: | --- | --- |",
        ]
        for model, form in dict.fromkeys((row["model"], row["precision"]) for row in own):
            some = [row for row in own if (row["model"], row["precision"]) == (model, form)]
            times = ", ".join(f"{row['batch']}: {microseconds(row['p50_us'])}" for row in some)
            kept = ", ".join(f"{name} {count}" for name, count in some[0]["formats"].items() if count)
            quality = ", ".join(f"{name} {value:.2g}" for name, value in some[0]["quality"].items())
            lines.append(
                f"| {model} | {form} | {times} | {size(some[0]['weight_bytes'])} | {kept or '-'} | {quality or '-'} |"
            )
        commands = sorted({row["command"] for row in own})
        parts.append("\n".join(lines) + "\n\n```\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts)


def serving(file: Path) -> str:
    """A table for each machine and model: servers beside each other at each encoding and number of clients."""
    if not file.exists():
        return NOT_MEASURED
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    parts = []
    for machine, model in sorted({(row["machine"], row["model"]) for row in rows}):
        own = [row for row in rows if (row["machine"], row["model"]) == (machine, model)]
        versions = sorted({f"{k} {v}" for row in own for k, v in row["versions"].items()})
        dates = " to ".join(sorted({row["date"] for row in own}))
        engines = ", then ".join(own[0]["engines"])
        lines = [
            "| encoding | clients | server | p50 | p99 | requests/s | CPU a request | p99, worst / best turn | memory |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in sorted(own, key=lambda r: (r["encoding"], r["clients"], r["server"] != "own", r["server"])):
            lines.append(
                f"| {row['encoding']} | {row['clients']} | {row['server']} | {row['p50_us'] / 1e3:.2f} ms "
                f"| {row['p99_us'] / 1e3:.2f} ms | {row['requests_s']:.0f} | {row['cpu_us']:.0f} us "
                f"| {row['spread_p99']:.1f}x | {row['memory_bytes'] / 1e6:.0f} MB |"
            )
        commands = "\n".join(sorted({row["command"] for row in own}))
        parts.append(
            f"### {model}, {machine}\n\n{dates}; {', '.join(versions)}; engine inside: {engines}.\n\n"
            + "\n".join(lines)
            + f"\n\n```\n{commands}\n```"
        )
    return "\n\n".join(parts)


def measured(results: Path) -> list[str]:
    return [name for name in ("cpu", "gpu") if read(results / f"{name}.jsonl")]


def draw(name: str, rows: list[Row]) -> None:
    """The plots that the page shows, and no older ones."""
    for old in DOCUMENT.parent.glob(f"performance-{name}-*.svg"):
        old.unlink()
    for machine in sorted({row["machine"] for row in rows}):
        own = [row for row in rows if row["machine"] == machine]
        if sum(cell.ratio is not None for cell in cells(own)) >= DRAWN:
            plot_ratios(own, DOCUMENT.parent / ratios_of(name, machine))
    main = widest(rows)
    own = [row for row in rows if row["machine"] == main and time_of(row) is not None]
    for model in sorted({row["model"] for row in own}):
        plot_times([row for row in own if row["model"] == model], DOCUMENT.parent / times_of(name, model))


if __name__ == "__main__":
    sys.exit(main())
