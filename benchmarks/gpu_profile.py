"""Where the time of a graph's replay on a GPU goes: every kernel of it, and the gaps between them.

    python -m benchmarks.gpu_profile ARTIFACT [--batches 1,128] [--output FILE]

Medians over replays on what lies in the buffers, without copies from and to the host, by the profiler of the driver, which
slows the whole a little: `span` is the first kernel's begin to the last one's end, `busy` the time in which at least one
runs. A kernel that begins early has the time from the end of those before it. Those of one name are added up.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import grc
from benchmarks.plots import longest
from benchmarks.rows import RESULTS, place, replace

REPLAYS = 60
Kernel = tuple[str, int, int]  # its name, and nanoseconds at which it begins and ends


def replayed(replay: Callable[[Any], None]) -> list[list[Kernel]]:
    """The kernels of each replay, in the order in which they began."""
    for _ in range(REPLAYS):
        replay(None)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            replay(None)
            torch.cuda.synchronize()
    found = profiler.profiler.kineto_results.events()
    ran = [e for e in found if "CUDA" in str(e.device_type()) and "Sync" not in e.name()]
    kernels = sorted(
        ((e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in ran), key=lambda kernel: kernel[1]
    )
    each, left_over = divmod(len(kernels), REPLAYS)
    if left_over or not each:
        raise SystemExit(
            f"error: {len(kernels)} kernels of {REPLAYS} replays: the profiler missed some\nhint: run it again"
        )
    return [kernels[i : i + each] for i in range(0, len(kernels), each)]


def summary(replays: Sequence[Sequence[Kernel]]) -> dict[str, Any]:
    """Medians of the replays, in us."""
    named: dict[str, list[int]] = {}
    for position, (name, _, _) in enumerate(replays[0]):
        named.setdefault(name, []).append(position)

    def us(spans: Sequence[float]) -> float:
        return round(statistics.median(spans) / 1e3, 2)

    owned = [own(replay) for replay in replays]
    kernels = [
        {"name": name, "count": len(at), "us": us([sum(times[i] for i in at) for times in owned])}
        for name, at in named.items()
    ]
    return {
        "launches": len(replays[0]),
        "span": us([max(end for _, _, end in r) - r[0][1] for r in replays]),
        "busy": us([sum(times) for times in owned]),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
    }


def own(kernels: Sequence[Kernel]) -> list[int]:
    """Nanoseconds of each kernel in which none of those before it runs."""
    times, until = [], 0
    for _, begin, end in kernels:
        times.append(max(0, end - max(begin, until)))
        until = max(until, end)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batches", default="1,128")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-profile.jsonl")
    options = parser.parse_args()
    program = grc.load(options.artifact)
    command = f"python -m benchmarks.gpu_profile {options.artifact.name} --batches {options.batches}"
    about = place(torch.cuda.get_device_name(), command)
    rows = []
    for batch in map(int, options.batches.split(",")):
        replay = program.replayer(batch)
        if replay is None:
            raise SystemExit(f"error: batch {batch} has no CUDA graph\nhint: compile with it as a bucket")
        row = {"model": program.name, "batch": batch, "engine": program.engine_at(batch), **summary(replayed(replay))}
        rows.append({**row, **about})
        print(
            f"{program.name} {batch}: span {row['span']} us, busy {row['busy']} us; {longest(row['kernels'])}",
            flush=True,
        )
    replace(rows, options.output, ("model", "batch", "machine"))


if __name__ == "__main__":
    main()
