"""Sites: the tables, layers, ranked items, attentions and activation units of a graph that may be kept in fewer bits.

Each goes by the name of its weight, and an attention or a unit by its place in the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from grc.graph.cost import rows_per_sample
from grc.graph.match import aten, attribute, call_arguments, finite, is_op, value
from grc.kernels import ACTIVATION_UNIT, BAG_DOT, BAG_FM, CROSS, LOOKUP, SCORE_TOPK
from grc.kernels import ATTENTION as ATTENTION_OP
from grc.kernels.lookup.row_formats import HALF_MAX, row_bytes
from grc.kernels.quantised_linear import MAX_DEPTH
from grc.precision.formats import BITS

LAYER, RANKING, TABLE, ATTENTION, UNIT = "layer", "ranking", "table", "attention", "activation unit"
LOOKUPS = tuple(op.overload for op in (LOOKUP, BAG_DOT, BAG_FM))
# The operands of attentions and units that a GPU takes in half precision, by their places.
HALVED = {ATTENTION_OP.overload: (0, 1, 2), ACTIVATION_UNIT.overload: tuple(range(10))}


@dataclass
class Site:
    """One weight: the nodes that read it, its bytes in float32, and what it does for a row of a request."""

    name: str
    kind: str
    nodes: list[fx.Node]
    elements: int
    work: int  # elements read for one row of the batch, times the rows that each is multiplied with
    width: int = 0  # of a table's rows
    features: list[tuple[fx.Node, int]] = field(default_factory=list)  # of a table: look-up and feature
    arena: str = ""  # of a table: the constant it lies in, and where, in rows of a 2-D arena or in elements
    base: int = 0
    head: bool = False  # what it computes is an output or goes into a sigmoid or softmax, but for arithmetic
    reason: str | None = None  # why it must stay in float32
    unscaled: str | None = None  # of a table: why no format can hold it that counts in float16

    @property
    def bytes(self) -> int:
        return 4 * self.elements

    def lowered_bytes(self, form: str) -> int:
        if self.kind == TABLE:
            return self.elements // self.width * row_bytes(form, self.width)
        return self.elements * BITS[form] // 8

    def rows_of(self, arena: torch.Tensor) -> torch.Tensor:
        """A table's rows [R, width], as a view of the arena that it lies in beside tables of any width."""
        if arena.dim() == 2:
            return arena.detach()[self.base : self.base + self.elements // self.width]
        return arena.detach()[self.base : self.base + self.elements].view(-1, self.width)


def find_sites(graph: fx.GraphModule) -> list[Site]:
    """Every float32 layer of a constant weight, attention, activation unit and set of items that are ranked, in the order of
    the graph, then every table. A table whose rows a layer multiplies with too is stored twice, with two names."""
    found: dict[str, Site] = {}
    for node in graph.graph.nodes:
        if node.target is ATTENTION_OP.overload and value(node).dtype is torch.float32:
            found[node.name] = Site(node.name, ATTENTION, [node], 0, attention_work(node))
        if node.target is ACTIVATION_UNIT.overload and value(node).dtype is torch.float32:
            keys, layers = node.args[1], [node.args[place] for place in (3, 5)]
            weights = sum(value(layer).numel() for layer in layers if layer is not None)
            found[node.name] = Site(node.name, UNIT, [node], weights, weights * rows_per_sample(keys))
        weight = layer_weight(node)
        tensor = attribute(graph, weight)
        if tensor is None or tensor.dim() != 2 or tensor.dtype is not torch.float32:
            continue
        site = found.get(str(weight.target))
        if site is None:
            kind = RANKING if node.target is SCORE_TOPK.overload else LAYER
            site = found[str(weight.target)] = Site(str(weight.target), kind, [], tensor.numel(), 0)
            site.reason = refused(tensor)
        site.nodes.append(node)
        site.head |= feeds_output(node)
        site.work += tensor.numel() * rows_per_sample(operand(node))
        if (node.target is SCORE_TOPK.overload) != (site.kind == RANKING):
            site.reason = "one layer ranks its scores and another does not"
    return [*found.values(), *tables(graph, found)]


def attention_work(node: fx.Node) -> int:
    """Products of one row of the batch; of steps whose number varies, as if there were one."""
    (_, n, heads, d), (_, m, *_), (*_, v) = (value(arg).shape for arg in node.args[:3])
    steps = [size if isinstance(size, int) else 1 for size in (n, m)]
    return math.prod(steps) * heads * (d + v)


@dataclass(frozen=True)
class Reading:
    """One feature of one look-up: which part of which arena it reads, in rows of a 2-D arena or in elements."""

    node: fx.Node
    feature: int
    arena: str
    base: int
    end: int
    dim: int
    name: str
    length: int


def tables(graph: fx.GraphModule, multiplied: Collection[str]) -> list[Site]:
    """Every float32 table that fused look-ups read. Parts of an arena that overlap, as the features of one table with
    offsets do, are one site. Names in `multiplied` are taken."""
    found: list[Site] = []
    spans: list[Reading] = []
    for reading in sorted(readings(graph), key=lambda r: (r.arena, r.base)):
        last = spans[-1] if spans else None
        overlaps = last is not None and last.arena == reading.arena and reading.base < last.end
        if overlaps and last is not None:
            spans[-1] = replace(last, end=max(last.end, reading.end))
            if last.dim != reading.dim:
                found[-1].reason = "look-ups read it in rows of different widths"
        else:
            spans.append(reading)
            taken = {site.name for site in found} | set(multiplied)
            name = reading.name if reading.name not in taken else f"{reading.name}[{reading.base}]"
            found.append(Site(name, TABLE, [], 0, 0, reading.dim, arena=reading.arena, base=reading.base))
        site = found[-1]
        site.nodes.append(reading.node)
        site.features.append((reading.node, reading.feature))
        site.work += reading.dim * reading.length
    for site, span in zip(found, spans, strict=True):
        arena = attribute(graph, next(n for n in graph.graph.nodes if str(n.target) == span.arena))
        assert arena is not None
        site.elements = (span.end - span.base) * (1 if arena.dim() == 1 else span.dim)
        if site.reason is None:
            site.unscaled = beyond_half(site.rows_of(arena))
    return found


def beyond_half(rows: torch.Tensor) -> str | None:
    """Which of a table's rows [R, D] float16 can't hold, nor be the scale of: data to calibrate on may never read it."""
    low, high = rows.aminmax(dim=1)
    bad = ((low >= -HALF_MAX) & (high <= HALF_MAX)).logical_not().nonzero()  # NaN is neither
    if not len(bad):
        return None
    row = int(bad[0])
    worst = low[row] if -low[row] > high[row] else high[row]
    return f"row {row} holds {worst.item():g}, and float16, which scales it, ends at {HALF_MAX:g}"


def readings(graph: fx.GraphModule) -> Iterator[Reading]:
    for node in graph.graph.nodes:
        if is_op(node, aten.embedding):
            table, ids = attribute(graph, node.args[0]), value(node.args[1])
            if table is not None and table.dtype is torch.float32 and varying(ids) <= 1 and ids.dim():
                path, (rows, dim) = str(node.args[0].target), table.shape
                count = math.prod(size for size in ids.shape if isinstance(size, int))
                yield Reading(node, 0, path, 0, rows, dim, path, count)
            continue
        if node.op != "call_function" or node.target not in LOOKUPS:
            continue
        given = call_arguments(node)
        arena = attribute(graph, given["arena"])
        if arena is None or arena.dtype is not torch.float32 or given["packing"]:
            continue
        dims = given.get("dims") or [given["dim"]] * len(given["bases"])
        lengths = given.get("lengths") or [1] * len(given["bases"])
        path = str(given["arena"].target)
        names = node.meta.get("tables") or [path] * len(dims)
        for f, (base, rows, dim) in enumerate(zip(given["bases"], given["rows"], dims, strict=True)):
            end = base + rows * (dim if arena.dim() == 1 else 1)
            yield Reading(node, f, path, base, end, dim, names[f], lengths[f])


def varying(ids: torch.Tensor) -> int:
    """How many sizes of a value are not known: one of them can be left to a reshape."""
    return sum(not isinstance(size, int) for size in ids.shape)


def layer_weight(node: fx.Node) -> Any:
    """The weight that a node multiplies with, or None."""
    if is_op(node, aten.linear):
        return node.args[1]
    if node.target is CROSS.overload:
        return node.args[2]
    if node.target is SCORE_TOPK.overload:
        return node.args[1]
    return None


def operand(node: fx.Node) -> fx.Node:
    return node.args[1 if node.target is CROSS.overload else 0]  # type: ignore[return-value]


def refused(weight: torch.Tensor) -> str | None:
    if not finite(weight):
        return "its weight holds NaN or infinity"
    if weight.shape[1] > MAX_DEPTH:
        return f"{weight.shape[1]} inputs are too many for exact sums of int8"
    return None


SQUASHING = (aten.sigmoid, aten.softmax, aten.log_softmax)
PASSING = (
    operator.getitem, aten.reshape, aten.view, aten.squeeze, aten.unsqueeze, aten.flatten, aten.select, aten.slice,
    aten.permute, aten.transpose, aten.cat, aten.stack, aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg,
    aten.clamp, aten.relu, aten.tanh, aten.exp,
)  # fmt: skip


def feeds_output(node: fx.Node) -> bool:
    """True where what a layer computes is an answer or goes into a sigmoid or a softmax, but for arithmetic on each number."""
    reached, waiting = {node}, [node]
    for at in waiting:
        for user in at.users:
            if user.op == "output" or is_op(user, *SQUASHING):
                return True
            if user not in reached and is_op(user, *PASSING):
                reached.add(user)
                waiting.append(user)
    return False
