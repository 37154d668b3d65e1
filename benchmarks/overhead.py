"""What the runtime itself costs: a call beside its engine's bare call, the load of a 1 GB artifact, and shared memory.

    python -m benchmarks.overhead [--engine inductor] [--batch 1] [--gigabytes 1.0] [--only call,load] [--small]
    python -m benchmarks.overhead --device cuda

On a GPU it is the time from `grc.load` in a fresh process to the first answer. Prints one JSON object for each figure with
its goal, and keeps them in benchmarks/results/overhead.jsonl; `--small` keeps nothing. Memory is what the kernel tells of two
processes that have both read every weight of one artifact.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import grc
from benchmarks.rows import RESULTS, replace
from grc.bench.host import machine, versions
from grc.graph.capture import flat_tensors
from grc.graph.model_file import load_model
from grc.lowering.timing import Turn, interleave, summarise

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "examples" / "zoo"
KEY = ("figure", "model", "batch", "engine", "machine")
WIDTH = 64

# Goals: overhead of a call, load of 1 GB, resident bytes over weight bytes; on a GPU the first answer of 1 GB.
CALL_US, LOAD_S, MEMORY, WARM_S = 20.0, 1.0, 1.1, 2.0


class OneTable(nn.Module):
    """A table of the wanted size, and as little else as possible."""

    def __init__(self, rows: int):
        super().__init__()
        self.items = nn.Embedding(rows, WIDTH)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.score(self.items(item))).squeeze(1)


def call_overhead(name: str, engine: str, batch: int, seconds: float) -> dict[str, Any]:
    """Microseconds of `program(*inputs)` over the engine's own call on the same inputs, in one interleaved run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.grc"
        spec = str(ZOO / f"{name}.py")
        grc.compile(spec, options=grc.Options(path, engine=engine, batches=(batch,)))
        program = grc.load(path)
        args, kwargs = load_model(spec).inputs(batch)
        leaves = flat_tensors((args, kwargs))[0]
        bare = program.runs[program.part_at(batch)]
        turns = [Turn(lambda _: program(*args, **kwargs)), Turn(lambda _: bare(list(leaves)))]
        interleave(turns, 2, seconds)
        whole, own = (summarise(turn.seconds) for turn in turns)
    return {
        "figure": "call overhead",
        "model": name,
        "engine": engine,
        "batch": batch,
        "value": round(whole.p50 - own.p50, 2),
        "unit": "us",
        "goal": CALL_US,
        "call_p50_us": round(whole.p50, 2),
        "bare_p50_us": round(own.p50, 2),
        "spread": round(max(whole.spread, own.spread), 3),
    }


def load_and_memory(engine: str, gigabytes: float, device: str) -> list[dict[str, Any]]:
    """Seconds of grc.load in a fresh process, and what two processes with the same artifact hold each; on a GPU the seconds to
    the first answer."""
    rows = int(gigabytes * 1e9 / (4 * WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.grc"
        model = OneTable(rows).eval()
        options = grc.Options(path, device, engine, batches=(1,))
        grc.compile(model, lambda batch: (torch.arange(batch) % rows,), options)
        del model
        weights = (path / "weights.safetensors").stat().st_size
        if device == "cuda":
            alone = start_child(path)
            times = json.loads(alone.communicate("\n")[0].splitlines()[0])
            first = round(times["load_s"] + times["first_call_s"], 3)
            figure = {"figure": "load to first answer", "engine": engine, "weights_bytes": weights}
            return [{**figure, "value": first, "unit": "s", "goal": WARM_S}]
        children = [start_child(path) for _ in range(2)]
        loaded = [json.loads(child.stdout.readline()) for child in children]
        held = []
        for child in children:  # only when both hold the weights do the kernel's shares mean anything
            child.stdin.write("\n")
            child.stdin.flush()
            held.append(json.loads(child.stdout.readline()))
        for child in children:
            child.communicate()
    common = {"engine": engine, "weights_bytes": weights}
    load_s = max(child["load_s"] for child in loaded)
    # The interpreter and torch are there before the artifact; pages that are mapped from a file are shared.
    own = max(after["private"] - before["private"] for before, after in zip(loaded, held, strict=True))
    first = max(after["rss"] - before["rss"] for before, after in zip(loaded, held, strict=True))
    return [
        {
            "figure": "load",
            **common,
            "value": round(load_s, 4),
            "unit": "s",
            "goal": LOAD_S,
            "first_call_s": round(max(child["first_call_s"] for child in loaded), 4),
        },
        {"figure": "memory", **common, "value": round(first / weights, 3), "unit": "of the weights", "goal": MEMORY},
        {
            "figure": "memory not shared",
            **common,
            "value": round(own / weights, 3),
            "unit": "of the weights",
            "goal": 0.1,
        },
    ]


def start_child(path: Path) -> Any:
    command = [sys.executable, "-m", "benchmarks.overhead", "--child", str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def child(path: Path) -> None:
    """Load, tell how long that took, read every weight, wait for a line, and tell what memory that holds."""
    before = memory()
    start = time.perf_counter()
    program = grc.load(path)
    loaded = time.perf_counter()
    program(torch.tensor([0]))
    times = {"load_s": loaded - start, "first_call_s": time.perf_counter() - loaded}
    print(json.dumps({**times, **before}), flush=True)
    for tensor in program.artifact.weights.values():
        tensor.view(-1).view(torch.uint8)[:: os.sysconf("SC_PAGE_SIZE")].sum()
    sys.stdin.readline()
    print(json.dumps(memory()), flush=True)


def memory() -> dict[str, int]:
    """Bytes resident, and bytes that no other process shares."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        fields[name.rstrip(":")] = int(size) << 10
    return {"rss": fields["Rss"], "private": fields["Private_Clean"] + fields["Private_Dirty"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine", default="inductor")
    parser.add_argument("--model", default="dlrm")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default="call,load")
    parser.add_argument("--small", action="store_true", help="a small model and table, to check that everything runs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return 0
    if options.small:
        os.environ["GRC_ZOO_SIZE"] = "small"
        options.gigabytes, options.seconds = min(options.gigabytes, 0.05), 0.3
    found = []
    if "call" in options.only and options.device == "cpu":
        found.append(call_overhead(options.model, options.engine, options.batch, options.seconds))
    if "load" in options.only:
        found += load_and_memory(options.engine, options.gigabytes, options.device)
    about = {"machine": machine(options.device), "versions": versions(), "date": datetime.date.today().isoformat()}
    said = (
        "python -m benchmarks.overhead --device cuda"
        if options.device == "cuda"
        else f"python -m benchmarks.overhead --engine {options.engine} --model {options.model} --batch {options.batch}"
    )
    rows = [{**figure, **about, "command": said} for figure in found]
    print("\n".join(map(json.dumps, rows)))
    if not options.small:
        replace(rows, RESULTS / "overhead.jsonl", KEY)
    return 1 if any(figure["value"] > figure["goal"] for figure in found) else 0


if __name__ == "__main__":
    sys.exit(main())
