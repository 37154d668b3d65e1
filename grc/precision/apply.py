"""Apply the outcome to a graph: its tables become arenas of bytes, in which every table has its own format.

Layers are packed when an engine is built (grc/lowering/pack.py), since their layout depends on the ISA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from grc.graph.match import aten, attribute, call_arguments, is_op, value
from grc.graph.rewrite import Rewriter, copy_graph, mapped
from grc.kernels import LOOKUP
from grc.kernels.lookup.pooling import NO_PADDING, SUM
from grc.kernels.lookup.row_formats import LINE, pack_table, packing, row_bytes
from grc.precision.between import with_halves_between
from grc.precision.gpu import halved_layers, narrowed, tables_of_bytes
from grc.precision.outcome import HALF_LAYERS, Lowered
from grc.precision.sites import LOOKUPS, TABLE, Site

HALVES_BETWEEN = "what lies between layers of 16 bits is kept in 16 bits too"
FLOATS_BETWEEN = "what lies between layers stays in float32: in 16 bits no engine is inside of the budget"


def graphs_of(
    found: Lowered, sites: Sequence[Site], graph: fx.GraphModule, device: str, folder: Path
) -> Iterator[tuple[dict[str, fx.GraphModule], list[str]]]:
    """The graphs to build for an outcome, the best guess under "", and notes on them; then others, for where no engine of
    those is inside of the budget. Tables are converted into files in the folder."""
    if device == "cpu":
        yield {"": with_tables(graph, sites, found.formats, folder)}, []
        return
    tabled = with_tables(graph, sites, tables_of_bytes(sites, found.formats), folder)
    graphs = {"": narrowed(tabled, sites, found.formats)}
    halved = halved_layers(sites, found.formats)
    if halved != found.formats:  # what its 8-bit rows cost may be more than the products save
        graphs[HALF_LAYERS] = narrowed(tabled, sites, halved)
    narrower = {label: with_halves_between(one) for label, one in graphs.items()}
    if not any(narrower.values()):
        yield graphs, []
        return
    yield {label: one or graphs[label] for label, one in narrower.items()}, [HALVES_BETWEEN]
    yield graphs, [FLOATS_BETWEEN]


def with_tables(
    graph: fx.GraphModule, sites: Sequence[Site], formats: Mapping[str, str], folder: Path
) -> fx.GraphModule:
    """A copy of the graph whose look-ups read the tables in `formats`; the graph itself where no table is among them.

    Arenas of bytes are written into files in the folder and mapped, so that converting a table takes no memory that
    can't be given back.
    """
    lowered = {site.arena for site in sites if site.kind == TABLE and site.name in formats}
    if not lowered:
        return graph
    copy = copy_graph(graph)
    edit = Rewriter(copy)
    for path in sorted(lowered):
        own = [site for site in sites if site.kind == TABLE and site.arena == path]
        place = convert(edit, path, own, formats, folder)
        for node in [n for n in copy.graph.nodes if n.op == "call_function"]:
            rewrite(node, path, place, edit)
    edit.finish()
    return copy


@dataclass(frozen=True)
class Place:
    """An arena of bytes: where each of its tables begins, and in which format it lies there."""

    arena: fx.Node
    flat: bool
    tables: list[tuple[Site, str, int]]

    def of(self, base: int) -> tuple[str, int]:
        """Format and first byte of the part of a table that begins at `base` of the float32 arena."""
        site, form, start = next(t for t in reversed(self.tables) if t[0].base <= base)
        rows = (base - site.base) // (site.width if self.flat else 1)
        return form, start + rows * row_bytes(form, site.width)


def convert(edit: Rewriter, path: str, sites: Sequence[Site], formats: Mapping[str, str], folder: Path) -> Place:
    """Write every table of one arena as bytes, one after the other on cache lines."""
    node = next(n for n in edit.graph.nodes if n.op == "get_attr" and str(n.target) == path)
    arena = attribute(edit.module, node)
    assert arena is not None
    tables, end = [], 0
    for site in sorted(sites, key=lambda site: site.base):
        form = formats.get(site.name, "fp32")
        tables.append((site, form, end))
        end += -(-site.lowered_bytes(form) // LINE) * LINE
    out = mapped(folder, [end], torch.uint8)
    for site, form, start in tables:
        pack_table(site.rows_of(arena), form, out[start : start + site.lowered_bytes(form)])
    return Place(edit.parameter(f"{node.name}_packed", out), arena.dim() == 1, tables)


def rewrite(node: fx.Node, path: str, place: Place, edit: Rewriter) -> None:
    """Let a look-up of this arena read the bytes."""
    if is_op(node, aten.embedding) and str(node.args[0].target) == path:  # type: ignore[union-attr]
        rewrite_embedding(node, place, edit)
        return
    if node.target not in LOOKUPS:
        return
    given = call_arguments(node)
    if not isinstance(given["arena"], fx.Node) or str(given["arena"].target) != path:
        return
    found = [place.of(base) for base in given["bases"]]
    given["arena"] = place.arena
    given["packing"] = packing([form for form, _ in found], [start for _, start in found])
    node.args, node.kwargs = tuple(given.values()), {}


def rewrite_embedding(node: fx.Node, place: Place, edit: Rewriter) -> None:
    """An embedding of ids of any shape, as a look-up of one feature."""
    ids: fx.Node = node.args[1]  # type: ignore[assignment]
    site, form, start = place.tables[0]
    rows, dim = site.elements // site.width, site.width
    with edit.at(node):
        flat = edit.reshape(ids, -1, 1)
        found = edit.call(
            LOOKUP.overload, place.arena, flat, None, None, [0], [rows], [dim], [1], SUM, [NO_PADDING],
            packing([form], [start]),
        )  # fmt: skip
        sizes = [size if isinstance(size, int) else -1 for size in value(ids).shape]
        edit.replace(node, edit.reshape(found, *sizes, dim))
