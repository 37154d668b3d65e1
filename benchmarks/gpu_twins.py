"""Triton twins of cross layers, attention and top-k beside what Inductor makes of their plain form, on one GPU.

    python -m benchmarks.gpu_twins [--json FILE] [--only cross,attention,score_topk,linear]

Both run in a CUDA graph over several sets of inputs; us are medians, errors are relative to the largest value of a run in
float64. Inductor compiles for a batch that varies, as the package of an artifact is compiled, and once for each size,
max-autotuned. `linear` shows what an odd number of columns costs cuBLAS in half precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels.attention import ATTENTION
from grc.kernels.attention import triton as attention
from grc.kernels.cross import CROSS
from grc.kernels.cross import triton as cross
from grc.kernels.score_topk import SCORE_TOPK
from grc.kernels.score_topk import triton as score_topk

HALF = {"dtype": torch.float16, "device": "cuda"}
Call = Callable[..., Any]


def graph_us(call: Call, sets: list[list[Any]]) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for args in sets:
                call(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call(*args) for args in sets]
    times = []
    for _ in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(sets))
    del kept, graph
    return statistics.median(times[3:])


def error(call: Call, reference: Call, args: list[Any]) -> float:
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    got, exact = call(*args), reference(*wide)
    got, exact = (t[0] if isinstance(t, tuple) else t for t in (got, exact))
    return float((got.double() - exact).abs().max() / exact.abs().max())


def problems(only: set[str]) -> Iterator[tuple[str, Any, Call, int, list[list[Any]]]]:
    if "cross" in only:
        for batch in (1, 128, 2048, 16384):
            weight, bias = torch.randn(624, 624, **HALF) / 25, torch.randn(624, **HALF)
            sets = []
            for _ in range(4):
                x0, x = torch.randn(batch, 624, **HALF), torch.randn(batch, 624, **HALF)
                sets.append([x0, x, weight, bias, x])
            yield "cross 624", cross, CROSS.reference, batch, sets
    if "attention" in only:
        forms = {"gr": (10, 8, 64, 0, False), "sasrec": (50, 2, 32, 0, True), "hstu": (200, 4, 32, 2, True)}
        for name, (steps, heads, width, kind, causal) in forms.items():
            for batch in (1, 128):
                sets = []
                for _ in range(4):
                    q, k, v = torch.randn(batch, steps, 3, heads, width, **HALF).unbind(2)
                    bias = torch.randn(steps, steps, **HALF) if kind == 2 else None
                    factor = torch.rand(batch, 1, 1, steps, **HALF) if kind == 2 else None
                    sets.append([q, k, v, bias, factor, width**-0.5, 1 / steps if kind == 2 else 1.0, kind, causal])
                yield f"attention {name}", attention, ATTENTION.reference, batch, sets
    if "score_topk" in only:
        for width in (64, 128):
            weight = torch.randn(50_000, width, **HALF) / 8
            for batch in (1, 128, 1024):
                sets = [[torch.randn(batch, width, **HALF), weight, None, 100] for _ in range(4)]
                yield f"score_topk {width}", score_topk, SCORE_TOPK.reference, batch, sets


def linears(save: Callable[[dict[str, Any]], None]) -> None:
    for width, out in ((13, 512), (479, 512)):
        for batch in (1, 128, 2048, 16384):
            us = {}
            for wide in (width, -(-width // 8) * 8):
                weight, bias = torch.randn(out, wide, **HALF), torch.randn(out, **HALF)
                us[wide] = graph_us(functional.linear, [[torch.randn(batch, wide, **HALF), weight, bias]] * 4)
            rows = [torch.randn(batch, width, **HALF), (0, -width % 8)]
            pad = graph_us(functional.pad, [rows] * 4)
            save({"op": f"linear {width} -> {out}", "batch": batch, **{f"K={k}": round(v, 2) for k, v in us.items()},
                  "pad": round(pad, 2)})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_twins", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="cross,attention,score_topk,linear")
    parser.add_argument(
        "--autotune", action="store_true", help="also compile the plain form for each size, max-autotuned"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def save(row: dict[str, Any]) -> None:
        rows.append({"device": torch.cuda.get_device_name(), **row})
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if options.json:
            options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))

    torch.manual_seed(0)
    only = set(options.only.split(","))
    if "linear" in only:
        linears(save)
    dynamic: dict[str, Call] = {}
    for name, module, reference, batch, sets in problems(only):
        if name not in dynamic:
            torch._dynamo.reset()
            dynamic[name] = torch.compile(reference, dynamic=True)
        plain, ours = dynamic[name], module.register()
        row = {"op": name, "batch": batch, "twin": graph_us(ours, sets), "inductor": graph_us(plain, sets)}
        if options.autotune:
            torch._dynamo.reset()
            tuned = torch.compile(reference, dynamic=False, mode="max-autotune-no-cudagraphs")
            row["autotuned"] = graph_us(tuned, sets)
        row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        save(
            row
            | {"error": f"{error(ours, reference, sets[0]):.1e}", "plain": f"{error(plain, reference, sets[0]):.1e}"}
        )


if __name__ == "__main__":
    main()
