"""Rules for cat, stack, split and slice: what is cut and joined again is found as the value it was cut from."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from grc.graph.match import argument, aten, is_op, same_size, shape, static, value
from grc.graph.rewrite import Rewriter

SPLITS = (aten.split_with_sizes, aten.split, aten.chunk, aten.unsafe_split, aten.unsafe_chunk)


def inferred_sizes(sizes: tuple[Any, ...]) -> list[int] | None:
    """Sizes with -1 for the one that is symbolic; None where two are, or where a zero leaves -1 undefined."""
    symbolic = [i for i, s in enumerate(sizes) if not static(s)]
    if len(symbolic) > 1 or (symbolic and any(s == 0 for s in sizes if static(s))):
        return None
    return [-1 if i in symbolic else int(s) for i, s in enumerate(sizes)]


def stack_to_cat(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """stack of `[B, D]` along 1, and cat of `[B, k, D]` along 1: a reshape of one cat of `[B, k*D]`.

    So is a cat of `[B, 1, D]` along 2, which is how rows are joined that were looked up with ids `[B, 1]`.
    """
    if is_op(node, aten.stack):
        parts = list(node.args[0])  # type: ignore[arg-type]
        dim = argument(node, "dim") % (value(parts[0]).dim() + 1)
        if dim != 1 or any(value(p).dim() != 2 for p in parts):
            return None
    elif is_op(node, aten.cat):
        parts = list(node.args[0])  # type: ignore[arg-type]
        if value(node).dim() != 3 or any(value(p).dim() != 3 for p in parts):
            return None
        dim = argument(node, "dim") % 3
        if dim != 1 and (dim != 2 or any(not same_size(shape(p)[1], 1) for p in parts)):
            return None
    else:
        return None
    sizes = inferred_sizes(shape(node))
    if sizes is None or sizes[1] == -1 or sizes[2] == -1:
        return None
    if not all(static(s) for p in parts for s in shape(p)[1:]):
        return None
    flat = [p if value(p).dim() == 2 else flat_rows(edit, p) for p in parts]
    joined = flat[0] if len(flat) == 1 else edit.call(aten.cat.default, flat, 1)
    return edit.call(aten.reshape.default, joined, sizes)


def flat_rows(edit: Rewriter, node: fx.Node) -> fx.Node:
    """`[B, k, D]` as `[B, k*D]`, looking through a reshape that came from there."""
    width = int(shape(node)[1]) * int(shape(node)[2])
    if is_op(node, aten.reshape):
        inner = node.args[0]
        if value(inner).dim() == 2 and same_size(shape(inner)[1], width) and same_size(shape(inner)[0], shape(node)[0]):  # type: ignore[arg-type]
            return inner  # type: ignore[return-value]
    return edit.reshape(node, -1, width)


def flatten_cat(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """A cat of cats along the same dimension is one cat; a cat of one value is that value."""
    if not is_op(node, aten.cat):
        return None
    dim = argument(node, "dim") % value(node).dim()
    parts = list(node.args[0])  # type: ignore[arg-type]
    if len(parts) == 1:
        return parts[0]
    if not any(is_op(p, aten.cat) and argument(p, "dim") % value(p).dim() == dim for p in parts):
        return None
    flat: list[fx.Node] = []
    for part in parts:
        inner = is_op(part, aten.cat) and argument(part, "dim") % value(part).dim() == dim
        flat += list(part.args[0]) if inner else [part]
    return edit.call(aten.cat.default, flat, dim)


@dataclass(frozen=True)
class Piece:
    """`start..stop` of a value along one dimension: elements, or results of `split` where their sizes are not known."""

    source: fx.Node
    dim: int
    start: int
    stop: int
    split: fx.Node | None = None

    @property
    def whole(self) -> bool:
        """True for all of the source."""
        if self.split is not None:
            return self.start == 0 and self.stop == len(value(self.split))
        return self.start == 0 and same_size(shape(self.source)[self.dim], self.stop)


def piece_of(node: Any) -> Piece | None:
    """What a value was cut from by slice or by one of the splits."""
    if is_op(node, aten.slice) and argument(node, "step") == 1:
        source, start = node.args[0], argument(node, "start") or 0
        dim = argument(node, "dim") % value(node).dim()
        size, taken = shape(source)[dim], shape(node)[dim]
        if not isinstance(start, int) or not static(taken) or (start < 0 and not static(size)):
            return None
        start = start + int(size) if start < 0 else start
        return Piece(source, dim, start, start + int(taken))
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or not is_op(node.args[0], *SPLITS):
        return None
    split, index = node.args
    source, dim = split.args[0], argument(split, "dim")  # type: ignore[union-attr, arg-type]
    dim = dim % value(source).dim()
    sizes = [part.shape[dim] for part in value(split)]
    if not isinstance(index, int) or index < 0:
        return None
    if not all(static(size) for size in sizes):
        return Piece(source, dim, index, index + 1, split)  # type: ignore[arg-type]
    start = sum(sizes[:index])
    return Piece(source, dim, start, start + sizes[index])  # type: ignore[arg-type]


def cat_of_pieces(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """A cat of pieces that lay side by side is the value that they were cut from, or one slice of it."""
    if not is_op(node, aten.cat):
        return None
    dim = argument(node, "dim") % value(node).dim()
    parts = list(node.args[0])  # type: ignore[arg-type]
    runs: list[tuple[list[fx.Node], Piece | None]] = []
    for part in parts:
        piece = piece_of(part)
        if piece is not None and piece.dim != dim:
            piece = None
        before = runs[-1][1] if runs else None
        if piece is not None and before is not None and touching(before, piece):
            runs[-1] = ([*runs[-1][0], part], Piece(piece.source, dim, before.start, piece.stop, piece.split))
        else:
            runs.append(([part], piece))
    joined: list[fx.Node] = []
    for members, piece in runs:
        if len(members) == 1 or piece is None or (piece.split is not None and not piece.whole):
            joined += members
        elif piece.whole:
            joined.append(piece.source)
        else:
            joined.append(edit.call(aten.slice.Tensor, piece.source, dim, piece.start, piece.stop))
    if len(joined) == len(parts):
        return None
    return joined[0] if len(joined) == 1 else edit.call(aten.cat.default, joined, dim)


def pieces_across(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """All pieces of one value, of one size, joined along another dimension or stacked: a reshape and a permute.

    AutoInt (Song et al. 2019) makes its heads by the one and joins them by the other.
    """
    if not is_op(node, aten.cat, aten.stack):
        return None
    pieces = [piece_of(part) for part in node.args[0]]  # type: ignore[union-attr]
    first, to = pieces[0], argument(node, "dim") % value(node).dim()
    if first is None or len(pieces) < 2 or (is_op(node, aten.cat) and to == first.dim):
        return None
    source, dim, size = first.source, first.dim, first.stop - first.start
    alike = [Piece(source, dim, at * size, at * size + size) for at in range(len(pieces))]
    if pieces != alike or not Piece(source, dim, 0, len(pieces) * size).whole:
        return None
    around = shape(source)
    cut = inferred_sizes((*around[:dim], len(pieces), size, *around[dim + 1 :]))
    joined = inferred_sizes(shape(node))
    if cut is None or joined is None:
        return None
    order = [d for d in range(len(cut)) if d != dim]
    order.insert(to, dim)
    new = edit.call(aten.reshape.default, source, cut)
    if order != sorted(order):
        new = edit.call(aten.permute.default, new, order)
    return new if is_op(node, aten.stack) else edit.call(aten.reshape.default, new, joined)


def touching(left: Piece, right: Piece) -> bool:
    return left.source is right.source and left.split is right.split and left.stop == right.start


def piece_of_cat(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """A piece of a cat that begins and ends where operands do is those operands."""
    piece = piece_of(node)
    if piece is None or piece.split is not None or not is_op(piece.source, aten.cat):
        return None
    if argument(piece.source, "dim") % value(piece.source).dim() != piece.dim:
        return None
    parts: Sequence[fx.Node] = piece.source.args[0]  # type: ignore[assignment]
    inside: list[fx.Node] = []
    start = 0
    for part in parts:
        size = shape(part)[piece.dim]
        if not static(size):
            return None
        if start < piece.stop and start + size > piece.start:
            if start < piece.start or start + size > piece.stop:
                return None
            inside.append(part)
        start += int(size)
    if not inside:
        return None
    return inside[0] if len(inside) == 1 else edit.call(aten.cat.default, inside, piece.dim)
