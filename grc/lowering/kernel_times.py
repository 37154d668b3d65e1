"""Times of fused ops on the GPU that is built for: which tile a look-up takes at each batch size, and how near each op comes
to the time in which the device copies as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from grc.graph.match import attribute, call_arguments, value
from grc.kernels.lookup.row_formats import ROW_FORMATS, row_bytes

POOL = 128 << 20  # bytes that one round of launches moves, so that few rows wait in a cache for the next
LAUNCHES = 4, 64  # of a round, at least and at most
ROUNDS = 8
SAME = 1.03  # a tile must be so much faster than that of the next larger batch to be one more in the package
COPIED = 256 << 20  # bytes


@dataclass(frozen=True)
class Timed:
    """An op at one batch size: its time, the bytes that it reads and writes, once each, and for a look-up its tile."""

    op: str
    node: str
    dtype: str  # of the first operand: for a look-up the arena's
    batch: int
    bags: int  # of each feature: a multiple of the batch where a request has several
    tile: tuple[int, ...]
    us: float
    bytes: int
    of_copy: float  # its bandwidth, as a share of a copy's


@dataclass
class KernelTimes:
    """What was measured, once for each kind of call. `timer` gives the seconds of a call from several that take turns."""

    device: torch.device
    timer: Callable[[Sequence[partial[Any]]], float] = field(default_factory=lambda: seconds_in_graph)
    found: dict[str, list[Timed]] = field(default_factory=dict)
    copies: float | None = None

    def tiles(self, graph: fx.GraphModule, node: fx.Node, module: Any, batches: Sequence[int]) -> list[int] | None:
        """Time a call at these batch sizes. For a look-up, answers its fastest tiles, as `as_measured` reads them; for others,
        and where bags are jagged, None."""
        given = call_arguments(node)
        if given.get("offsets") is not None:
            return None
        key = kind_of(node, given, batches)
        if key not in self.found:
            self.found[key] = self.measure(graph, node, module, given, sorted(batches))
        return joined(self.found[key]) if hasattr(module, "tiles_of") else None

    def measure(
        self, graph: fx.GraphModule, node: fx.Node, module: Any, given: Mapping[str, Any], batches: Sequence[int]
    ) -> list[Timed]:
        """The best tile at each batch, and from the largest down the one before it where that is as good."""
        op, values = module.register(), {name: value(argument) for name, argument in given.items()}
        configs: tuple[Any, ...] = module.tiles_of(values) if hasattr(module, "tiles_of") else ((),)
        dtype = str(next(iter(values.values())).dtype).removeprefix("torch.")
        timed: list[Timed] = []
        for batch in reversed(batches):
            drawn = [arguments(graph, given, batch, self.device)]
            moved = bytes_of(drawn[0], op(**drawn[0]))
            count = max(LAUNCHES[0], min(LAUNCHES[1], POOL // moved))
            drawn += [arguments(graph, given, batch, self.device) for _ in range(count - 1)]
            times = {}
            for config in configs:
                tiles = {"tiles": [0, *config]} if config else {}
                times[config] = self.timer([partial(op, **one, **tiles) for one in drawn])
            best = min(times, key=times.__getitem__)
            larger = type(best)(*timed[-1].tile) if timed and best else best
            kept = best if times[larger] > SAME * times[best] else larger
            share = moved / times[kept] / self.copy_bandwidth()
            bags = drawn[0]["ids"].shape[0] if "ids" in given else batch
            name = node.target._opname  # type: ignore[union-attr]
            us = round(times[kept] * 1e6, 2)
            timed.append(Timed(name, node.name, dtype, batch, bags, tuple(kept), us, moved, round(share, 3)))
        return timed[::-1]

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second while the device copies from one place to another."""
        if self.copies is None:
            source = torch.zeros(COPIED // 4, dtype=torch.float32, device=self.device)
            # A copy by the copy engine may be slower than one by the multiprocessors, which negate as fast as they copy.
            copy = partial(torch.neg, source, out=torch.empty_like(source))
            self.copies = 2 * COPIED / self.timer([copy] * LAUNCHES[0])
        return self.copies

    def entry(self) -> dict[str, Any]:
        """What the manifest tells."""
        rows = [asdict(timed) for kind in self.found.values() for timed in kind]
        return {"copy_gbps": None if self.copies is None else round(self.copies / 1e9, 1), "fused": rows}


def joined(timed: Sequence[Timed]) -> list[int]:
    """Tiles in rising order of the most bags that each is for: neighbours of one tile are one entry."""
    ends = [a for a, b in pairwise(timed) if a.tile != b.tile] + list(timed[-1:])
    return [number for end in ends for number in (end.bags, *end.tile)]


def kind_of(node: fx.Node, given: Mapping[str, Any], batches: Sequence[int]) -> str:
    """Calls of one kind take the same time: what tells them apart, but for where their tables lie."""
    told = {name: kind_of_value(value(a)) if isinstance(a, fx.Node) else a for name, a in given.items()}
    return f"{node.target} {sorted(batches)} {told}"


def kind_of_value(held: Any) -> Any:
    return (held.dtype, [str(size) for size in held.shape]) if isinstance(held, torch.Tensor) else str(held)


def size_at(size: int | torch.SymInt, batch: int) -> int:
    """A size of the graph at this batch, the only symbol that sizes of requests with buckets have."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def arguments(graph: fx.GraphModule, given: Mapping[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
    """A call's arguments for a batch of this size: the graph's own constants, ids that have rows, and else zeros."""
    found: dict[str, Any] = {}
    for name, argument in given.items():
        held, like = attribute(graph, argument), value(argument)
        if held is not None:
            found[name] = held
        elif name == "ids":
            rows, count = given["rows"], size_at(like.shape[0], batch)
            each = zip(rows, given.get("lengths") or [1] * len(rows), strict=True)
            columns = [torch.randint(0, max(top, 1), (count, length), device=device) for top, length in each]
            found[name] = torch.cat(columns, 1).to(like.dtype)
        elif isinstance(like, torch.Tensor):
            found[name] = torch.zeros([size_at(s, batch) for s in like.shape], dtype=like.dtype, device=device)
        else:
            found[name] = size_at(like, batch) if isinstance(like, torch.SymInt) else like
    return found


def bytes_of(given: Mapping[str, Any], answer: Any) -> int:
    """Bytes of every operand and answer, once each; of a look-up's arena only the rows that are read."""
    answers = [answer] if isinstance(answer, torch.Tensor) else list(answer)
    beside = [v for name, v in given.items() if isinstance(v, torch.Tensor) and name not in ("arena", "linear")]
    total = sum(tensor.nbytes for tensor in (*beside, *answers))
    if "arena" not in given:
        return total
    count = len(given["rows"])
    dims, lengths = given.get("dims") or [given["dim"]] * count, given.get("lengths") or [1] * count
    form = ROW_FORMATS[given["packing"][0]] if given["packing"] else None
    sizes = [row_bytes(form, dim) if form else dim * given["arena"].itemsize for dim in dims]
    if given.get("linear") is not None:
        sizes = [size + given["linear"].itemsize for size in sizes]
    return total + given["ids"].shape[0] * sum(size * length for size, length in zip(sizes, lengths, strict=True))


def seconds_in_graph(calls: Sequence[partial[Any]]) -> float:
    """The median time of a call, over replays of one CUDA graph that holds them all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    stream.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        answers = [call() for call in calls]  # kept, or the next would be written to the same memory
    with torch.cuda.stream(stream):
        for _ in range(2 + ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    del answers
    return statistics.median(times[2:])
