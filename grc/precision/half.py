"""Half precision for a GPU: layers and tables of float16 or bfloat16, with everything between them in float32.

Casts around a layer cost nothing there: Inductor computes them where the values are made or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, call_arguments, is_op, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import BAG_FM, CROSS
from grc.precision.sites import LAYER, LOOKUPS, TABLE, Site

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def with_half(graph: fx.GraphModule, sites: Sequence[Site], formats: Mapping[str, str]) -> fx.GraphModule:
    """A copy of the graph in which these layers and tables are kept in half precision.

    An arena is one tensor: its tables go down together, or not at all.
    """
    copy = copy_graph(graph)
    edit = Halver(copy)
    layers = {site.name: DTYPES[formats[site.name]] for site in sites if site.kind == LAYER and site.name in formats}
    arenas = halved_arenas(sites, formats)
    for node in list(copy.graph.nodes):
        if node.op != "call_function":
            continue
        if is_op(node, aten.linear) and str(node.args[1].target) in layers:  # type: ignore[union-attr]
            dtype = layers[str(node.args[1].target)]  # type: ignore[union-attr]
            edit.swap(node, aten.linear.default, dtype, node.args[0], node.args[1], argument(node, "bias"))
        elif node.target is CROSS.overload and str(node.args[2].target) in layers:  # type: ignore[union-attr]
            edit.swap(node, node.target, layers[str(node.args[2].target)], *node.args)  # type: ignore[union-attr]
        elif node.target in LOOKUPS or is_op(node, aten.embedding):
            place = node.args[0]
            dtype = arenas.get(str(place.target)) if isinstance(place, fx.Node) else None  # type: ignore[assignment]
            if dtype is not None:
                halve_lookup(edit, node, dtype)
    edit.finish()
    return copy


def halved_arenas(sites: Sequence[Site], formats: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Arenas whose tables all go to one format."""
    found: dict[str, set[str]] = {}
    for site in sites:
        if site.kind == TABLE:
            found.setdefault(site.arena, set()).add(formats.get(site.name, "fp32"))
    alike = {arena: next(iter(forms)) for arena, forms in found.items() if len(forms) == 1}
    return {arena: DTYPES[form] for arena, form in alike.items() if form in DTYPES}


def halve_lookup(edit: Halver, node: fx.Node, dtype: torch.dtype) -> None:
    """The arena in half precision, and beside it what the op sums with its rows."""
    if is_op(node, aten.embedding):
        with edit.at(node):
            new = edit.call(aten.embedding.default, edit.half(node.args[0], dtype), node.args[1])
            wide = edit.call(aten.to.dtype, new, torch.float32)
        edit.replace(node, wide)
        return
    given = call_arguments(node)
    with edit.at(node):
        for name in ("arena", "weights", "dense", "linear"):
            if given.get(name) is not None:
                given[name] = edit.half(given[name], dtype)
        new = edit.call(node.target, *given.values())
        new.meta["tables"] = node.meta.get("tables")
        if node.target is not BAG_FM.overload:
            wide = edit.call(aten.to.dtype, new, torch.float32)
            edit.replace(node, wide)
            return
        for user in list(node.users):
            wide = edit.call(aten.to.dtype, edit.item(new, user.args[1]), torch.float32)  # type: ignore[arg-type]
            edit.replace(user, wide)


class Halver(Rewriter):
    """A Rewriter that makes each constant's half once."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.made: dict[tuple[str, torch.dtype], fx.Node] = {}

    def half(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:  # type: ignore[override]
        """The node in half precision: a constant is converted now, anything else in every run."""
        tensor = attribute(self.module, node)
        if tensor is None:
            return node if value(node).dtype is dtype else self.call(aten.to.dtype, node, dtype)
        key = str(node.target), dtype
        if key not in self.made:
            self.made[key] = self.parameter(f"{node.name}_half", tensor.detach().to(dtype))
        return self.made[key]

    def swap(self, node: fx.Node, target: object, dtype: torch.dtype, *args: object) -> None:
        """The same call on operands of half precision, its result in float32 again."""
        with self.at(node):
            halves = [self.half(arg, dtype) if isinstance(arg, fx.Node) else arg for arg in args]
            new = self.call(target, *halves)
            wide = self.call(aten.to.dtype, new, torch.float32)
        self.replace(node, wide)
