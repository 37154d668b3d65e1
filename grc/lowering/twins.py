"""Give fused ops to their Triton twins, and have them count the ids of look-ups that lie outside of their tables."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from grc.graph.match import aten, call_arguments, is_op, value
from grc.graph.rewrite import copy_graph
from grc.kernels import CHECKED_IDS
from grc.lowering.kernel_times import KernelTimes
from grc.runtime.engines import COUNTER
from grc.runtime.mapped import TOLD


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


def all_have_twins(graph: fx.GraphModule) -> bool:
    """Whether every look-up of rows has a kernel here."""
    return all(twin_of(node) is not None for node in graph.graph.nodes if is_lookup(node))


def is_optional(module: Any | None) -> bool:
    return hasattr(module, "able")


def with_twins(
    graph: fx.GraphModule,
    device: torch.device,
    count: bool,
    without: Sequence[str] = (),
    times: KernelTimes | None = None,
    batches: Sequence[int] = (),
) -> tuple[fx.GraphModule, bool]:
    """A copy of a graph on `device` in which fused look-ups are `grc_cuda::` operators on ready-made lists, and other
    fused ops that have a kernel are such operators too, but for those named in `without`.

    With `count`, the kernels of look-ups, and those that check the ids of other look-ups, count ids outside of their tables,
    for which they read zeros or row 0, and the answer is whether they do: where by the constant COUNTER, which the runtime
    fills in, and refuses the request by that number. Look-ups alone do not where one has no kernel, whose ids would not be in
    it. With `times`, kernels are timed at these batch sizes, and look-ups take the tiles that were the fastest.
    """
    copy = copy_graph(graph)
    edit = Constants(copy, device)
    nodes = list(copy.graph.nodes)
    lookups = [node for node in nodes if is_lookup(node)]
    checks = [node for node in nodes if node.target is CHECKED_IDS.overload]
    counts = count and bool(checks or (lookups and all_have_twins(graph)))
    told = edit.constant(COUNTER, [0] * TOLD) if counts else None
    for node in nodes:
        module = twin_of(node)
        if module is None or (is_optional(module) and node.target._opname in without):
            continue
        given = call_arguments(node)
        tiles = times.tiles(copy, node, module, batches) if times and batches and node not in checks else None
        if not hasattr(module, "lists"):
            counter = (told,) if node in checks else ()
            node.args, node.kwargs, node.target = (*given.values(), *counter), {}, module.register()
            continue
        wanted = inspect.signature(module.lists).parameters
        values = module.lists(value(given["arena"]), *(given[parameter] for parameter in list(wanted)[1:]))
        if given["packing"]:
            widen(node, len(node.target._schema.returns))  # type: ignore[union-attr]
        node.args = (*given.values(), edit.constant(f"{node.name}_tables", values), told, tiles)
        node.kwargs = {}
        node.target = module.register()
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
