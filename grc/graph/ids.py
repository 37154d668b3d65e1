"""Which inputs are ids, and of which table: what the runtime checks before a request reaches a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from grc.graph.lookups import NO_PADDING, columns_of
from grc.graph.match import aten, call_arguments, constant_list, is_op, shape, static, value

LOOKUPS = ("lookup", "bag_dot", "bag_fm")


@dataclass(frozen=True)
class IdRange:
    """Columns `start..stop` of an input (all of it where `stop` is None) hold ids 0..rows-1 of a table."""

    input: int
    start: int
    stop: int | None
    rows: int
    table: str
    padding: int | None = None
    checked_by_kernel: bool = False


def id_ranges(graph: fx.GraphModule) -> list[IdRange]:
    """Ids that come straight from an input, through slices, casts and concatenations."""
    inputs = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    found: list[IdRange] = []
    for node in graph.graph.nodes:
        for ids, rows, table, padding, kernel in reads(graph, node):
            for matrix, start, stop in origins(ids):
                if matrix in inputs and not value(matrix).is_floating_point():
                    entry = IdRange(inputs[matrix], start, stop, rows, table, padding, kernel)
                    if entry not in found:
                        found.append(entry)
    return found


def reads(graph: fx.GraphModule, node: fx.Node) -> Iterator[tuple[Any, int, str, int | None, bool]]:
    """(ids, rows, table, padding, checked by the kernel) of every table that a node reads."""
    if is_op(node, aten.embedding):
        given, checked = before_check(node.args[1])
        ids, shift = shifted(graph, given)
        yield ids, int(shape(node.args[0])[0]) - shift, str(node.args[0].target), None, checked  # type: ignore[union-attr, arg-type]
        return
    if is_op(node, aten.embedding_bag):
        yield node.args[1], int(shape(node.args[0])[0]), str(node.args[0].target), None, False  # type: ignore[union-attr, arg-type]
        return
    name = getattr(node.target, "_opname", "")
    if getattr(node.target, "namespace", "") != "grc" or name not in LOOKUPS:
        return
    given = call_arguments(node)
    tables = node.meta.get("tables") or ["arena"] * len(given["rows"])  # type: ignore[arg-type]
    lengths = given.get("lengths") or [1] * len(given["rows"])  # type: ignore[arg-type]
    if given.get("offsets") is not None:
        rows = given["rows"]
        if len(set(rows)) == 1:  # type: ignore[arg-type]
            yield given["ids"], rows[0], tables[0], None, True  # type: ignore[index]
        return
    spread = [
        (r, t, p) for r, t, p, n in zip(given["rows"], tables, given["padding"], lengths, strict=True) for _ in range(n)
    ]  # type: ignore[arg-type]
    for column, (rows, table, padding) in enumerate(spread):  # type: ignore[assignment]
        yield Column(given["ids"], column), rows, table, None if padding == NO_PADDING else padding, True  # type: ignore[misc, arg-type]


def before_check(ids: Any) -> tuple[Any, bool]:
    """What an op that checks ids was given, and whether there is one."""
    flat = ids.args[0] if is_op(ids, aten.reshape) else ids
    checked = getattr(getattr(flat, "target", None), "_opname", "") == "checked_ids"
    return (flat.args[0], True) if checked else (ids, False)


def shifted(graph: fx.GraphModule, ids: Any) -> tuple[Any, int]:
    """`ids + constant`: the constant takes rows away from what an id may be."""
    if is_op(ids, aten.add) and len(ids.args) == 2:
        offsets = [ids.args[1]] if isinstance(ids.args[1], int) else constant_list(graph, ids.args[1])
        if offsets and len(set(offsets)) == 1 and offsets[0] >= 0:
            return ids.args[0], offsets[0]
    return ids, 0


@dataclass(frozen=True)
class Column:
    """One column of an ids matrix."""

    matrix: Any
    index: int


def origins(ids: Any) -> Iterator[tuple[fx.Node, int, int | None]]:
    """The input columns that ids are read from."""
    column = None
    if isinstance(ids, Column):
        column, ids = ids.index, ids.matrix
    while is_op(ids, aten.to, aten._to_copy, aten.where) or (is_op(ids, aten.reshape) and column is None):
        if is_op(ids, aten.where):
            return
        ids = ids.args[0]
    if not isinstance(ids, fx.Node):
        return
    if is_op(ids, aten.cat) and value(ids).dim() == 2:
        start = 0
        for part in ids.args[0]:  # type: ignore[union-attr]
            width = shape(part)[1]  # type: ignore[arg-type]
            if not static(width):
                return
            if column is None:
                yield from origins(part)
            elif start <= column < start + width:
                yield from origins(Column(part, column - start))
            start += width
        return
    if is_op(ids, aten.cat):
        for part in ids.args[0]:  # type: ignore[union-attr]
            yield from origins(part)
        return
    if value(ids).dim() <= 2 and is_op(ids, aten.slice, aten.select, aten.reshape):
        piece = columns_of(ids)
        if piece.matrix is not ids:
            wanted = [column] if column is not None else range(piece.width)
            for c in wanted:
                yield from origins(Column(piece.matrix, piece.start + c))
            return
    yield ids, column or 0, None if column is None else column + 1
