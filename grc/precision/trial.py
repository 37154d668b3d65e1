"""A trial: run a graph as if some of its tables and layers were kept in fewer bits, without building anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from grc.errors import InputError
from grc.graph.match import argument, aten, call_arguments, is_op
from grc.kernels import CROSS, SCORE_TOPK
from grc.kernels.lookup.pooling import NO_PADDING
from grc.kernels.lookup.row_formats import FLOATS, rounded_rows
from grc.kernels.quantised_linear import simulated
from grc.kernels.quantised_linear.panels import HALVES
from grc.precision.sites import ATTENTION, HALVED, LAYER, RANKING, UNIT, Site

Tensors = list[torch.Tensor]


class Trial(fx.Interpreter):
    """The graph's answers with `formats` by site. Rounding is the kernels' own; only the order of sums may differ. On a GPU
    what is lowered is answered in half precision, in which it may overflow. Scores of ranked items never exist all at once.
    """

    def __init__(self, graph: fx.GraphModule, sites: Sequence[Site], formats: Mapping[str, str], device: str = "cpu"):
        super().__init__(graph, garbage_collect_values=True)
        self.extra_traceback = False  # an error is told as the graph itself raises it
        self.gpu = device == "cuda"
        self.layers = {
            node: formats[site.name]
            for site in sites
            if site.kind in (LAYER, RANKING) and site.name in formats
            for node in site.nodes
        }
        self.halved = {
            site.nodes[0]: FLOATS[formats[site.name]]
            for site in sites
            if site.kind in (ATTENTION, UNIT) and site.name in formats
        }
        self.tables: dict[fx.Node, dict[int, str]] = {}
        for site in sites:
            for node, feature in site.features if site.name in formats else ():
                self.tables.setdefault(node, {})[feature] = formats[site.name]

    @torch.no_grad()
    def answers(self, inputs: Sequence[torch.Tensor]) -> Tensors:
        return list(self.run(*inputs))

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers or n.target is SCORE_TOPK.overload:
            return self.layer(n, self.layers.get(n, "fp32"))
        if n in self.halved:
            args = list(self.fetch_args_kwargs_from_env(n)[0])
            for place in HALVED[n.target]:  # type: ignore[index]
                if args[place] is not None:
                    args[place] = args[place].to(self.halved[n]).float()
            return n.target(*args).to(self.halved[n]).float()  # type: ignore[operator]
        if n in self.tables and is_op(n, aten.embedding):
            table, ids = self.env[n.args[0]], self.env[n.args[1]]
            found, places = torch.unique(ids, return_inverse=True)
            refuse(found, 0, len(table))
            return self.written(rounded_rows(table[found], self.tables[n][0])[places], self.tables[n][0])
        if n in self.tables:
            return self.look_up(n, self.tables[n])
        return super().run_node(n)

    def written(self, result: torch.Tensor, form: str) -> torch.Tensor:
        """A result as it is written: what counts in 8 or 4 bits is answered in float16 on a GPU."""
        return result.to(HALVES.get(form, torch.float16)).float() if self.gpu else result

    def taken(self, operand: torch.Tensor | None, form: str) -> torch.Tensor | None:
        """An operand beside what is lowered: a GPU takes it in half precision, but with 8 or 4 bits."""
        return operand if operand is None or form not in HALVES else self.written(operand, form)

    def look_up(self, node: fx.Node, formats: Mapping[int, str]) -> Any:
        form = next((form for form in formats.values() if form in HALVES), "int8")
        given = compacted(self.named(node), formats)
        given |= {name: self.taken(given[name], form) for name in ("weights", "dense", "linear") if name in given}
        found = node.target(*given.values())  # type: ignore[operator]
        if isinstance(found, torch.Tensor):
            return self.written(found, form)
        return tuple(self.written(part, form) for part in found)

    def named(self, node: fx.Node) -> dict[str, Any]:
        """The values of a call's arguments, by name."""
        return {
            name: self.env[value] if isinstance(value, fx.Node) else value
            for name, value in call_arguments(node).items()
        }

    def layer(self, node: fx.Node, form: str) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(node)
        if node.target is SCORE_TOPK.overload:
            x, weight, bias, k = args
            return best(self.products(x, weight, bias, form), k)
        if node.target is CROSS.overload:
            x0, y, weight, bias, x = args
            product = joined(self.products(y, weight, bias, form), y, weight)
            crossed = self.taken(x0, form) * product + self.taken(x, form)
            return self.written(crossed, form) if form in HALVES else crossed
        assert is_op(node, aten.linear)
        bias = argument(node, "bias")
        given = self.env[bias] if isinstance(bias, fx.Node) else None
        return joined(self.products(args[0], args[1], given, form), args[0], args[1])

    def products(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, form: str
    ) -> Iterator[torch.Tensor]:
        """A layer's results as they are written, for some of its columns after the others."""
        if form == "fp32":
            return simulated(x, weight, bias, form)
        return (self.written(y, form) for y in simulated(x, weight, self.taken(bias, form), form))


def joined(parts: Iterable[torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A layer's results [..., N] from those for some columns after the others. Kept until then, the parts would lie between
    the blocks of the weight, and leave the heap in pieces of the weight's size."""
    result, end = x.new_empty(*x.shape[:-1], weight.shape[0]), 0
    for part in parts:
        start, end = end, end + part.shape[-1]
        result[..., start:end] = part
    return result


def best(parts: Iterable[torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of all scores and their items, from scores [..., n] of some items after the others."""
    values, items, end = torch.empty(0), torch.empty(0, dtype=torch.int64), 0
    for scores in parts:
        found = torch.topk(scores, min(k, scores.shape[-1]))
        if end:
            values, items = torch.cat([values, found.values], -1), torch.cat([items, found.indices + end], -1)
            values, places = torch.topk(values, min(k, values.shape[-1]))
            items = items.gather(-1, places)
        else:
            values, items = found
        end += scores.shape[-1]
    return values, items


def compacted(given: Mapping[str, Any], formats: Mapping[int, str]) -> dict[str, Any]:
    """A look-up's arguments on a small arena that holds just the rows it reads, those of `formats` rounded.

    A table is rounded row by row, so that these rows are what they would be in the whole table, and no copy of it is made.
    """
    arena, ids, bases, rows = given["arena"], given["ids"].clone(), given["bases"], given["rows"]
    dims = given.get("dims") or [given["dim"]] * len(bases)
    lengths = given.get("lengths") or [1] * len(bases)
    linear = given.get("linear")
    made: dict[str, list[Any]] = {"bases": [], "rows": [], "padding": [], "arena": [], "linear": []}
    column, start = 0, 0
    for f, (base, dim, padding) in enumerate(zip(bases, dims, given["padding"], strict=True)):
        own = own_ids(given, ids, f, column, lengths[f])
        column += lengths[f]
        wanted = own != padding if padding != NO_PADDING else torch.ones_like(own, dtype=torch.bool)
        found, places = torch.unique(own[wanted], return_inverse=True)
        refuse(found, f, rows[f])
        own[~wanted] = -1
        own[wanted] = places.to(own.dtype)
        found = found if len(found) else found.new_zeros(min(rows[f], 1))  # an arena has a row, though none is read
        table = arena[base : base + rows[f]] if arena.dim() == 2 else arena[base : base + rows[f] * dim].view(-1, dim)
        read = table[found]
        made["arena"].append(rounded_rows(read, formats[f]) if f in formats and len(read) else read)
        made["bases"].append(start)
        made["rows"].append(len(found))
        made["padding"].append(-1)
        if linear is not None:
            made["linear"].append(linear.reshape(-1)[base + found])
        start += len(found) * (1 if arena.dim() == 2 else dim)
    small = torch.cat([part if arena.dim() == 2 else part.reshape(-1) for part in made["arena"]])
    changed = {"arena": small, "ids": ids, "bases": made["bases"], "rows": made["rows"], "padding": made["padding"]}
    if linear is not None:
        changed["linear"] = torch.cat(made["linear"])
    return {**given, **changed}


def own_ids(given: Mapping[str, Any], ids: torch.Tensor, feature: int, column: int, length: int) -> torch.Tensor:
    """The ids of one feature, as a view of all of them."""
    offsets = given.get("offsets")
    if offsets is None:
        return ids[:, column : column + length]
    batch = (offsets.shape[0] - 1) // len(given["bases"])
    return ids[int(offsets[feature * batch]) : int(offsets[(feature + 1) * batch])]


def refuse(ids: torch.Tensor, feature: int, rows: int) -> None:
    """Raise InputError for an id of the calibration data that its table does not have."""
    bad = ids[(ids < 0) | (ids >= rows)]
    if len(bad):
        raise InputError(
            f"the calibration data has id {int(bad[0])} of feature {feature}; its table has {rows} rows",
            "leave such rows out, or compile with --on-bad-id zero",
        )
