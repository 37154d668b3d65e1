"""Print what grc makes of other libraries' models: nodes, seconds, fusions, misses.

python -m benchmarks.thirdparty [NAME ...]
"""

from __future__ import annotations

import importlib.util
import sys
import time

from rich.console import Console
from rich.table import Table

from grc.compiler import optimise, traced
from grc.graph.model_file import from_module
from grc.options import Options
from grc.progress import Silent
from tests.thirdparty.models import MODELS, ThirdParty


def row(entry: ThirdParty) -> list[str]:
    """One line of the table: seconds are wall time of this run, on this machine."""
    module, inputs = entry.model()
    start = time.perf_counter()
    source = traced(from_module(module, inputs, entry.name), Silent())
    captured = time.perf_counter()
    optimised = optimise(source, Options(), Silent())
    done = time.perf_counter()
    before, after = len(source.graph.graph.nodes), len(optimised.graph.graph.nodes)
    changes = [c for record in optimised.records if record.name in ("merge-tables", "fuse") for c in record.changes]
    fused = [change.what for change in changes if change.missed is None]
    missed = dict.fromkeys(f"{change.what}: {change.missed}" for change in changes if change.missed)
    rolled = [f"{record.name} rolled back: {record.rolled_back}" for record in optimised.records if record.rolled_back]
    seconds = f"{captured - start:.1f}", f"{done - captured:.1f}"
    return [entry.name, f"{before} -> {after}", *seconds, "\n".join(fused), "\n".join([*missed, *rolled])]


def main(names: list[str]) -> None:
    table = Table("model", "nodes", "capture s", "passes s", "merged and fused", "missed")
    for entry in MODELS:
        if names and entry.name not in names:
            continue
        if importlib.util.find_spec(entry.package) is None:
            table.add_row(entry.name, "", "", "", "", f"needs {entry.package}, which is not installed")
            continue
        table.add_row(*row(entry))
    Console(width=160).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
