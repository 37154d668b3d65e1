"""Apply the outcome to the graph that a GPU is given: tables, layers and attentions in fewer bits, float32 between them.

Casts around a layer, and the steps of its 8-bit rows, cost little there: Inductor computes them where the values are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, call_arguments, is_op, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import BAG_FM, CROSS, SCALED_LINEAR, SCORE_TOPK
from grc.kernels.quantised_linear.panels import HALVES
from grc.kernels.scaled_linear import rows_in_8_bits, weight_in_8_bits
from grc.precision.sites import HALVED, LAYER, LOOKUPS, RANKING, TABLE, Site, layer_weight

OCTETS = ("int8", "fp8")


def halved_layers(sites: Sequence[Site], formats: Mapping[str, str]) -> dict[str, str]:
    """The same outcome with its 8-bit layers in float16: nearer to float32, and with few rows often faster."""
    layers = {site.name for site in sites if site.kind == LAYER}
    return {name: "fp16" if name in layers and form in OCTETS else form for name, form in formats.items()}


def tables_of_bytes(sites: Sequence[Site], formats: Mapping[str, str]) -> dict[str, str]:
    """The formats of tables whose rows hold a scale; others are tensors of a dtype."""
    tables = {site.name for site in sites if site.kind == TABLE}
    return {name: form for name, form in formats.items() if name in tables and form not in HALVES}


def narrowed(graph: fx.GraphModule, sites: Sequence[Site], formats: Mapping[str, str]) -> fx.GraphModule:
    """A copy of the graph, its tables of bytes in place, in which the other sites are narrow."""
    copy = copy_graph(graph)
    arenas = {site.arena: formats.get(site.name, "fp32") for site in sites if site.kind == TABLE}
    edit = Narrower(copy)
    layers = {site.name: formats[site.name] for site in sites if site.kind in (LAYER, RANKING) and site.name in formats}
    for node in list(copy.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in HALVED and node.name in formats:
            dtype, args = HALVES[formats[node.name]], list(node.args)
            with edit.at(node):
                for place in HALVED[node.target]:
                    args[place] = None if args[place] is None else edit.half(args[place], dtype)  # type: ignore[arg-type]
            edit.swap(node, node.target, dtype, *args)
        elif (weight := layer_weight(node)) is not None:
            form = layers.get(str(weight.target))
            if form in OCTETS:
                narrow_layer(edit, node, form)
            elif form is not None and node.target is SCORE_TOPK.overload:
                halve_items(edit, node, HALVES[form])
            elif form is not None:
                halve_layer(edit, node, HALVES[form])
        elif node.target in LOOKUPS or is_op(node, aten.embedding):
            place = node.args[0]
            form = arenas.get(str(place.target)) if isinstance(place, fx.Node) else None
            if form in HALVES:
                halve_lookup(edit, node, HALVES[form])
    edit.finish()
    return copy


def halve_layer(edit: Narrower, node: fx.Node, dtype: torch.dtype) -> None:
    args = node.args if node.target is CROSS.overload else (*node.args[:2], argument(node, "bias"))
    with edit.at(node):
        halves = [edit.half(arg, dtype) if isinstance(arg, fx.Node) else arg for arg in args]
    edit.swap(node, node.target, dtype, *halves)


def halve_items(edit: Narrower, node: fx.Node, dtype: torch.dtype) -> None:
    """Scores of half precision, ranked as such and then widened."""
    with edit.at(node):
        new = edit.call(node.target, *(edit.half(a, dtype) if isinstance(a, fx.Node) else a for a in node.args))
        for user in list(node.users):
            item = edit.item(new, user.args[1])  # type: ignore[arg-type]
            edit.replace(user, edit.call(aten.to.dtype, item, torch.float32) if user.args[1] == 0 else item)


def narrow_layer(edit: Narrower, node: fx.Node, form: str) -> None:
    """x @ W.T + bias in 8 bits; a cross layer's product and sum with x0 and x stay in float32."""
    crossed = node.target is CROSS.overload
    x, weight, bias = node.args[1:4] if crossed else (*node.args[:2], argument(node, "bias"))
    with edit.at(node):
        steps, size, shift = edit.octets(x, form)
        product = edit.call(SCALED_LINEAR.overload, steps, size, shift, *edit.weight(weight, form), bias)
        new = edit.call(aten.to.dtype, product, torch.float32)
        if crossed:
            new = edit.call(aten.add.Tensor, edit.call(aten.mul.Tensor, node.args[0], new), node.args[4])
    edit.replace(node, new)


def halve_lookup(edit: Narrower, node: fx.Node, dtype: torch.dtype) -> None:
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


class Narrower(Rewriter):
    """A Rewriter that makes each value's half, its 8-bit rows and each constant's steps once."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.halves: dict[tuple[str, torch.dtype], fx.Node] = {}
        self.rows: dict[tuple[fx.Node, str], tuple[fx.Node, ...]] = {}
        self.weights: dict[tuple[str, str], list[fx.Node | None]] = {}

    def half(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in half precision: a constant is converted now, anything else in every run."""
        tensor = attribute(self.module, node)
        if tensor is None:
            if value(node).dtype is dtype:
                return node
            if is_op(node, aten.to) and value(node.args[0]).dtype is dtype:  # a half that was widened for its readers
                return node.args[0]  # type: ignore[return-value]
            return self.call(aten.to.dtype, node, dtype)
        key = str(node.target), dtype
        if key not in self.halves:
            self.halves[key] = self.parameter(f"{node.name}_half", tensor.detach().to(dtype))
        return self.halves[key]

    def octets(self, x: fx.Node, form: str) -> tuple[fx.Node, ...]:
        """The rows of x in 8 bits, for all layers that read it."""
        if (x, form) not in self.rows:
            self.rows[x, form] = self.inline(lambda rows: rows_in_8_bits(rows, form), x)
        return self.rows[x, form]

    def weight(self, node: fx.Node, form: str) -> list[fx.Node | None]:
        """Steps, scales and sums of a constant weight."""
        key = str(node.target), form
        if key not in self.weights:
            tensor = attribute(self.module, node)
            assert tensor is not None
            made = zip(("steps", "scale", "sums"), weight_in_8_bits(tensor.detach(), form), strict=True)
            self.weights[key] = [None if t is None else self.parameter(f"{node.name}_{name}", t) for name, t in made]
        return self.weights[key]

    def swap(self, node: fx.Node, target: object, dtype: torch.dtype, *args: object) -> None:
        """The call on operands of half precision in place of a node, its result in float32 again."""
        with self.at(node):
            wide = self.call(aten.to.dtype, self.call(target, *args), torch.float32)
        self.replace(node, wide)
