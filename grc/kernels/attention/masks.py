"""Masks of every kind brought to one bias, one factor and one causal flag."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.match import Miss, aten, is_op, same_size, shape, value
from grc.graph.rewrite import Rewriter
from grc.kernels.attention.layout import constant, leads

# A finite score that hides a key: added to it, or written over it, float32 leaves nothing of a score of order one.
HIDDEN = -1e9

EITHER = (aten.logical_or, aten.bitwise_or, aten.__or__)
ALL = (aten.logical_and, aten.bitwise_and, aten.__and__, aten.mul)


@dataclass
class Masks:
    """What is added to the scores, who is seen (a mask and whether True hides), and what multiplies the weights."""

    added: list[fx.Node] = field(default_factory=list)
    seen: list[tuple[fx.Node, bool]] = field(default_factory=list)
    filled: list[tuple[fx.Node, float]] = field(default_factory=list)
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)

    def take(self, mask: fx.Node) -> None:
        """The mask of F.scaled_dot_product_attention."""
        if value(mask).dtype is torch.bool:
            self.seen.append((mask, False))
        else:
            self.added.append(mask)

    def fill(self, mask: fx.Node, number: Any, hides: bool = True) -> None:
        if not isinstance(number, (int, float)) or not number <= HIDDEN:
            raise Miss(f"hidden scores are set to {number}, not to -inf or to {HIDDEN:.0e} or less")
        if number == -math.inf or not hides:
            self.seen.append((mask, hides))
        else:
            self.filled.append((mask, float(number)))


@dataclass(frozen=True)
class Size:
    """Queries and keys as far as they are numbers, the heads, and whether scores are [B * H, N, M]."""

    queries: Any
    keys: Any
    heads: int
    joined: bool


def bias_of(edit: Rewriter, masks: Masks, size: Size) -> tuple[fx.Node | None, bool]:
    """One float32 or boolean mask that broadcasts to [B, H, N, M], or None, and whether it left out a causal one."""
    fixed: list[Tensor] = []
    added: list[fx.Node] = []
    seen: list[fx.Node] = []
    for node, here in (term for mask in masks.added for term in terms(mask, size)):
        tensor = constant(edit.module, node)
        if tensor is None:
            added.append(four(edit, node, here))
        else:
            fixed.append(tensor)
    for node, number in masks.filled:
        tensor = constant(edit.module, node)
        if tensor is None:
            added.append(edit.call(aten.where.Scalar, four(edit, node, size), number, 0.0))
        else:
            fixed.append(torch.where(tensor, number, 0.0))
    for mask, hides in masks.seen:
        for node, off in conjuncts(mask, hides):
            tensor = constant(edit.module, node)
            if tensor is None:
                node = four(edit, node, size)
                seen.append(edit.call(aten.logical_not.default, node) if off else node)
            else:
                fixed.append(torch.where(tensor, -math.inf, 0.0) if off else torch.where(tensor, 0.0, -math.inf))
    total, causal = known_bias(fixed, size, exact=bool(added))
    if total is not None:
        added.append(edit.parameter("attention_bias", total))
    bias = joined(edit, added, aten.add.Tensor)
    visible = joined(edit, seen, aten.logical_and.default)
    if bias is None or visible is None:
        return (visible if bias is None else bias), causal
    return edit.call(aten.where.ScalarOther, visible, bias, -math.inf), causal


def known_bias(fixed: list[Tensor], size: Size, exact: bool) -> tuple[Tensor | None, bool]:
    """The sum of constant masks without their causal part."""
    if not fixed:
        return None, False
    total = fixed[0]
    for tensor in fixed[1:]:
        total = total + tensor
    if total.dim() == 3 and size.joined and len(total) > 1:
        raise Miss(f"a constant mask for each of {len(total)} heads and users")
    hidden = total <= HIDDEN
    if not exact and not hidden.all(-1).any():
        total = total.masked_fill(hidden, -math.inf)
    total = total.float().contiguous()
    later = above(total, size)
    causal = later is not None and bool((total[..., later] == -math.inf).all())
    rest = total if later is None else total.masked_fill(later, 0.0) if causal else total
    return (None if not rest.any() else total), causal


def factor_of(edit: Rewriter, masks: Masks, size: Size) -> tuple[fx.Node | None, bool]:
    """The product of all factors, without a causal one."""
    fixed: list[Tensor] = []
    kept: list[fx.Node] = []
    for mask, hides in masks.factors:
        for node, off in [(mask, True)] if hides else [(leaf, False) for leaf in leaves(mask)]:
            tensor = constant(edit.module, node)
            if tensor is None:
                node = four(edit, node, size)
                kept.append(edit.call(aten.logical_not.default, node) if off else node)
            else:
                fixed.append((~tensor if off else tensor).float())
    causal = False
    if fixed:
        total = fixed[0]
        for tensor in fixed[1:]:
            total = total * tensor
        later = above(total, size)
        causal = later is not None and not bool(total[..., later].any())
        rest = total if later is None or not causal else total.masked_fill(later, 1.0)
        if not (rest == 1).all():
            kept.append(edit.parameter("attention_factor", total.contiguous()))
    return joined(edit, kept, aten.mul.Tensor), causal


def above(tensor: Tensor, size: Size) -> Tensor | None:
    """Where key j comes after query i, for a mask of all queries and keys."""
    if not isinstance(size.queries, int) or not isinstance(size.keys, int) or size.queries * size.keys <= 1:
        return None
    if tensor.dim() < 2 or tuple(tensor.shape[-2:]) != (size.queries, size.keys):
        return None
    return torch.ones(size.queries, size.keys, dtype=torch.bool).triu(1)


def conjuncts(node: fx.Node, hides: bool) -> list[tuple[fx.Node, bool]]:
    """A mask as all of several masks, each with whether True hides."""
    if is_op(node, aten.logical_not, aten.bitwise_not):
        return conjuncts(node.args[0], not hides)  # type: ignore[arg-type]
    if is_op(node, *(EITHER if hides else ALL)) and all(
        isinstance(a, fx.Node) and value(a).dtype is torch.bool for a in node.args[:2]
    ):
        return [leaf for a in node.args[:2] for leaf in conjuncts(a, hides)]  # type: ignore[arg-type]
    return [(node, hides)]


def leaves(node: fx.Node) -> list[fx.Node]:
    """The factors of a product of tensors."""
    return [leaf for a in node.args for leaf in leaves(a)] if combines(node, aten.mul) else [node]  # type: ignore[arg-type]


def terms(node: fx.Node, size: Size) -> list[tuple[fx.Node, Size]]:
    """The terms of a sum of tensors, also where users and heads are taken apart after it."""
    if combines(node, aten.add):
        return [term for a in node.args for term in terms(a, size)]  # type: ignore[arg-type]
    apart = leads(node) and value(node).dim() == 4 and same_size(shape(node)[1], size.heads)
    inner = node.args[0] if apart else None
    if inner is not None and value(inner).dim() == 3 and combines(inner, aten.add):
        return terms(inner, replace(size, joined=True))  # type: ignore[arg-type]
    return [(node, size)]


def combines(node: Any, packet: Any) -> bool:
    tensors = is_op(node, packet) and all(isinstance(value(a), torch.Tensor) for a in node.args)
    return tensors and len(node.args) == 2 and not node.kwargs


def joined(edit: Rewriter, nodes: list[fx.Node], with_op: Callable[..., Any]) -> fx.Node | None:
    if not nodes:
        return None
    total = nodes[0]
    for node in nodes[1:]:
        total = edit.call(with_op, total, node)
    return total


def four(edit: Rewriter, node: fx.Node, size: Size) -> fx.Node:
    """A mask of [B * H, N, M] as [B, H, N, M]; others broadcast as they are."""
    if not size.joined or value(node).dim() != 3 or shape(node)[0] == 1:
        return node
    return edit.call(aten.unflatten.int, node, 0, [-1, size.heads])
