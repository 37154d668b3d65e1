"""Requests a second through one, two and three streams: while one request is computed, the next one is copied.

    python -m benchmarks.gpu_streams MODEL ARTIFACT [--batches 128,2048] [--threads 4] [--seconds 2] [--output FILE]

Every thread asks for the next answer as soon as it has the last one, from host memory to host memory.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch

from benchmarks.rows import RESULTS, place, replace
from grc.graph.model_file import load_model
from grc.runtime.artifact import Artifact
from grc.runtime.program import Program


def requests_a_second(program: Program, inputs: tuple[torch.Tensor, ...], threads: int, seconds: float) -> float:
    done = [0] * threads
    start, stop = threading.Barrier(threads + 1), threading.Event()

    def ask(number: int) -> None:
        for _ in range(20):
            program(*inputs)
        start.wait()
        while not stop.is_set():
            program(*inputs)
            done[number] += 1

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in asking:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for thread in asking:
        thread.join()
    return sum(done) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_streams", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batches", default="128,2048")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-streams.jsonl")
    options = parser.parse_args()
    model = load_model(options.model)
    told = (
        f"python -m benchmarks.gpu_streams {Path(options.model).name} {options.artifact.name} "
        f"--batches {options.batches} --seconds {options.seconds:g}"
    )
    about = place(torch.cuda.get_device_name(), told)
    rows = []
    for streams in (1, 2, 3):
        artifact = Artifact.open(options.artifact)
        artifact.manifest["gpu"]["streams"] = streams
        program = Program(artifact)
        for batch in map(int, options.batches.split(",")):
            rate = requests_a_second(program, model.inputs(batch)[0], options.threads, options.seconds)
            row = {"model": model.name, "streams": streams, "batch": batch, "threads": options.threads}
            rows.append({**row, "requests_per_s": round(rate, 1), **about})
            print(f"{model.name} batch {batch}, {streams} streams: {rate:.0f} requests/s", flush=True)
        del program
    replace(rows, options.output, ("model", "streams", "batch", "threads", "machine"))


if __name__ == "__main__":
    main()
