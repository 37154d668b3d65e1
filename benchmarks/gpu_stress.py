"""Stress one artifact on this GPU: interleaved replays from many threads, no bit differing, and loads without growth.

    python -m benchmarks.gpu_stress [--model dlrm] [--replays 100000] [--threads 4] [--streams 2] [--loads 60]
                                    [--artifact PATH] [--output FILE]

Every answer of a captured graph is compared, bit for bit, with a run of the same part without graphs on the same request
padded by hand to the same bucket. Requests have random sizes and are drawn anew for every round.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import grc
from benchmarks.rows import RESULTS, place, replace
from grc.compiler import as_model
from grc.runtime.artifact import Artifact
from grc.runtime.buckets import Buckets
from grc.runtime.engines import part_loader
from grc.runtime.program import bound

ROOT = Path(__file__).resolve().parent.parent
BUCKETS = (1, 8, 128, 512)
POOL = 256  # requests of one round, each replayed many times in random order
LEAK = (
    32 << 20
)  # bytes that later loads may add in all: torch keeps a little for each of the 32 streams that it hands out

Request = tuple[list[torch.Tensor], list[torch.Tensor]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stress", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dlrm")
    parser.add_argument("--artifact", type=Path, help="use this one instead of compiling")
    parser.add_argument("--replays", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--loads", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-stress.jsonl")
    options = parser.parse_args()
    os.environ.setdefault("GRC_ZOO_SIZE", "small")
    model = ROOT / "examples" / "zoo" / f"{options.model}.py"
    with tempfile.TemporaryDirectory() as folder:
        path = options.artifact or Path(folder) / "model.grc"
        if options.artifact is None:
            chosen = grc.Options(
                output=path, device="cuda", engine="inductor", buckets=BUCKETS, max_batch=BUCKETS[-1],
                streams=options.streams,
            )  # fmt: skip
            start = time.perf_counter()
            grc.compile(str(model), options=chosen)
            print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        found = stress(path, as_model(str(model), None), options.replays, options.threads, options.loads)
    told = (
        f"python -m benchmarks.gpu_stress --model {options.model} --replays {options.replays} --loads {options.loads}"
    )
    row = {"model": options.model, "threads": options.threads, "streams": options.streams, **found}
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    replace(
        [row | place(torch.cuda.get_device_name(), told)], options.output, ("model", "threads", "streams", "machine")
    )
    return 0 if sound(found) and found["device_growth_bytes"] <= LEAK else 1


def stress(path: Path, model: Any, replays: int, threads: int, loads: int) -> dict[str, Any]:
    """How many of so many replays differed or failed, and what loading the artifact so often left behind."""
    return replay_all(path, model, replays, threads) | load_often(path, model, loads)


def sound(found: dict[str, Any]) -> bool:
    """Whether nothing went wrong, and nothing grew. What the whole device holds tells only where no other program uses it."""
    grown = max(found["allocator_growth_bytes"], found["host_growth_bytes"])
    return not (found["different"] or found["failed"]) and grown <= LEAK


def replay_all(path: Path, model: Any, replays: int, threads: int) -> dict[str, Any]:
    manifest = Artifact.open(path).manifest
    part = manifest["parts"][0]
    program = grc.load(path, engine=part["engine"])
    constants = bound(part["weights"], program.artifact.weights)
    direct = part_loader(manifest)({**part, "graphs": False}, path / "parts", constants)
    graphs = program.runs[0]
    assert isinstance(graphs, Buckets)
    different, failed, done, start = [0], [0], 0, time.perf_counter()
    rounds = max(1, replays // (POOL * 40))
    for number in range(rounds):
        pool = draw(model, graphs, direct, number)
        share = -(-replays // (rounds * threads))
        asking = [
            threading.Thread(target=replay, args=(program, pool, share, number * 1000 + t, different, failed))
            for t in range(threads)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        done += share * threads
        print(f"  {done} replays, {different[0]} differ, {failed[0]} failed", flush=True)
    seconds = time.perf_counter() - start
    return {"replays": done, "different": different[0], "failed": failed[0], "replay_s": round(seconds, 1)}


def draw(model: Any, graphs: Buckets, direct: Any, seed: int) -> list[Request]:
    """Requests of random sizes with the answers of the part without graphs, at the same padded size."""
    plan, chooser = graphs.plan, random.Random(seed)
    torch.manual_seed(seed)
    sizes = [chooser.randint(1, plan.buckets[-1]) for _ in range(POOL)]
    leaves = list(model.inputs(sum(sizes))[0])
    order = torch.randperm(sum(sizes))
    leaves = [leaf[order] for leaf in leaves]
    pool: list[Request] = []
    start = 0
    for size in sizes:
        inputs = [leaf[start : start + size].contiguous() for leaf in leaves]
        start += size
        spare = plan.bucket(size) - size
        padded = [torch.cat([t, t[:1].expand(spare, *t.shape[1:])]) for t in inputs]
        pool.append((inputs, [answer[:size].clone() for answer in direct(padded)]))
    return pool


def replay(program: Any, pool: list[Request], count: int, seed: int, different: list[int], failed: list[int]) -> None:
    chooser = random.Random(seed)
    for _ in range(count):
        inputs, wanted = chooser.choice(pool)
        try:
            answers = program.run_flat(inputs)
        except Exception as error:  # whatever a thread meets is counted, or it would be lost with the thread
            failed[0] += 1
            print(f"  {type(error).__name__}: {error}", flush=True)
            continue
        if not all(map(torch.equal, answers, wanted)):
            different[0] += 1


def load_often(path: Path, model: Any, count: int) -> dict[str, Any]:
    """Load, answer and let go: seconds of a load, and what the device, torch and the process hold after the fifth and the
    last."""
    held: list[tuple[int, int, int]] = []
    seconds: list[float] = []
    request = model.inputs(3)[0]
    for _ in range(count):
        start = time.perf_counter()
        program = grc.load(path)
        program(*request)
        seconds.append(time.perf_counter() - start)
        del program
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append((total - free, torch.cuda.memory_reserved(), pages * os.sysconf("SC_PAGE_SIZE")))
    early, late = held[min(4, count - 1)], held[-1]
    return {
        "loads": count,
        "load_first_s": round(seconds[0], 3),
        "load_median_s": round(sorted(seconds)[count // 2], 3),
        "device_growth_bytes": late[0] - early[0],
        "allocator_growth_bytes": late[1] - early[1],
        "host_growth_bytes": late[2] - early[2],
    }


if __name__ == "__main__":
    sys.exit(main())
