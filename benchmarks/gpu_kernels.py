"""Times of the Triton look-ups on one GPU, beside its copy bandwidth, plain torch, and the error against float64.

    python benchmarks/gpu_kernels.py --json kernels.json [--only lookup,bag_dot,bag_fm,pooled,int8,int4,float32,aoti]

Each figure is the median over replays of a CUDA graph that holds many launches, each with its own ids and output, so
that neither comes from the last-level cache. Bytes are counted once for every row, id and output element.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_packages import package_all
from torch import Tensor

from grc.kernels.bag_dot import triton as bag_dot
from grc.kernels.bag_fm import triton as bag_fm
from grc.kernels.lookup import triton as lookup
from grc.kernels.lookup.row_formats import pack_table, packing, row_bytes, unpacked

FEATURES, ROWS, DIM, LENGTH = 26, 1_000_000, 128, 10
BATCHES = (128, 2048, 8192, 16384, 65536)
NO_PADDING = [-(2**63)] * FEATURES
POOL_BYTES = 256 << 20  # more than four times the L2 of an H200
PRECISIONS = ("ieee", "tf32x3")
RESULTS: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Problem:
    """One op on one arena: how to call it, what it moves, plain torch, and the same on any dtype for the oracle."""

    name: str
    module: Any
    batch: int
    bytes: int
    ids: Callable[[], Tensor]
    call: Callable[[Tensor], Any]
    plain: Callable[[Tensor], Any]
    exact: Callable[[Tensor], Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def graph_us(call: Callable[[Tensor], Any], sets: list[Tensor]) -> tuple[float, float]:
    """Median time and spread ((max - min) / median) of one launch, in us, over replays that visit every set of ids."""
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
    middle = statistics.median(times)
    return middle, (max(times) - min(times)) / middle


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


@contextlib.contextmanager
def tile(module: Any, choice: Any) -> Iterator[None]:
    """Make a kernel take one tile whatever the batch."""
    config = module.config
    module.config = lambda *_: choice
    try:
        yield
    finally:
        module.config = config


def tiles(problem: Problem) -> tuple[Any, ...]:
    """The tiles that a problem's kernel may take."""
    dtype = problem.extra.get("dtype")
    if dtype in PRECISIONS:
        return problem.module.FLOAT32_CONFIGS  # type: ignore[no-any-return]
    if problem.module is bag_dot and dtype in ("int8", "int4"):
        return bag_dot.INTEGER_CONFIGS
    return problem.module.CONFIGS  # type: ignore[no-any-return]


def measure(problem: Problem, bandwidth: float) -> None:
    """Every tile of one problem, then plain torch; one line on the screen, one row for each tile in the results."""
    count = max(4, min(256, POOL_BYTES // problem.bytes + 1))
    sets = [problem.ids() for _ in range(count)]
    probe = sets[0][: min(problem.batch, 512)]
    exact = problem.exact(probe)
    base = {"op": problem.name, "batch": problem.batch, "bytes": problem.bytes, **problem.extra}
    rows = []
    for choice in tiles(problem):
        with tile(problem.module, choice):
            wrong = error(problem.call(probe), exact)
            us, spread = graph_us(problem.call, sets)
        rate = problem.bytes / us * 1e6
        rows.append(base | {"config": list(choice), "us": us, "spread": spread, "GBps": rate / 1e9,
                            "of_copy": rate / bandwidth, "error": wrong})  # fmt: skip
    RESULTS.extend(rows)
    best = min(rows, key=lambda row: row["us"])
    us, _ = graph_us(problem.plain, sets[: max(2, count // 8)])
    plain = problem.plain(probe)
    wrong = error(plain, exact[:, : plain.shape[1]] if isinstance(plain, Tensor) else exact)
    RESULTS.append(base | {"config": "torch", "us": us, "error": wrong, "ratio": us / best["us"]})
    tried = " ".join(f"{row['us']:.1f}" for row in rows)
    label = problem.name + "".join(f" {value}" for value in problem.extra.values())
    ours = f"{best['us']:8.1f} {best['GBps']:7.0f} {best['of_copy']:6.2f} {best['error']:9.1e}"
    theirs = f"{us:9.1f} {us / best['us']:5.1f}x {wrong:9.1e}"
    print(f"{label:25} {problem.batch:6} {ours} {theirs}  {tuple(best['config'])!s:12} | {tried}", flush=True)


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
                lambda x, op=op: op(arena, x, None, None, bases, sizes, dims, ones, 0, NO_PADDING),
                gather, lambda x: exact_rows(x).flatten(1), kind,
            )  # fmt: skip
        if "bag_dot" in only:
            op = bag_dot.register()
            rest = (bases, sizes, DIM, ones, 0, NO_PADDING, False, False, True, None, None, None, width)

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

            def run_dot(x: Tensor, dense: Tensor = dense, op: Any = op, rest: tuple[Any, ...] = rest) -> Tensor:
                return op(arena, x, None, None, dense[: len(x)], *rest)

            moved = row_bytes + id_bytes + batch * item * (DIM + width)
            yield Problem("bag_dot", bag_dot, batch, moved, ids, run_dot, plain_dot, exact_dot, kind)
        if "bag_fm" in only:
            op = bag_fm.register()
            yield Problem(
                "bag_fm", bag_fm, batch, 2 * row_bytes + id_bytes + batch * item, ids,
                lambda x, op=op: op(arena, None, x, bases, sizes, DIM, NO_PADDING),
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
                lambda x, op=op, tens=tens: op(arena, x, None, None, bases, sizes, dims, tens, 0, NO_PADDING),
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
            lambda x: gather(arena, x, None, None, bases, sizes, dims, ones, 0, NO_PADDING, where),
            plain, lambda x: unpacked(table[x + at], form, DIM).double().flatten(1), {"dtype": form},
        )  # fmt: skip
        yield Problem(
            "bag_dot", bag_dot, batch, fixed + batch * item * (DIM + width), random_ids(rows, batch),
            lambda x, head=head: dot(
                arena, x, None, None, head[: len(x)], bases, sizes, DIM, ones, 0, NO_PADDING, False, False, True, where,
                None, None, width,
            ),
            lambda x, head=head: plain_dot(x, head),
            lambda x, head=head: F.pad(plain_dot(x, head.double(), Tensor.double), (0, width - DIM - i.numel())),
            {"dtype": form},
        )  # fmt: skip


def main() -> None:
    everything = "lookup,bag_dot,bag_fm,pooled,int8,int4,float32,aoti"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=everything)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="N,...")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each of the 26 tables")
    options = parser.parse_args()
    only = set(options.only.split(","))
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GBps": bandwidth / 1e9}
    print(
        f"{machine['device']}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s, 26 x {options.rows} x {DIM}"
    )
    settings = {"features": FEATURES, "rows": options.rows, "dim": DIM}

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps({**machine, **settings, "results": RESULTS}, indent=1))

    ours, theirs = f"{'us':>8} {'GB/s':>7} {'/copy':>6} {'error':>9}", f"{'torch us':>9} {'ratio':>6} {'error':>9}"
    print(f"{'op':25} {'batch':>6} {ours} {theirs}  {'best':12} | us of every config")
    begin = time.perf_counter()
    if only & {"lookup", "bag_dot", "bag_fm", "pooled"}:
        arena = torch.empty(FEATURES * options.rows, DIM, dtype=torch.float16, device="cuda").normal_()
        for problem in problems(arena, options.rows, only, tuple(map(int, options.batches.split(",")))):
            measure(problem, bandwidth)
            save()
            torch.cuda.empty_cache()
        del arena
    for form in ("int8", "int4"):
        for problem in (
            packed_problems(form, options.rows, tuple(map(int, options.batches.split(",")))) if form in only else ()
        ):
            measure(problem, bandwidth)
            save()
            torch.cuda.empty_cache()
    if "float32" in only:
        rows = options.rows // 2
        arena = torch.empty(FEATURES * rows, DIM, device="cuda").normal_()
        for problem in problems(arena, rows, {"lookup"}, (2048, 16384)):
            measure(problem, bandwidth)
        usual = bag_dot.FLOAT32
        for precision in PRECISIONS:
            bag_dot.FLOAT32 = precision
            for problem in problems(arena, rows, {"bag_dot"}, (2048, 16384)):
                measure(Problem(**{**vars(problem), "extra": {"dtype": precision}}), bandwidth)
                save()
        bag_dot.FLOAT32 = usual
        del arena
    if "aoti" in only:
        torch.cuda.empty_cache()
        for row in package_all():
            RESULTS.append(row)
            save()
    save()
    print(f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
