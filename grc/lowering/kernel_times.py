"""Times of fused ops on the GPU that is built for: which tile a look-up takes at each batch size, and how near each op comes
to the time in which the device copies as many bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from grc.graph.match import attribute, call_arguments, value
from grc.kernels.lookup.row_formats import ROW_FORMATS, row_bytes
from grc.runtime.buckets import CAPTURING
from grc.runtime.mapped import TOLD

POOL = 128 << 20  # bytes that one round of launches moves, so that few rows wait in a cache for the next
LAUNCHES = 64  # of a round, at most
ROUNDS = 8
SAME = 1.03  # a tile must be so much faster than that of the next larger batch to be one more in the package
COPIED = 256 << 20  # bytes
VECTOR = 16  # bytes, to whole ones of which rows for a linear layer are padded
Tile = tuple[int, ...]


@dataclass(frozen=True)
class Timed:
    """A call at one batch size: its bags of each feature, the bytes that it reads and writes, once each, and the seconds of
    every tile that fits the GPU. What has no tiles has its time under ()."""

    node: fx.Node
    dtype: str  # of the first operand: for a look-up the arena's
    batch: int
    bags: int  # a multiple of the batch where a request has several
    bytes: int
    seconds: dict[Tile, float]


@dataclass
class KernelTimes:
    """What was timed, once for each kind of call and batch. `timer` gives the seconds of a call from several in turns."""

    device: torch.device
    timer: Callable[[Sequence[partial[Any]]], float] = field(default_factory=lambda: seconds_in_graph)
    found: dict[str, dict[int, Timed | None]] = field(default_factory=dict)
    copies: float | None = None

    def tiles(self, graph: fx.GraphModule, node: fx.Node, module: Any, batches: Sequence[int]) -> list[int] | None:
        """Time a call at these batch sizes. For a look-up, answers its fastest tiles, as `as_measured` reads them; for others,
        where bags are jagged, and where the device has no room to time it, None."""
        given = call_arguments(node)
        if given.get("offsets") is not None:
            return None
        timed = self.found.setdefault(kind_of(node, given), {})
        for batch in batches:
            if batch not in timed:
                timed[batch] = self.time(graph, node, module, given, batch)
        chosen = fastest(timed[batch] for batch in sorted(batches))
        return joined(chosen) if chosen and hasattr(module, "tiles_of") else None

    def time(
        self, graph: fx.GraphModule, node: fx.Node, module: Any, given: Mapping[str, Any], batch: int
    ) -> Timed | None:
        """Every tile at one batch; None where no tile fits the GPU, or the operands no memory that is free."""
        op, values = module.register(), {name: value(argument) for name, argument in given.items()}
        tiles: Sequence[Tile] = module.tiles_of(values) if hasattr(module, "tiles_of") else ((),)
        dtype = str(next(iter(values.values())).dtype).removeprefix("torch.")
        beside = beside_operands(op, node, values, self.device)
        seconds: dict[Tile, float] = {}
        try:
            self.copy_bandwidth()
            drawn = [arguments(graph, given, batch, self.device)]
            moved = bytes_of(drawn[0], op(**drawn[0], **beside))
            bags = drawn[0]["ids"].shape[0] if "ids" in given else batch
            drawn += [arguments(graph, given, batch, self.device) for _ in range(min(LAUNCHES, POOL // moved) - 1)]
            for tile in tiles:
                more = {"tiles": [0, *tile], **beside} if tile else beside
                try:
                    seconds[tuple(tile)] = self.timer([partial(op, **one, **more) for one in drawn])
                except RuntimeError as error:
                    if type(error).__name__ != "OutOfResources":  # Triton's, which may not be installed
                        raise
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
        return Timed(node, dtype, batch, bags, moved, seconds) if seconds else None

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second while the device copies from one place to another."""
        if self.copies is None:
            source = torch.zeros(COPIED // 4, dtype=torch.float32, device=self.device)
            # A copy by the copy engine may be slower than one by the multiprocessors, which negate as fast as they copy.
            copy = partial(torch.neg, source, out=torch.empty_like(source))
            self.copies = 2 * COPIED / self.timer([copy] * 4)
        return self.copies

    def entry(self) -> dict[str, Any]:
        """What the manifest tells: each call at each batch with the tile that the package has for it, and how its bandwidth
        compares to a copy's."""
        rows = [
            {
                "op": timed.node.target._opname,  # type: ignore[union-attr]
                "node": timed.node.name,
                "dtype": timed.dtype,
                "batch": timed.batch,
                "tile": list(tile),
                "us": round(timed.seconds[tile] * 1e6, 2),
                "bytes": timed.bytes,
                "of_copy": round(timed.bytes / timed.seconds[tile] / self.copy_bandwidth(), 3),
            }
            for kind in self.found.values()
            for timed, tile in fastest(kind[batch] for batch in sorted(kind))
        ]
        return {"copy_gbps": None if self.copies is None else round(self.copies / 1e9, 1), "fused": rows}


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what an error comes from: a capture that it ends raises one of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (error is not None and ran_out_of_memory(error.__context__))


def fastest(calls: Iterable[Timed | None]) -> list[tuple[Timed, Tile]]:
    """The best tile of each call, from rising batches; from the largest down the one before it where that is as good."""
    found: list[tuple[Timed, Tile]] = []
    for timed in reversed([timed for timed in calls if timed is not None]):
        best = min(timed.seconds, key=timed.seconds.__getitem__)
        larger = found[-1][1] if found else best
        found.append((timed, larger if timed.seconds.get(larger, math.inf) <= SAME * timed.seconds[best] else best))
    return found[::-1]


def joined(chosen: Sequence[tuple[Timed, Tile]]) -> list[int]:
    """Tiles in rising order of the most bags that each is for: neighbours of one tile are one entry."""
    ends = [a for a, b in pairwise(chosen) if a[1] != b[1]] + list(chosen[-1:])
    return [number for timed, tile in ends for number in (timed.bags, *tile)]


def beside_operands(op: Any, node: fx.Node, values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What a package also gives a look-up: a place to count bad ids, and the width of rows that are padded."""
    names = {argument.name for argument in op._schema.arguments} if hasattr(op, "_schema") else set()
    beside: dict[str, Any] = {}
    if "told" in names:
        beside["told"] = torch.zeros(TOLD, dtype=torch.int64, device=device)
    if "width" in names:
        step = VECTOR // (values["arena"].itemsize if not values["packing"] else 2)
        beside["width"] = -(-value(node).shape[1] // step) * step
    return beside


def kind_of(node: fx.Node, given: Mapping[str, Any]) -> str:
    """Calls of one kind take the same time: what tells them apart, but for where their tables lie."""
    told = {name: kind_of_value(value(a)) if isinstance(a, fx.Node) else a for name, a in given.items()}
    return f"{node.target} {told}"


def kind_of_value(held: Any) -> Any:
    return (held.dtype, [str(size) for size in held.shape]) if isinstance(held, torch.Tensor) else str(held)


def size_at(size: int | torch.SymInt, batch: int) -> int:
    """A size of the graph at this batch, the only symbol that sizes of requests with buckets have."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def arguments(graph: fx.GraphModule, given: Mapping[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
    """A call's arguments for a batch of this size: the graph's own constants, ids that have rows, and random numbers."""
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
            noise = torch.randn([size_at(s, batch) for s in like.shape], device=device)
            found[name] = (
                noise.to(like.dtype) if like.is_floating_point() else torch.zeros_like(noise, dtype=like.dtype)
            )
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
    with CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
