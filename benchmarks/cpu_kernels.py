"""The C++ look-ups beside kernels written by hand for one shape, both called from C++ as an AOTInductor package calls them.

    python -m benchmarks.cpu_kernels [--batches 1,64,1024] [--rows 100000] [--rounds 200] [--small]

DLRM's shape: 26 tables of 64 columns, and a dense vector beside them for the interaction. The hand knows the shape at compile
time and checks no id; grc's kernels know it at run time, and check every id. Ids come from a pool whose rows do not fit the
last-level cache. Prints one JSON object for each cell with its goal, and keeps them in
benchmarks/results/cpu-kernels.jsonl; `--small` keeps nothing. Needs a CPU with AVX-512 and its bfloat16 products.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import RESULTS, place, replace
from grc.bench.host import machine, tuned_environment
from grc.kernels import cpp
from grc.kernels.bag_dot import BAG_DOT
from grc.kernels.lookup import LOOKUP

ROOT = Path(__file__).resolve().parent.parent
TABLES, DIM = 26, 64
KEY = ("op", "rows", "batch", "machine")  # one row of each is kept
GOAL = 1.3  # times the hand's
ROUND_S = 0.004  # of each side
POOL_BYTES = 128 << 20  # of rows: more than the last-level cache that one core sees
OPS = {"lookup": TABLES * DIM, "bag_dot": DIM + (TABLES + 1) * TABLES // 2}  # and the columns of its result
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of the largest product


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,64,1024", metavar="N,...")
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--small", action="store_true", help="small tables and few rounds, to check that everything runs"
    )
    options = parser.parse_args()
    if not {"avx512f", "avx512_bf16"} <= set(Path("/proc/cpuinfo").read_text().split()):
        sys.stderr.write("error: this CPU has no AVX-512 with bfloat16 products, for which the other side is written\n")
        return 1
    if "GLIBC_TUNABLES" not in os.environ:  # as every engine of `grc bench`
        os.execve(sys.executable, sys.orig_argv, tuned_environment(os.environ, torch.get_num_threads()))
    if options.small:
        options.rows, options.rounds = 1000, 3
    library = build()
    told = (
        f"python -m benchmarks.cpu_kernels --batches {options.batches} --rows {options.rows} --rounds {options.rounds}"
    )
    about = place(machine("cpu"), told, ("grc", "torch"))
    found = []
    for dtype in BOUND:
        arena = torch.randn(TABLES * options.rows, DIM).to(dtype)
        for op in OPS:
            for batch in map(int, options.batches.split(",")):
                found.append({**measure(library, op, arena, batch, options.rounds), **about})
                print(json.dumps(found[-1]), flush=True)
    if not options.small:
        replace(found, RESULTS / "cpu-kernels.jsonl", KEY)
    return 1 if any(row["ratio"] > GOAL for row in found) else 0


def build() -> ctypes.CDLL:
    """The hand's kernels and grc's own objects, as they go into packages, in one library."""
    kernels = cpp.build([BAG_DOT, LOOKUP], "avx512")
    hand = cpp.compile_object(ROOT / "benchmarks" / "cpu_kernels.cpp", (*cpp.isa_flags("avx512"), "-mavx512bf16"))
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    command = [cpp.compiler(), "-shared", "-fopenmp", str(hand), str(kernels), *link, "-o"]
    return ctypes.CDLL(str(cpp.make(cpp.cached(".so", hand.name, kernels.name), lambda out: [*command, out])))


def measure(library: ctypes.CDLL, op: str, arena: Tensor, batch: int, rounds: int) -> dict[str, Any]:
    """One cell. Raises RuntimeError if the two sides answer differently."""
    name, element = NAMES[arena.dtype], arena.element_size()
    rows = arena.shape[0] // TABLES
    sets = max(2, POOL_BYTES // (batch * TABLES * DIM * element))
    ids = torch.randint(rows, (sets, batch, TABLES))
    dense = torch.randn(batch, DIM).to(arena.dtype) if op == "bag_dot" else None
    out = torch.empty(batch, OPS[op], dtype=arena.dtype)
    clock = getattr(library, f"clock_{name}")

    def run(calls: int, rounds: int) -> tuple[list[float], list[float]]:
        times = tuple((ctypes.c_double * rounds)() for _ in range(2))
        sizes = [ctypes.c_int64(number) for number in (rows, sets, batch, calls, rounds)]
        at = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (arena, ids, dense, out)]
        clock(at[0], sizes[0], at[1], *sizes[1:3], at[2], *sizes[3:], at[3], *times)
        return list(times[0]), list(times[1])

    run(1, 1)
    check(out, op, arena, ids[0], dense)
    calls = max(1, int(ROUND_S / statistics.median(run(1, 20)[1])))
    hand, own = run(calls, rounds)
    hand_us, grc_us = statistics.median(hand) * 1e6, statistics.median(own) * 1e6
    ratio = statistics.median(g / h for g, h in zip(own, hand, strict=True))
    return {"op": op, "rows": name, "batch": batch, "hand_us": round(hand_us, 2), "us": round(grc_us, 2),
            "ratio": round(ratio, 3), "goal": GOAL}  # fmt: skip


def check(out: Tensor, op: str, arena: Tensor, ids: Tensor, dense: Tensor | None) -> None:
    """The hand's answer to the first ids beside that of grc's kernel. Raises RuntimeError if they differ."""
    rows = arena.shape[0] // TABLES
    bases, sizes, ones = [t * rows for t in range(TABLES)], [rows] * TABLES, [1] * TABLES
    none = [-(2**63)] * TABLES
    if op == "bag_dot":
        own = cpp.call(BAG_DOT, arena, ids, None, None, dense, bases, sizes, DIM, ones, 0, none, False, False, True)
    else:
        own = cpp.call(LOOKUP, arena, ids, None, None, bases, sizes, [DIM] * TABLES, ones, 0, none)
    error = float((own.double() - out.double()).abs().max() / own.double().abs().max())
    if not error <= BOUND[arena.dtype]:
        raise RuntimeError(f"{op} {arena.dtype}: the two sides differ by {error:.1e} of the largest value")


if __name__ == "__main__":
    sys.exit(main())
