"""Times of the Triton look-ups on one GPU, beside its copy bandwidth, plain torch, and the error against float64.

    python -m benchmarks.gpu_kernels [--only lookup,bag_dot,bag_fm,pooled,int8,int4,float32] [--output FILE]

Each figure is the median over replays of a CUDA graph that holds many launches, each with its own ids and output, so
that neither comes from the last-level cache. Bytes are counted once for every row, id and output element. Rows of the best
tile of each go to benchmarks/results/gpu-kernels.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import RESULTS, place, replace
from grc.kernels.bag_dot import triton as bag_dot
from grc.kernels.bag_fm import triton as bag_fm
from grc.kernels.lookup import triton as lookup
from grc.kernels.lookup.row_formats import pack_table, packing, row_bytes, unpacked

FEATURES, ROWS, DIM, LENGTH = 26, 1_000_000, 128, 10
BATCHES = (128, 2048, 8192, 16384, 65536)
NO_PADDING = [-(2**63)] * FEATURES
POOL_BYTES = 256 << 20  # more than four times the L2 of an H200
PRECISIONS = ("ieee", "tf32x3")


@dataclass(frozen=True)
class Problem:
    """One op on one arena: how to call it, what it moves, plain torch, and the same on any dtype for the oracle."""

    name: str
    module: Any
    batch: int
    bytes: int
    ids: Callable[[], Tensor]
    call: Callable[..., Any]  # of ids, and of tiles by name
    plain: Callable[[Tensor], Any]
    exact: Callable[[Tensor], Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def graph_us(call: Callable[[Tensor], Any], sets: list[Tensor]) -> float:
    """The median time of one launch, in us, over replays that visit every set of ids."""
    side = side_stream()
    with torch.cuda.stream(side):
        for ids in sets[:2]:
            call(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call(ids) for ids in sets]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(sets))
    del kept, graph
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written in a second by the best of three ways to copy 4 GiB on the device.

    None is captured: a copy inside a CUDA graph may go to a copy engine, which is slower than the multiprocessors.
    """
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: target.copy_(source),
        lambda: torch.neg(source, out=target),
        lambda: torch.neg(source.view(torch.float64), out=target.view(torch.float64)),
    )
    best = float("inf")
    for way in ways:
        for attempt in range(12):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            way()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end)) if attempt >= 2 else best
    return 2 * source.nbytes / best * 1e3


def error(out: Tensor | tuple[Tensor, ...], exact: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    got = out if isinstance(out, Tensor) else torch.cat([t for t in out if t.is_floating_point()], 1)
    return float((got.double() - exact).norm() / exact.norm())


def tiles(problem: Problem) -> tuple[Any, ...]:
    """The tiles that a problem's kernel may take."""
    dtype = problem.extra.get("dtype")
    if dtype in PRECISIONS:
        return problem.module.FLOAT32_CONFIGS  # type: ignore[no-any-return]
    if problem.module is bag_dot and dtype in ("int8", "int4"):
        return bag_dot.INTEGER_CONFIGS
    return problem.module.CONFIGS  # type: ignore[no-any-return]


def measure(problem: Problem, bandwidth: float) -> dict[str, Any]:
    """Every tile of one problem, then plain torch; one line on the screen, and a row of the fastest tile."""
    count = max(4, min(256, POOL_BYTES // problem.bytes + 1))
    sets = [problem.ids() for _ in range(count)]
    probe = sets[0][: min(problem.batch, 512)]
    exact = problem.exact(probe)
    rows = []
    for choice in tiles(problem):
        call = functools.partial(problem.call, tiles=[0, *choice])
        wrong = error(call(probe), exact)
        us = graph_us(call, sets)
        rate = problem.bytes / us * 1e6
        rows.append({"config": list(choice), "us": us, "GBps": rate / 1e9, "of_copy": rate / bandwidth, "error": wrong})
    best = min(rows, key=lambda row: row["us"])
    us = graph_us(problem.plain, sets[: max(2, count // 8)])
    plain = problem.plain(probe)
    wrong = error(plain, exact[:, : plain.shape[1]] if isinstance(plain, Tensor) else exact)
    tried = " ".join(f"{row['us']:.1f}" for row in rows)
    label = problem.name + "".join(f" {value}" for value in problem.extra.values())
    ours = f"{best['us']:8.1f} {best['GBps']:7.0f} {best['of_copy']:6.2f} {best['error']:9.1e}"
    theirs = f"{us:9.1f} {us / best['us']:5.1f}x {wrong:9.1e}"
    print(f"{label:25} {problem.batch:6} {ours} {theirs}  {tuple(best['config'])!s:12} | {tried}", flush=True)
    rounded = {"us": round(best["us"], 2), "GBps": round(best["GBps"]), "of_copy": round(best["of_copy"], 3)}
    about = {"op": problem.name, **problem.extra, "batch": problem.batch, "copy_GBps": round(bandwidth / 1e9)}
    return {**about, **best, **rounded, "torch_us": round(us, 1)}


def random_ids(rows: int, batch: int, columns: int = FEATURES) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, rows, (batch, columns), device="cuda")


def problems(arena: Tensor, rows: int, only: set[str], batches: tuple[int, ...]) -> Iterator[Problem]:
    """The ops on 26 equal tables in one arena [26 * rows, 128]."""
    bases = [f * rows for f in range(FEATURES)]
    sizes, dims, ones = [rows] * FEATURES, [DIM] * FEATURES, [1] * FEATURES
    tables = [arena[base : base + rows] for base in bases]
    at = torch.tensor(bases, device="cuda")
    i, j = torch.tril_indices(FEATURES + 1, FEATURES + 1, -1, device="cuda")
    item = arena.element_size()
    width = -(-(DIM + i.numel()) // 8) * 8  # as the compiler lays pairs out for the linear layer that follows
    kind = {"dtype": str(arena.dtype).removeprefix("torch.")}

    def gather(ids: Tensor) -> Tensor:
        return torch.cat([F.embedding(ids[:, f], table) for f, table in enumerate(tables)], 1)

    def exact_rows(ids: Tensor) -> Tensor:
        return arena[(ids + at).flatten()].double().view(len(ids), FEATURES, DIM)

    def fm(rows: Tensor) -> Tensor:
        return 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1)).sum(1, keepdim=True)

    for batch in batches:
        row_bytes = batch * FEATURES * DIM * item
        id_bytes = batch * FEATURES * 8
        ids = random_ids(rows, batch)
        dense = torch.randn(batch, DIM, device="cuda").to(arena.dtype)
        if "lookup" in only:
            op = lookup.register()
            yield Problem(
                "lookup", lookup, batch, 2 * row_bytes + id_bytes, ids,
                lambda x, op=op, **kw: op(arena, x, None, None, bases, sizes, dims, ones, 0, NO_PADDING, **kw),
                gather, lambda x: exact_rows(x).flatten(1), kind,
            )  # fmt: skip
        if "bag_dot" in only:
            op = bag_dot.register()
            rest = (bases, sizes, DIM, ones, 0, NO_PADDING, False, False, True)

            def plain_dot(x: Tensor, dense: Tensor = dense) -> Tensor:
                head = dense[: len(x)]
                nodes = torch.cat([head, gather(x)], 1).view(len(x), FEATURES + 1, DIM)
                return torch.cat([head, torch.bmm(nodes, nodes.transpose(1, 2))[:, i, j]], 1)

            def exact_dot(x: Tensor, dense: Tensor = dense) -> Tensor:
                head = dense[: len(x)].double()
                nodes = torch.cat([head[:, None], exact_rows(x)], 1)
                return F.pad(
                    torch.cat([head, (nodes @ nodes.transpose(1, 2))[:, i, j]], 1), (0, width - DIM - i.numel())
                )

            def run_dot(
                x: Tensor, dense: Tensor = dense, op: Any = op, rest: tuple[Any, ...] = rest, **kw: Any
            ) -> Tensor:
                return op(arena, x, None, None, dense[: len(x)], *rest, width=width, **kw)

            moved = row_bytes + id_bytes + batch * item * (DIM + width)
            yield Problem("bag_dot", bag_dot, batch, moved, ids, run_dot, plain_dot, exact_dot, kind)
        if "bag_fm" in only:
            op = bag_fm.register()
            yield Problem(
                "bag_fm", bag_fm, batch, 2 * row_bytes + id_bytes + batch * item, ids,
                lambda x, op=op, **kw: op(arena, None, x, bases, sizes, DIM, NO_PADDING, **kw),
                lambda x: (rows := gather(x), fm(rows.view(-1, FEATURES, DIM))),
                lambda x: torch.cat([(rows := exact_rows(x)).flatten(1), fm(rows)], 1), kind,
            )  # fmt: skip
        if "pooled" in only and batch <= 8192:
            op = lookup.register()
            tens = [LENGTH] * FEATURES
            offsets = torch.arange(FEATURES, device="cuda") * rows

            def plain_bags(x: Tensor) -> Tensor:
                parts = [x[:, f * LENGTH : (f + 1) * LENGTH] for f in range(FEATURES)]
                return torch.cat([F.embedding_bag(p, t, mode="sum") for p, t in zip(parts, tables, strict=True)], 1)

            def exact_bags(x: Tensor, offsets: Tensor = offsets) -> Tensor:
                every = (x.view(len(x), FEATURES, LENGTH) + offsets[:, None]).flatten()
                return arena[every].double().view(len(x), FEATURES, LENGTH, DIM).sum(2).flatten(1)

            yield Problem(
                "lookup sum of 10", lookup, batch, (LENGTH + 1) * row_bytes + LENGTH * id_bytes,
                random_ids(rows, batch, FEATURES * LENGTH),
                lambda x, op=op, tens=tens, **kw: op(
                    arena, x, None, None, bases, sizes, dims, tens, 0, NO_PADDING, **kw
                ),
                plain_bags, exact_bags, kind,
            )  # fmt: skip


def packed_problems(form: str, rows: int, batches: tuple[int, ...]) -> Iterator[Problem]:
    """The look-ups on 26 equal tables of 8 or 4 bits, whose rows hold a scale; the answers are float16."""
    pitch, item = row_bytes(form, DIM), 2
    piece = torch.empty(1024 * pitch, dtype=torch.uint8)
    pack_table(torch.randn(1024, DIM), form, piece)
    arena = piece.cuda().repeat(-(-FEATURES * rows // 1024))[: FEATURES * rows * pitch].contiguous()
    table = arena.view(FEATURES * rows, pitch)
    sizes, dims, ones = [rows] * FEATURES, [DIM] * FEATURES, [1] * FEATURES
    bases = [f * rows for f in range(FEATURES)]
    where = packing([form] * FEATURES, [base * pitch for base in bases])
    at = torch.tensor(bases, device="cuda")
    i, j = torch.tril_indices(FEATURES + 1, FEATURES + 1, -1, device="cuda")
    width = -(-(DIM + i.numel()) // 8) * 8
    gather, dot = lookup.register(), bag_dot.register()

    def plain(ids: Tensor) -> Tensor:
        return unpacked(table[ids + at], form, DIM).half().flatten(1)

    def plain_dot(ids: Tensor, head: Tensor, widen: Any = Tensor.half) -> Tensor:
        nodes = torch.cat([head[: len(ids), None], widen(unpacked(table[ids + at], form, DIM))], 1)
        return torch.cat([head[: len(ids)], torch.bmm(nodes, nodes.transpose(1, 2))[:, i, j]], 1)

    for batch in batches:
        head = torch.randn(batch, DIM, device="cuda").half()
        fixed = batch * FEATURES * (pitch + 8)
        yield Problem(
            "lookup", lookup, batch, fixed + batch * FEATURES * DIM * item, random_ids(rows, batch),
            lambda x, **kw: gather(arena, x, None, None, bases, sizes, dims, ones, 0, NO_PADDING, where, **kw),
            plain, lambda x: unpacked(table[x + at], form, DIM).double().flatten(1), {"dtype": form},
        )  # fmt: skip
        yield Problem(
            "bag_dot", bag_dot, batch, fixed + batch * item * (DIM + width), random_ids(rows, batch),
            lambda x, head=head, **kw: dot(
                arena, x, None, None, head[: len(x)], bases, sizes, DIM, ones, 0, NO_PADDING, False, False, True, where,
                width=width, **kw,
            ),
            lambda x, head=head: plain_dot(x, head),
            lambda x, head=head: F.pad(plain_dot(x, head.double(), Tensor.double), (0, width - DIM - i.numel())),
            {"dtype": form},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-kernels.jsonl")
    parser.add_argument("--only", default="lookup,bag_dot,bag_fm,pooled,int8,int4,float32")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="N,...")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each of the 26 tables")
    options = parser.parse_args()
    only, batches = set(options.only.split(",")), tuple(map(int, options.batches.split(",")))
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    told = f"python -m benchmarks.gpu_kernels --only {options.only} --batches {options.batches}"
    about = place(torch.cuda.get_device_name(), told)
    print(f"{about['machine']}, copy {bandwidth / 1e9:.0f} GB/s, 26 x {options.rows} x {DIM}")
    ours, theirs = f"{'us':>8} {'GB/s':>7} {'/copy':>6} {'error':>9}", f"{'torch us':>9} {'ratio':>6} {'error':>9}"
    print(f"{'op':25} {'batch':>6} {ours} {theirs}  {'best':12} | us of every config")

    def keep(given: Iterator[Problem]) -> None:
        for problem in given:
            replace([measure(problem, bandwidth) | about], options.output, ("op", "dtype", "batch", "machine"))
            torch.cuda.empty_cache()

    if only & {"lookup", "bag_dot", "bag_fm", "pooled"}:
        arena = torch.empty(FEATURES * options.rows, DIM, dtype=torch.float16, device="cuda").normal_()
        keep(problems(arena, options.rows, only, batches))
        del arena
    for form in only & {"int8", "int4"}:
        keep(packed_problems(form, options.rows, batches))
    if "float32" in only:
        rows = options.rows // 2
        arena = torch.empty(FEATURES * rows, DIM, device="cuda").normal_()
        keep(problems(arena, rows, {"lookup"}, (2048, 16384)))
        for precision in PRECISIONS:
            bag_dot.FLOAT32 = precision
            again = problems(arena, rows, {"bag_dot"}, (2048, 16384))
            keep(Problem(**{**vars(problem), "extra": {"dtype": precision}}) for problem in again)


if __name__ == "__main__":
    main()
