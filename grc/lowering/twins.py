"""Give fused ops to their Triton twins, and count the ids of look-ups that lie outside of their tables."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from grc.graph.match import aten, call_arguments, is_op, value
from grc.graph.rewrite import copy_graph


def twin_of(node: fx.Node) -> Any | None:
    """The module of the Triton kernel that can take this call's place, or None."""
    name = node.target._opname if getattr(node.target, "namespace", "") == "grc" else ""  # type: ignore[union-attr]
    if not name or importlib.util.find_spec(f"grc.kernels.{name}.triton") is None:
        return None
    module, given = importlib.import_module(f"grc.kernels.{name}.triton"), call_arguments(node)
    if not hasattr(module, "lists"):
        values = (value(a) if isinstance(a, fx.Node) else a for a in given.values())
        return module if not is_optional(module) or module.able(*values) else None
    rows = importlib.import_module("grc.kernels.rows")
    dims = given.get("dims") or [given["dim"]]
    return module if rows.able(value(given["arena"]), dims, given["packing"]) else None


def optional_twins(graph: fx.GraphModule) -> list[str]:
    """The names of the fused ops that a kernel could take and Inductor could too: which is faster must be measured."""
    if importlib.util.find_spec("triton") is None:
        return []  # no package with kernels can be built here, and its engine says why
    names = [n.target._opname for n in graph.graph.nodes if n.op == "call_function" and is_optional(twin_of(n))]
    return list(dict.fromkeys(names))


def is_lookup(node: fx.Node) -> bool:
    """Whether a call reads rows of an arena."""
    own = getattr(node.target, "namespace", "") == "grc"
    return own and any(argument.name == "arena" for argument in node.target._schema.arguments)  # type: ignore[union-attr]


def is_optional(module: Any | None) -> bool:
    return hasattr(module, "able")


def with_twins(
    graph: fx.GraphModule, device: torch.device, count: bool, without: Sequence[str] = ()
) -> tuple[fx.GraphModule, bool]:
    """A copy of a graph on `device` in which fused look-ups are `grc_cuda::` operators on ready-made lists, and other
    fused ops that have a kernel are such operators too, but for those named in `without`.

    With `count`, the number of ids outside of their tables (int64, 0-dim) follows the outputs, and the answer is whether
    it does: the kernels read zeros for such ids, and the runtime refuses the request by this number. It does not where one
    look-up has no kernel, whose ids would not be in it.
    """
    copy = copy_graph(graph)
    edit = Constants(copy, device)
    counted: list[fx.Node] = []
    lookups = sum(is_lookup(node) for node in copy.graph.nodes)
    for node in list(copy.graph.nodes):
        module = twin_of(node)
        if module is None or (is_optional(module) and node.target._opname in without):
            continue
        given = call_arguments(node)
        if not hasattr(module, "lists"):
            node.args, node.kwargs, node.target = tuple(given.values()), {}, module.register()
            continue
        wanted = inspect.signature(module.lists).parameters
        values = module.lists(value(given["arena"]), *(given[parameter] for parameter in list(wanted)[1:]))
        answers = len(node.target._schema.returns)  # type: ignore[union-attr]
        if given["packing"]:
            widen(node, answers)
        node.args = (*given.values(), edit.constant(f"{node.name}_tables", values))
        node.kwargs = {}
        node.target = module.register()
        with copy.graph.inserting_after(node):
            counted.append(copy.graph.call_function(operator.getitem, (node, answers)))
            if answers == 1:
                only = copy.graph.call_function(operator.getitem, (node, 0))
                node.replace_all_uses_with(only, delete_user_cb=lambda user, keep=(only, counted[-1]): user not in keep)
                only.meta = dict(node.meta)
    counts = count and 0 < len(counted) == lookups
    if counts:
        add_output(copy.graph, counted)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy, counts


def widen(node: fx.Node, answers: int) -> None:
    """Cast the answers of a look-up of 8 or 4 bits to float32, which its readers expect: the kernel gives float16."""
    for place in [node] if answers == 1 else list(node.users):
        with place.graph.inserting_after(place):
            wide = place.graph.call_function(aten.to.dtype, (place, torch.float32))
        wide.meta = dict(place.meta)
        place.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
        for user in list(wide.users):
            if is_op(user, aten.to) and user.args[1] is torch.float16:
                user.replace_all_uses_with(place)


class Constants:
    """Adds int64 constants on one device to the top of a graph."""

    def __init__(self, module: fx.GraphModule, device: torch.device):
        self.module = module
        self.device = device

    def constant(self, name: str, values: Any) -> fx.Node:
        self.module.register_buffer(name, torch.tensor(list(values), dtype=torch.int64, device=self.device))
        with self.module.graph.inserting_before(next(iter(self.module.graph.nodes))):
            return self.module.graph.get_attr(name)


def add_output(graph: fx.Graph, counts: list[fx.Node]) -> None:
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        total = counts[0]
        for other in counts[1:]:
            total = graph.call_function(operator.add, (total, other))
    output.args = ((*output.args[0], total),)
