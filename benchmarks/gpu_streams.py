"""Requests a second through one, two and three streams: while one request is computed, the next one is copied.

    python -m benchmarks.gpu_streams MODEL ARTIFACT [--batches 128,2048] [--threads 4] [--seconds 2] [--json FILE]

Every thread asks for the next answer as soon as it has the last one, from host memory to host memory.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch

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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    rows = []
    for streams in (1, 2, 3):
        artifact = Artifact.open(options.artifact)
        artifact.manifest["gpu"]["streams"] = streams
        program = Program(artifact)
        for batch in map(int, options.batches.split(",")):
            rate = requests_a_second(program, model.inputs(batch)[0], options.threads, options.seconds)
            row = {"model": model.name, "device": torch.cuda.get_device_name(), "streams": streams, "batch": batch}
            rows.append(row | {"threads": options.threads, "requests_per_s": round(rate, 1)})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        del program
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
