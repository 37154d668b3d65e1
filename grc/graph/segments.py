"""Which inputs cut others into bags: the lengths or offsets of jagged values, where the captured graph proves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.graph.jagged import ZEROS, summed_size
from grc.graph.match import argument, aten, attribute, is_op, same_size, shape, value

LENGTHS, STARTS, OFFSETS = "lengths", "starts", "offsets"  # where bags begin, and with the end of the last one
VIEWS = (
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.contiguous, aten.clone,
    aten.alias, aten.detach, aten.to, aten._to_copy, aten.lift_fresh_copy,
)  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """Input `counts` cuts the rows of input `values` into bags: by their lengths, their starts, or their offsets."""

    values: int
    counts: int
    form: str


def segments(graph: fx.GraphModule) -> list[Segments]:
    """Each input that an operator takes for the lengths or offsets of another's rows; of inputs of one size, the first."""
    inputs = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    found: list[Segments] = []
    for node in graph.graph.nodes:
        for rows, counts, form in cuts(node):
            told, form = origin(graph, counts, form)
            if told not in inputs or value(told).is_floating_point():
                continue
            sized = (i for n, i in inputs.items() if n is not told and value(n).dim() and same_size(shape(n)[0], rows))
            entries = [Segments(i, inputs[told], form) for i in sized][:1]
            found += [entry for entry in entries if entry not in found]
    return found


def cuts(node: fx.Node) -> Iterator[tuple[Any, Any, str]]:
    """(number of rows, what tells their bags, its form) of an operator that cuts rows into bags."""
    if is_op(node, aten.embedding_bag):
        form = OFFSETS if argument(node, "include_last_offset") else STARTS
        yield shape(node.args[1])[0], node.args[2], form  # type: ignore[arg-type]
    elif is_op(node, aten.repeat_interleave):
        yield value(argument(node, "output_size")), argument(node, "repeats"), LENGTHS
    elif is_op(node, aten.split_with_sizes) and argument(node, "dim") == 0:
        matrices = [summed_size(size, i) for i, size in enumerate(node.args[1])]  # type: ignore[arg-type]
        whole = matrices[0] is not None and shape(matrices[0])[0] == len(matrices)
        if whole and all(m is not None and same_rows(m, matrices[0]) for m in matrices):  # type: ignore[arg-type]
            yield shape(node.args[0])[0], matrices[0], LENGTHS  # type: ignore[arg-type]
    elif getattr(node.target, "namespace", "") == "fbgemm":
        yield from fbgemm_cuts(node, node.target._opname)  # type: ignore[union-attr]


def fbgemm_cuts(node: fx.Node, name: str) -> Iterator[tuple[Any, Any, str]]:
    """Its jagged operators take values first and offsets second, in a list where a tensor may have several levels."""
    if name.startswith("jagged_"):
        offsets: Any = node.args[1]
        if isinstance(offsets, fx.Node) or len(offsets) == 1:
            yield shape(node.args[0])[0], offsets if isinstance(offsets, fx.Node) else offsets[0], OFFSETS  # type: ignore[arg-type]
    elif name == "permute_2D_sparse_data":
        yield shape(node.args[2])[0], node.args[1], LENGTHS  # type: ignore[arg-type]


def same_rows(a: fx.Node, b: fx.Node) -> bool:
    return a is b or (is_op(a, *VIEWS) and is_op(b, *VIEWS) and a.args[0] is b.args[0])


def beneath(node: Any) -> Any:
    """What views and copies of the same numbers begin from."""
    while is_op(node, *VIEWS):
        node = node.args[0]
    return node


def origin(graph: fx.GraphModule, node: Any, form: str) -> tuple[Any, str]:
    """What lengths, starts or offsets were computed from, and which of the three that holds."""
    while True:
        node = beneath(node)
        before = step(graph, node, form)
        if before is None or value(before[0]).dim() != 1:
            return node, form
        node, form = before


def step(graph: fx.GraphModule, node: Any, form: str) -> tuple[Any, str] | None:
    if form == LENGTHS:
        offsets = differences(node)
        return None if offsets is None else (offsets, OFFSETS)
    if form == STARTS and is_op(node, aten.slice) and argument(node, "start") in (None, 0):
        return (node.args[0], OFFSETS) if argument(node, "end") == -1 else None
    lengths = exclusive(node) if form == STARTS else summed(graph, node)
    return None if lengths is None else (lengths, LENGTHS)


def exclusive(node: Any) -> Any:
    """The lengths whose running sums, each without its own length, are these starts."""
    if is_op(node, aten.sub) and running(node.args[0]) is node.args[1]:
        return node.args[1]
    return node.args[0] if is_op(node, *fbgemm("asynchronous_exclusive_cumsum")) else None


def summed(graph: fx.GraphModule, node: Any) -> Any:
    """The lengths whose running sums, with a zero in front, are these offsets."""
    if is_op(node, aten.cat) and len(node.args[0]) == 2 and is_zero(graph, node.args[0][0]):
        return running(node.args[0][1])
    if is_op(node, aten.constant_pad_nd, aten.pad) and list(node.args[1]) == [1, 0]:
        return running(node.args[0])
    return node.args[0] if is_op(node, *fbgemm("asynchronous_complete_cumsum")) else None


def fbgemm(name: str) -> list[Any]:
    """An operator of fbgemm, where that is installed."""
    return [getattr(torch.ops.fbgemm, name)] if hasattr(torch.ops.fbgemm, name) else []


def running(node: Any) -> Any:
    """x of `cumsum(x)`."""
    node = beneath(node)
    return node.args[0] if is_op(node, aten.cumsum) else None


def is_zero(graph: fx.GraphModule, node: Any) -> bool:
    node = beneath(node)
    constant = attribute(graph, node)
    return is_op(node, *ZEROS) or (constant is not None and not bool(constant.any()))


def differences(node: Any) -> Any:
    """The offsets o of `o[1:] - o[:-1]`."""
    if not is_op(node, aten.sub) or not all(is_op(side, aten.slice) for side in node.args[:2]):
        return None
    late, early = node.args[:2]
    whole = argument(late, "start") == 1 and argument(early, "start") in (None, 0) and argument(early, "end") == -1
    return late.args[0] if whole and late.args[0] is early.args[0] else None
