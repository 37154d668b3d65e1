"""Measure the zoo on this CPU with `grc bench`, hold the ratios against their goals, and keep the rows.

    python -m benchmarks.cpu [--only dlrm,din] [--small] [--threads N] [--seconds S] [--against eager,compile,...]

Each model runs in a process of its own, so that one that runs out of memory costs no other its rows. Rows go to
benchmarks/results/cpu.jsonl, where they replace those of the same model, batch, ids and machine. `--small` runs
the small sizes at small batches as a check of the machinery: it keeps nothing, and holds nothing against the goals.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grc.bench.peers import PEERS
from grc.bench.rows import Row, read, write
from grc.bench.table import Cell, cells, geometric_mean, text_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
ZOO = ROOT / "examples" / "zoo"

# Ratio of medians to the best peer of the same precision, fp32, by batch.
GOALS: dict[str, dict[int, float]] = {
    "dlrm": {1: 2.5, 64: 1.7, 1024: 1.9},
    "dcnv2": {1: 1.6, 64: 1.2, 1024: 1.0},
    "deepfm": {1: 1.7, 64: 1.6, 1024: 1.4},
    "din": {1: 2.1, 64: 2.0, 1024: 2.3},
    "sasrec": {1: 1.6, 64: 1.7, 1024: 2.0},
    "hstu": {1: 2.3, 64: 1.6, 1024: 2.2},
    "gr": {1: 1.0, 8: 1.4, 64: 1.3},
}
GEOMETRIC_MEAN = 1.6
FLOOR = 1.0


def main() -> int:
    options = arguments()
    names = options.only.split(",") if options.only else list(GOALS)
    unknown = [name for name in names if name not in GOALS]
    if unknown:
        sys.stderr.write(f"error: there is no zoo model {unknown[0]}\nhint: choose from {', '.join(GOALS)}\n")
        return 2
    failed: list[str] = []
    rows: list[Row] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            sys.stderr.write(f"{name}\n")
            run = subprocess.run(
                command(name, file, options), cwd=ROOT, env=environment(options), stdout=subprocess.DEVNULL
            )
            if run.returncode:
                killed = " (killed: out of memory?)" if run.returncode == -signal.SIGKILL else ""
                failed.append(f"{name}: the run failed with exit code {run.returncode}{killed}")
                continue
            rows += read(file)
            if not options.small:
                write(RESULTS, read(file))
    if rows:
        print(text_table(rows))
    if rows and not options.small:
        print("\n".join(["", *against_goals(cells(rows))]))
    for fault in failed:
        print(fault)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME,...", help="these models instead of the whole zoo")
    parser.add_argument("--small", action="store_true", help="small sizes, to check that everything runs")
    parser.add_argument("--threads", type=int, metavar="N", default=os.cpu_count())
    parser.add_argument("--seconds", type=float, metavar="S", help="recorded calls of each engine at each batch")
    parser.add_argument("--against", default=",".join(PEERS), metavar="PEER,...")
    return parser.parse_args()


def command(name: str, output: Path, options: argparse.Namespace) -> list[str]:
    batches = (1, 16) if options.small else tuple(GOALS[name])
    seconds = options.seconds or (0.2 if options.small else 3.0)
    ids = "uniform" if name == "gr" or options.small else "uniform,zipf"  # gr reads no ids
    return [
        *(sys.executable, "-m", "grc", "bench", str((ZOO / f"{name}.py").relative_to(ROOT))),
        *("--batches", ",".join(map(str, batches)), "--threads", str(options.threads), "--seconds", f"{seconds:g}"),
        *("--against", options.against, "--ids", ids, "--output", str(output)),
    ]


def environment(options: argparse.Namespace) -> dict[str, str]:
    return {**os.environ, "GRC_ZOO_SIZE": "small" if options.small else "full"}


def against_goals(found: Sequence[Cell]) -> list[str]:
    """Ratio and goal of every cell, the geometric mean, and what was missed.

    Goals are for uniform ids; with Zipf ids no cell may fall below the floor.
    """
    lines = [f"{'model':8} {'ids':8} {'batch':>5} {'ratio':>6} {'goal':>5}"]
    misses: list[str] = []
    ratios: list[float] = []
    for cell in found:
        where = f"{cell.model} {cell.ids} at batch {cell.batch}"
        goal = GOALS[cell.model].get(cell.batch, FLOOR) if cell.ids == "uniform" else FLOOR
        if cell.ratio is None:
            misses.append(f"{where}: no ratio: grc or every peer has no time")
            continue
        ratios.append(cell.ratio)
        lines.append(f"{cell.model:8} {cell.ids:8} {cell.batch:5} {cell.ratio:6.2f} {goal:5.1f}")
        if cell.ratio < goal:
            peer = cell.best_peer["engine"] if cell.best_peer else ""
            misses.append(f"{where}: {cell.ratio:.2f} of {goal:.1f}, best peer {peer}")
    if ratios:
        mean = geometric_mean(ratios)
        lines.append(f"geometric mean {mean:.2f} over {len(ratios)} cells, goal {GEOMETRIC_MEAN}")
        if mean < GEOMETRIC_MEAN:
            misses.append(f"the geometric mean is {mean:.2f}, not {GEOMETRIC_MEAN}")
    return [*lines, *(["missed:", *(f"  {miss}" for miss in misses)] if misses else ["every goal is met"])]


if __name__ == "__main__":
    sys.exit(main())
