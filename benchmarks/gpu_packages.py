"""The Triton look-ups in AOTInductor packages: one package for every batch, one CUDA graph for each bucket.

Replays are compared with direct runs bit for bit. Run by gpu_kernels.py.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grc.kernels.bag_dot import triton as bag_dot
from grc.kernels.bag_fm import triton as bag_fm
from grc.kernels.lookup import triton as lookup
from grc.lowering.inductor import linking_compiler

FEATURES, DIM = 26, 128
NO_PADDING = [-(2**63)] * FEATURES
BUCKETS = (16384, 2048, 128, 1)


def mlp(*widths: int) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Dlrm(nn.Module):
    """A DLRM on grc_cuda::bag_dot (Naumov et al. 2019): [B, 13] and [B, 26] to [B, 1]."""

    def __init__(self, rows: int):
        super().__init__()
        self.arena = nn.Parameter(torch.randn(FEATURES * rows, DIM) * 0.1, False)
        self.args = [f * rows for f in range(FEATURES)], [rows] * FEATURES, DIM, [1] * FEATURES, 0, NO_PADDING
        self.bottom, self.top = mlp(13, 512, 256, DIM), mlp(DIM + FEATURES * (FEATURES + 1) // 2, 512, 256, 1)

    def forward(self, dense: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        low = torch.relu(self.bottom(dense))
        crossed = torch.ops.grc_cuda.bag_dot(self.arena, ids, None, None, low, *self.args, False, False, True)
        return (torch.sigmoid(self.top(crossed).float()),)


class Rest(nn.Module):
    """The other two ops, each with something to fuse around it."""

    def __init__(self, rows: int):
        super().__init__()
        self.arena = nn.Parameter(torch.randn(FEATURES * rows, DIM) * 0.1, False)
        self.bases, self.rows = [f * rows for f in range(FEATURES)], [rows] * FEATURES

    def forward(self, dense: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        args = (self.bases, self.rows, [DIM] * FEATURES, [1] * FEATURES, 0, NO_PADDING)
        rows = torch.ops.grc_cuda.lookup(self.arena, ids, None, None, *args)
        flat, fm = torch.ops.grc_cuda.bag_fm(self.arena, None, ids, self.bases, self.rows, DIM, NO_PADDING)
        return rows * 2 + dense.sum(1, keepdim=True), flat + 1, torch.sigmoid(fm)


def packaged(model: nn.Module, rows: int, folder: Path) -> dict[str, Any]:
    """Export with an unknown batch, compile by AOTInductor, capture a graph for each bucket, and compare every bit."""
    name = type(model).__name__.lower()

    def inputs(batch: int) -> list[Tensor]:
        return [torch.rand(batch, 13, device="cuda").half(), torch.randint(0, rows, (batch, FEATURES), device="cuda")]

    model = model.half().cuda().eval()
    dim = torch.export.Dim("batch", min=1, max=16384)
    with torch.no_grad():
        program = torch.export.export(model, tuple(inputs(128)), dynamic_shapes=({0: dim}, {0: dim}))
    print(f"  {name}: exported", flush=True)
    begin = time.perf_counter()
    # Inductor reads $CXX once, when it is imported: the compiler that binds a package's symbols must be named here.
    options = {"aot_inductor.package_constants_in_so": True, "cpp.cxx": (None, str(linking_compiler()))}
    path = str(folder / f"{name}.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    build = time.perf_counter() - begin
    print(f"  {name}: built in {build:.0f} s", flush=True)
    runner = torch._C._aoti.AOTIModelPackageLoader(path, "model", True, 1, -1)
    print(f"  {name}: loaded", flush=True)
    pool, side, captured = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), {}
    for batch in BUCKETS:
        own = inputs(batch)
        with torch.cuda.stream(side):
            for _ in range(3):
                runner.boxed_run(list(own))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            outs = runner.boxed_run(list(own))
        captured[batch] = graph, own, outs
        print(f"  {name}: captured batch {batch}", flush=True)
    different, eager_error = 0, 0.0
    for turn in range(25):
        for graph, own, outs in captured.values():
            fresh = inputs(len(own[0]))
            for old, new in zip(own, fresh, strict=True):
                old.copy_(new)
            graph.replay()
            got = [out.clone() for out in outs]
            direct = runner.boxed_run([x.clone() for x in fresh])
            different += sum(not torch.equal(a, b) for a, b in zip(got, direct, strict=True))
            if turn == 0:
                with torch.no_grad():
                    want = model(*fresh)
                worst = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
                eager_error = max(eager_error, worst)
    times = {}
    for batch, (graph, _, _) in captured.items():
        begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(10):
            graph.replay()
        begin_event.record()
        for _ in range(200):
            graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        times[batch] = begin_event.elapsed_time(end_event) * 5
    shown = "  ".join(f"B{batch} {us:.1f}" for batch, us in sorted(times.items()))
    print(f"aoti {name}: built in {build:.0f} s; {different} of {25 * len(BUCKETS)} replays differ from direct runs; "
          f"from eager {eager_error:.1e}; us: {shown}", flush=True)  # fmt: skip
    return {"op": f"aoti {name}", "build_s": build, "replays": 25 * len(BUCKETS), "different": different,
            "max_difference_from_eager": eager_error, "us": times}  # fmt: skip


def package_all() -> Iterator[dict[str, Any]]:
    """Build, capture and compare both models, one after the other."""
    lookup.register(), bag_dot.register(), bag_fm.register()
    with tempfile.TemporaryDirectory() as folder:
        yield packaged(Dlrm(100_000), 100_000, Path(folder))
        yield packaged(Rest(1000), 1000, Path(folder))
