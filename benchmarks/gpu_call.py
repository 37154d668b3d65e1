"""Where the time of a call on a GPU goes: kernels, copies, launch and wait, Python; requests copied by kernel and by engine.

    python -m benchmarks.gpu_call MODEL ARTIFACT [--batches 1,128,2048] [--output FILE]

Medians in us, of requests in pinned memory that go round through a pool larger than the CPU's last-level cache. kernels: the
graph without its copies, by events; graph: with them, by events; replay: launched and waited for, by the clock; call:
`program(*inputs)` from host memory to host memory. `over` is the call less the kernels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import grc
from benchmarks.rows import RESULTS, place, replace
from grc.bench import requests as bench
from grc.bench.host import last_level_cache
from grc.graph.capture import capture
from grc.graph.model_file import Model, load_model
from grc.runtime import buckets
from grc.runtime.buckets import Buckets
from grc.runtime.mapped import BY_KERNEL

TURNS = 2000


def median_us(call: Callable[[], Any], turns: int) -> float:
    for _ in range(turns // 10):
        call()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        answer = call()
        times.append(answer if isinstance(answer, float) else time.perf_counter() - start)
    return statistics.median(times) * 1e6


def pool(model: Model, batch: int) -> Iterator[list[torch.Tensor]]:
    """Pinned requests, one after another and again from the first, that no cache of the host holds all of."""
    source = capture(model)
    requests = bench.pool(bench.draws(model, str(model.file))["uniform"], source, batch, 2 * last_level_cache())
    return itertools.cycle([[leaf.pin_memory() for leaf in request.leaves] for request in requests])


def measure(program: grc.Program, requests: Iterator[list[torch.Tensor]], batch: int) -> dict[str, float]:
    run = program.runs[program.part_at(batch)]
    assert isinstance(run, Buckets), "this part runs without CUDA graphs"
    turns = TURNS if batch <= 1024 else TURNS // 4
    bare = run.replayer(batch)
    assert bare is not None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def kernels() -> float:
        begin.record()
        bare(None)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    lane = run.free.get()
    run.free.put(lane)
    bucket = lane.buckets[run.plan.bucket(batch)]
    launch, cut = lane.recorded(bucket, True, True).launch, bucket.cut(run.plan, batch, True)

    def replay() -> None:
        launch()
        lane.stream.synchronize()

    found = {
        "kernels": median_us(kernels, turns),
        "graph": median_us(lambda: run.seconds(next(requests)), turns),
        "replay": median_us(replay, turns),
        "fill": median_us(lambda: cut.fill(next(requests)), turns),
        "check": median_us(lambda: program.check.batch(next(requests)), turns),
        "part": median_us(lambda: run(next(requests)), turns),
        "call": median_us(lambda: program.run_flat(next(requests)), turns),
    }
    return {name: round(us, 1) for name, us in found.items()} | {"over": round(found["call"] - found["kernels"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_call", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batches", default="1,128,2048")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-call.jsonl")
    options = parser.parse_args()
    model = load_model(options.model)
    told = (
        f"python -m benchmarks.gpu_call {Path(options.model).name} {options.artifact.name} --batches {options.batches}"
    )
    about = place(torch.cuda.get_device_name(), told)
    rows = []
    for copies, limit in (("engine", 0), ("kernel", BY_KERNEL), ("kernel, any size", 1 << 40)):
        buckets.BY_KERNEL = limit
        program = grc.load(options.artifact)
        for batch in map(int, options.batches.split(",")):
            row = {"copies": copies, "batch": batch, **measure(program, pool(model, batch), batch)}
            rows.append({"model": model.name, **row, **about})
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    replace(rows, options.output, ("model", "copies", "batch", "machine"))


if __name__ == "__main__":
    main()
