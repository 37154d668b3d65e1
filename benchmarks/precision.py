"""Time, bytes and quality of the zoo by precision: every precision of a model in one run, in turns.

    python -m benchmarks.precision [--only gr,dlrm] [--precisions fp32,bf16,int8,int4] [--small] [--seconds S]
    python -m benchmarks.precision --device cuda [--precisions fp32,fp16,bf16,int8,fp8] [--artifacts FOLDER [--build]]

The ISA is the CPU's own, or what ATEN_CPU_CAPABILITY lowers it to. Each precision is compiled as `grc compile` does by
itself, with the budget below, so that what is compared is grc beside grc; `grc bench --precision` holds it against ONNX
Runtime. On a GPU times are from host memory to host memory. Rows go to benchmarks/results/precision.jsonl, or --output,
where they replace those of the same model, precision, ISA and machine. `--artifacts` keeps what is compiled in a folder, and
takes what is there; with `--build` nothing is measured, so that several may be built side by side before.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import grc
from benchmarks.rows import RESULTS, replace
from grc.bench import host
from grc.cli.summary import table
from grc.compiler import compile
from grc.graph.model_file import load_model
from grc.kernels.cpp import target_isa
from grc.lowering.timing import Turn, interleave, summarise
from grc.report.summary import microseconds, size

ROOT = Path(__file__).resolve().parent.parent
BATCHES = {
    "cpu": {"gr": (1, 8, 64)},
    "cuda": {"gr": (1, 8, 32, 128), "din": (1, 128), "sasrec": (1, 128), "hstu": (1, 128)},
}
USUAL = {"cpu": (1, 64, 1024), "cuda": (1, 128, 2048)}
PRECISIONS = {"cpu": "fp32,bf16,int8,int4", "cuda": "fp32,fp16,bf16,int8,fp8"}
FORMATS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
BUDGET = ("max-error=0.03",)  # what onnxruntime's dynamic int8 costs gr is 0.033
KEY = ("model", "precision", "isa", "machine", "batch")


def main() -> int:
    options = arguments()
    if options.device == "cpu":
        restart_tuned(options.threads)
    torch.set_num_threads(options.threads)
    os.environ["GRC_ZOO_SIZE"] = "small" if options.small else "full"
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            artifacts = compiled(name, options.artifacts or Path(scratch), options)
            if options.build:
                continue
            rows = measured(name, artifacts, options)
        shown(name, rows)
        if not options.small:
            replace(rows, options.output, KEY)
    return 0


def restart_tuned(threads: int) -> None:
    """Start over in the environment in which `grc bench` runs its engines, unless this process has it."""
    environment = host.tuned_environment(os.environ, threads)
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.precision", *sys.argv[1:]], environment)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME,…", default="gr,dlrm,dcnv2,deepfm,din,sasrec,hstu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.jsonl")
    parser.add_argument("--precisions", metavar="P,…")
    parser.add_argument("--artifacts", type=Path, metavar="FOLDER")
    parser.add_argument("--build", action="store_true")
    parser.add_argument(
        "--small", action="store_true", help="small sizes, to check that everything runs; keeps nothing"
    )
    parser.add_argument("--threads", type=int, metavar="N", default=os.cpu_count())
    parser.add_argument("--seconds", type=float, metavar="S", default=1.0, help="recorded calls at each batch")
    return parser.parse_args()


def compiled(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """A model's artifact in every precision."""
    batches, found = batches_of(name, options), {}
    for precision in (options.precisions or PRECISIONS[options.device]).split(","):
        found[precision] = folder / f"{name}-{precision}.grc"
        if found[precision].exists():
            continue
        sys.stderr.write(f"{name}: compile {precision}\n")
        settings = grc.Options(
            found[precision], options.device, batches=batches, precision=precision, budget=BUDGET,
            buckets=batches if options.device == "cuda" else (), max_batch=max(batches),
        )  # fmt: skip
        compile(str(zoo(name)), options=settings)
    return found


def zoo(name: str) -> Path:
    return ROOT / "examples" / "zoo" / f"{name}.py"


def batches_of(name: str, options: argparse.Namespace) -> tuple[int, ...]:
    return BATCHES[options.device].get(name, USUAL[options.device])


def measured(name: str, artifacts: dict[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of a model in every precision, in turns at each batch size."""
    programs = {precision: grc.load(path) for precision, path in artifacts.items()}
    model = load_model(zoo(name))
    rows = []
    for batch in batches_of(name, options):
        args, kwargs = model.inputs(batch)
        turns = {p: Turn(partial(call, program, args, kwargs)) for p, program in programs.items()}
        interleave(list(turns.values()), 1, options.seconds)
        for precision, program in programs.items():
            timing = summarise(turns[precision].seconds)
            rows.append(row(name, precision, batch, program, timing.p50, timing.spread, options.device))
    return rows


def call(program: grc.Program, args: Any, kwargs: Any, index: int) -> None:
    program(*args, **kwargs)


def row(
    name: str, precision: str, batch: int, program: grc.Program, p50: float, spread: float, device: str
) -> dict[str, Any]:
    found = program.artifact.manifest["precision"]
    sites = [] if found is None else found["sites"]
    return {
        "model": name,
        "precision": precision,
        "batch": batch,
        "isa": target_isa() if device == "cpu" else program.artifact.manifest["target"]["sm"],
        "p50_us": round(p50, 2),
        "spread": round(spread, 4),
        "weight_bytes": (program.artifact.path / "weights.safetensors").stat().st_size,
        "formats": {f: sum(s["format"] == f for s in sites) for f in FORMATS},
        "engine": program.engine_at(batch),
        "quality": program.artifact.manifest["budget_quality"].get(program.engine_at(batch), {}),
        "budget": list(BUDGET),
        "machine": host.machine(device),
        "versions": host.versions(),
        "date": datetime.date.today().isoformat(),
        "command": command(name, device),
    }


def command(name: str, device: str) -> str:
    """The command for a model's rows, without where artifacts and rows were kept."""
    told = ["python", "-m", "benchmarks.precision", "--only", name, *(["--device", device] if device != "cpu" else [])]
    given = dict(pairwise(sys.argv))
    return shlex.join(
        told + [part for flag in ("--threads", "--seconds") if flag in given for part in (flag, given[flag])]
    )


def shown(name: str, rows: list[dict[str, Any]]) -> None:
    batches = sorted({r["batch"] for r in rows})
    lines = [(name, *(f"batch {b}" for b in batches), "weights", "kept in", "quality")]
    for precision in dict.fromkeys(r["precision"] for r in rows):
        own = [r for r in rows if r["precision"] == precision]
        times = [microseconds(next(r["p50_us"] for r in own if r["batch"] == b)) for b in batches]
        formats = ", ".join(f"{form} {n}" for form, n in own[0]["formats"].items() if n)
        quality = ", ".join(f"{metric} {value:.2g}" for metric, value in own[0]["quality"].items())
        lines.append((precision, *times, size(own[0]["weight_bytes"]), formats, quality))
    print("\n".join(table(lines, indent="")), flush=True)


if __name__ == "__main__":
    sys.exit(main())
