"""Linear layers that read the same row become one: the experts of a mixture and their gates, the first layers of towers, the
heads of several tasks.

Measured on a CPU: 1.1 to 1.5 times as fast at one row, as fast at 1024. Layers over the steps of a history, an attention's
queries, keys and values, gain nothing there, since reading them apart again costs what one product saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.match import argument, aten, attribute, is_op, only_user, source_text, value, where
from grc.graph.rewrite import Rewriter
from grc.kernels.packed_linear.activations import activation_code
from grc.passes.manager import Change, Pass

WIDEST = 1024  # columns of a layer from which on it is no call that is worth saving


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
        changes = [merge(edit, members) for members in groups.values() if len(members) > 1]
        if changes:
            edit.finish()
        return changes


def member_of(edit: Rewriter, node: fx.Node) -> Member | None:
    """A layer that may join others: one whose sums and products with other values are not its epilogue."""
    if not is_op(node, aten.linear) or only_user(node.args[1]) is None:  # type: ignore[arg-type]
        return None
    weight, bias = attribute(edit.module, node.args[1]), argument(node, "bias")
    added = None if bias is None else attribute(edit.module, bias)
    rows = value(node).dim() == 2
    if not rows or weight is None or weight.dim() != 2 or len(weight) > WIDEST or (bias is not None and added is None):
        return None
    user = only_user(node)
    last = user if user is not None and activation_code(user) else node
    reader = only_user(last)
    if reader is not None and is_op(reader, aten.add, aten.mul) and all(isinstance(a, fx.Node) for a in reader.args):
        return None
    return Member(node, last, weight.detach(), None if added is None else added.detach())


def merge(edit: Rewriter, members: Sequence[Member]) -> Change:
    first = members[0]
    change = Change(f"{len(members)} linear layers -> 1", where(first.linear), source_text(first.linear),
                    saves=f"{len(members) - 1} launches")  # fmt: skip
    name = f"{first.linear.args[1].name}_and_{len(members) - 1}_more"  # type: ignore[union-attr]
    with edit.at(first.linear):
        weight = edit.parameter(name, torch.cat([member.weight for member in members]))
        bias = None
        if any(member.bias is not None for member in members):
            zeros = first.weight.new_zeros
            parts = [zeros(member.width) if member.bias is None else member.bias for member in members]
            bias = edit.parameter(f"{name}_bias", torch.cat(parts))
        whole = edit.call(aten.linear.default, first.linear.args[0], weight, bias)
        if first.last is not first.linear:
            whole = edit.call(first.last.target, whole, *first.last.args[1:], **first.last.kwargs)
        start = 0
        for member in members:
            edit.replace(member.last, edit.call(aten.slice.Tensor, whole, 1, start, start + member.width))
            start += member.width
    return change
