"""Measure the zoo on this GPU with `grc bench`: grc, torch.compile max-autotune, AOTInductor and eager, all at their best.

    python -m benchmarks.gpu --output rows.jsonl [--models dlrm,gr] [--precisions fp32,fp16] [--batches 1,128]
                             [--against compile,aoti,eager] [--engine auto] [--seconds 240] [--keep FOLDER]

Each model is built and measured in processes of its own: what crashes or takes too long costs no other its rows.
`--seconds` is what one model may take in one precision; what did not fit is named at the end. Rows have the form of
`grc bench`: device time by CUDA events, wall time from host input to host output, errors beside both. What the compiler
itself measured, plain AOTInductor under the same graphs among it, goes to rows-builds.jsonl. `--keep` leaves each model's
file and artifact in a folder, for gpu_profile and gpu_call.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.rows import RESULTS, place, replace
from grc.bench.rows import read
from grc.bench.table import text_table

ROOT = Path(__file__).resolve().parent.parent
BATCHES = {"gr": (1, 8, 32, 128), "gr-long": (1, 32)}
USUAL = (1, 128, 2048, 16384)
NO_IDS = ("gr", "gr-long")
SIZES = {"dlrm": "gpu", "gr-long": "long"}
BUILD = ("model", "precision", "engine", "batch", "machine")  # one row of each is kept
RECORDED = 0.4  # seconds of recorded calls of each engine at each batch: thousands of them

# A model file that gives the zoo's model and its inputs in half precision.
HALF = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("zoo_{name}", {path!r})
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)
input_names = zoo.input_names
def get_model():
    return zoo.get_model().half()
def half(x):
    return x.half() if x.is_floating_point() else x
def get_inputs(batch, seed=0, ids="uniform"):
    inputs = zoo.get_inputs(batch, seed, ids)
    return {{name: half(x) for name, x in inputs.items()}} if isinstance(inputs, dict) else tuple(map(half, inputs))
"""


def main() -> int:
    options = arguments()
    if options.build:
        build(*options.build, options)
        return 0
    late: list[str] = []
    for name in options.models.split(","):
        for precision in options.precisions.split(","):
            late += measure(name, precision, options)
    rows = read(options.output)
    if rows:
        print(text_table(rows), flush=True)
    for line in late:
        print(line)
    return 1 if late else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.jsonl")
    parser.add_argument("--models", default="dlrm,dcnv2,deepfm,gr", metavar="NAME,...")
    parser.add_argument("--precisions", default="fp32,fp16", metavar="fp32,fp16")
    parser.add_argument("--batches", metavar="N,...", help="instead of 1,128,2048,16384 (gr: 1,8,32,128)")
    parser.add_argument("--against", default="compile,aoti,eager", metavar="PEER,...")
    parser.add_argument("--engine", default="auto", metavar="NAME", help="the engine to compile with")
    parser.add_argument("--static", metavar="N,...", help="also build for each of these alone, max-autotuned")
    parser.add_argument("--seconds", type=float, default=240, help="for one model in one precision, builds included")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where model files and artifacts stay")
    parser.add_argument("--build", nargs=2, metavar=("MODEL", "PATH"), help=argparse.SUPPRESS)
    return parser.parse_args()


def batches_of(name: str, options: argparse.Namespace) -> tuple[int, ...]:
    return tuple(map(int, options.batches.split(","))) if options.batches else BATCHES.get(name, USUAL)


def measure(name: str, precision: str, options: argparse.Namespace) -> list[str]:
    """Build one artifact and measure it at each batch size. Answers with what failed or did not fit."""
    end = time.monotonic() + options.seconds
    environment = {**os.environ, "GRC_ZOO_SIZE": SIZES.get(name, "full"), "PYTHONUNBUFFERED": "1"}
    zoo = ROOT / "examples" / "zoo" / f"{name.split('-')[0]}.py"
    late: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model, artifact = folder / f"{name}.py", folder / f"{name}.grc"
        model.write_text(HALF.format(name=name, path=str(zoo)) if precision == "fp16" else zoo.read_text())

        def run(what: str, *command: str) -> bool:
            print(f"{name} {precision}: {what}", flush=True)
            start = time.monotonic()
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, timeout=max(end - start, 1), stdout=sys.stderr
                )
                fault = f"exit code {done.returncode}" if done.returncode else None
            except subprocess.TimeoutExpired:
                fault = "out of time"
            print(f"{name} {precision}: {what}: {fault or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
            if fault:
                late.append(f"{name} {precision}: {what}: {fault}")
            return fault is None

        given = [f"--{flag}={getattr(options, flag)}" for flag in ("batches", "engine") if getattr(options, flag)]
        given += [
            f"--output={options.output}",
            f"--precisions={precision}",
            *([f"--static={options.static}"] if options.static else []),
        ]
        if run("build", sys.executable, "-m", "benchmarks.gpu", "--build", str(model), str(artifact), *given):
            bench = (sys.executable, "-m", "grc", "bench", str(model), "--device", "cuda", "--artifact", str(artifact))
            batches = ",".join(map(str, batches_of(name, options)))
            ids = "uniform" if name in NO_IDS else "uniform,zipf"
            rest = ("--against", options.against, "--seconds", str(RECORDED), "--ids", ids)
            run("measure", *bench, *rest, "--batches", batches, "--output", str(options.output))
    return late


def build(model: str, path: str, options: argparse.Namespace) -> None:
    """Compile one artifact with a bucket for each measured batch size, and say what was measured meanwhile."""
    import grc

    name = Path(model).stem
    sizes = batches_of(name, options)
    alone = tuple(map(int, options.static.split(","))) if options.static else sizes
    chosen = grc.Options(
        output=Path(path), device="cuda", engine=options.engine, batches=alone, max_batch=max(sizes), buckets=sizes,
        static_buckets=bool(options.static),
    )  # fmt: skip
    manifest = grc.compile(model, options=chosen).manifest
    for stage in manifest["stages"]:
        print(f"  {stage['name']:8} {stage['seconds']:6.1f} s  {stage['summary']}")
    for row in manifest["measured"]:
        print(f"  {row['engine']:16} batch {row['batch']:6} {row['p50_us']:10.1f} us")
    command = f"python -m benchmarks.gpu --models {name} --precisions {options.precisions} --batches "
    about = place(torch.cuda.get_device_name(), command + ",".join(map(str, sizes)))
    rows = [
        {
            "model": name, "precision": options.precisions, "engine": row["engine"], "batch": row["batch"],
            "p50_us": row["p50_us"], "p99_us": row.get("p99_us"), "build_s": row.get("build_s"),
            "error": manifest["quality"].get(row["engine"]), **about,
        }
        for row in manifest["measured"]
    ]  # fmt: skip
    replace(rows, options.output.with_stem(f"{options.output.stem}-builds"), BUILD)
    for engine, reason in manifest["rejected"].items():
        print(f"  {engine} was rejected: {reason}")
    for part in manifest["parts"]:
        for note in part["notes"]:
            print(f"  {part['engine']}: {note}")


if __name__ == "__main__":
    sys.exit(main())
