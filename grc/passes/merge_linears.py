"""Linear layers that read the same row become one: the experts of a mixture and their gates, the first layers of towers, the
heads of several tasks.

Measured on a CPU: faster at a few rows, as fast at a thousand. Layers over the steps of a history, an attention's
queries, keys and values, gain nothing there, since reading them apart again costs what one product saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.match import argument, aten, attribute, is_op, only_user, same_size, shape, source_text, value, where
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass

ACTIVATIONS = (aten.relu, aten.gelu, aten.silu, aten.sigmoid, aten.tanh)  # of which a product's epilogue takes one
SHARED = 1 << 16  # numbers of a weight that may be stored once more, where one of its layers stays alone
MANY = 4  # layers of which one product is faster than each with its epilogue
WIDEST = 1024  # columns of a layer from which on it is no call that is worth saving


Constants = dict[tuple[Any, ...], tuple[fx.Node, fx.Node | None]]


@dataclass(frozen=True)
class Member:
    """A linear layer of constants, and what its activation, if it has one, makes of it."""

    linear: fx.Node
    last: fx.Node
    weight: Tensor
    bias: Tensor | None

    @property
    def width(self) -> int:
        return len(self.weight)


@dataclass(frozen=True)
class MergeLinears(Pass):
    """One product for all layers of the same input and activation, of which each reader takes its columns."""

    name = "merge-linears"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        groups: dict[Any, list[Member]] = {}
        for node in graph.graph.nodes:
            member = member_of(edit, node)
            if member is not None:
                activation = (
                    None if member.last is node else (member.last.target, member.last.args[1:], str(member.last.kwargs))
                )
                groups.setdefault((node.args[0], member.weight.dtype, activation), []).append(member)
        made: Constants = {}
        changes = [merge(edit, members, made) for members in groups.values() if pays(members)]
        if changes:
            edit.finish()
        return changes


def member_of(edit: Rewriter, node: fx.Node) -> Member | None:
    """A layer that may join others: of rows, and of constants that nothing else reads than layers."""
    if not is_op(node, aten.linear) or not all(is_op(user, aten.linear) for user in node.args[1].users):  # type: ignore[union-attr]
        return None
    weight, bias = attribute(edit.module, node.args[1]), argument(node, "bias")
    added = None if bias is None else attribute(edit.module, bias)
    if weight is None or (only_user(node.args[1]) is None and weight.numel() > SHARED):  # type: ignore[arg-type]
        return None
    rows = value(node).dim() > 1 and all(same_size(size, 1) for size in shape(node)[1:-1])
    if not rows or weight.dim() != 2 or len(weight) > WIDEST or (bias is not None and added is None):
        return None
    user = only_user(node)
    last = user if is_op(user, *ACTIVATIONS) else node  # type: ignore[assignment]
    return Member(node, last, weight.detach(), None if added is None else added.detach())


def pays(members: Sequence[Member]) -> bool:
    """Whether one product is worth more than the epilogues of its parts, their sums and products with other values."""
    return len(members) >= MANY or (len(members) > 1 and not any(has_epilogue(member) for member in members))


def has_epilogue(member: Member) -> bool:
    reader = only_user(member.last)
    return reader is not None and is_op(reader, aten.add, aten.mul) and all(isinstance(a, fx.Node) for a in reader.args)


def merge(edit: Rewriter, members: Sequence[Member], made: Constants) -> Change:
    first = members[0]
    count = f"{len(members)} linear layers -> 1"
    change = Change(count, where(first.linear), source_text(first.linear), saves=f"{len(members) - 1} launches")
    with edit.at(first.linear):
        whole = edit.call(aten.linear.default, first.linear.args[0], *constants(edit, members, made))
        if first.last is not first.linear:
            whole = edit.call(first.last.target, whole, *first.last.args[1:], **first.last.kwargs)
        start, dim = 0, value(whole).dim() - 1
        for member in members:
            edit.replace(member.last, edit.call(aten.slice.Tensor, whole, dim, start, start + member.width))
            start += member.width
    return change


def constants(edit: Rewriter, members: Sequence[Member], made: Constants) -> tuple[fx.Node, fx.Node | None]:
    """The weight of all members and their bias, if any has one; once for layers that are applied to several inputs."""
    key = tuple((member.linear.args[1], argument(member.linear, "bias")) for member in members)
    if key not in made:
        name = f"{key[0][0].name}_and_{len(members) - 1}_more"  # type: ignore[union-attr]
        weight, bias = edit.parameter(name, torch.cat([member.weight for member in members])), None
        if any(member.bias is not None for member in members):
            zeros = members[0].weight.new_zeros
            parts = [zeros(member.width) if member.bias is None else member.bias for member in members]
            bias = edit.parameter(f"{name}_bias", torch.cat(parts))
        made[key] = weight, bias
    return made[key]
