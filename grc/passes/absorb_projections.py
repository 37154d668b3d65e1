"""Attention of one query over a history, without a projection of the history: it moves to the query, and to the result.

Target attention (as in SIM, ETA and TWIN) and the last layer of a model that scores from the last step ask once for each user:
q (W_k x)^T = (W_k^T q) x^T, and weights (x W_v^T) = (weights x) W_v^T, so that each step is read and multiplied by neither
weight (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2). All heads then read the same rows: they are the queries of one head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.attention import SILU, SOFTMAX
from grc.graph.match import Miss, argument, aten, attribute, is_op, only_user, same_size, shape, static, value
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass, rewritten
from grc.passes.pieces import Piece, piece_of

VIEWS = (aten.unflatten, aten.reshape, aten.flatten, aten.unsqueeze, aten.squeeze)
UNKNOWN_STEPS = 64  # as many are reckoned with where their number varies
PAYS = 2  # times fewer multiplications
SMALL = 1 << 18  # numbers of weights, which grow with the heads, that one row's request reads as fast as before


@dataclass(frozen=True)
class Layer:
    """A linear layer of constants, or some columns of it: of `rows`, whose last dimension is the weight's."""

    node: fx.Node
    rows: fx.Node
    weight: Tensor  # float64 [columns, depth]
    bias: Tensor | None  # float64 [columns]

    @property
    def depth(self) -> int:
        return self.weight.shape[1]

    def heads(self, count: int) -> Tensor:
        return self.weight.unflatten(0, (count, -1))


@dataclass(frozen=True)
class AbsorbProjections(Pass):
    """q' = W_k^T q and y = W_v r of one query for the keys W_k x and the values W_v x of every step."""

    name = "absorb-projections"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        calls = [node for node in graph.graph.nodes if is_op(node, torch.ops.grc.attention)]
        return rewritten(edit, [("absorbed projections", node) for node in calls], lambda node: absorb(edit, node))


def absorb(edit: Rewriter, node: fx.Node) -> str | None:
    """Rewrite one attention; what that saves, or None where it has many queries, or keys and values of other kinds."""
    q, k, v = node.args[:3]
    sizes = [size for operand in (q, k, v) for size in shape(operand)[2:]]  # type: ignore[arg-type]
    if not same_size(shape(q)[1], 1) or argument(node, "causal") or not all(map(static, sizes)):  # type: ignore[arg-type]
        return None
    keys, values = projected(edit, k), projected(edit, v)
    if keys is None or values is None or not private(node, keys, values):
        return None
    heads, steps = int(shape(k)[2]), shape(k)[1]  # type: ignore[arg-type]
    if not pays(keys, values, heads, int(steps) if static(steps) else UNKNOWN_STEPS):
        return None
    check_biases(argument(node, "kind"), argument(node, "bias"), keys, values)
    query = multiplied(edit, query_of(edit, q, keys.node, values.node), q, diagonal(keys.heads(heads).transpose(1, 2)))
    query = edit.reshape(query, -1, heads, 1, keys.depth)
    read = {rows: edit.call(aten.unsqueeze.default, rows, 2) for rows in dict.fromkeys((keys.rows, values.rows))}
    masks = [of_queries(edit, mask) for mask in node.args[3:5]]
    made = edit.call(node.target, query, read[keys.rows], read[values.rows], *masks, *node.args[5:])
    weight, gain, last = diagonal(values.heads(heads)), argument(node, "gain"), reader_of(edit, node)
    added = None if values.bias is None else values.bias * gain
    if last is None:
        joined = edit.reshape(made, -1, 1, heads * values.depth)
        edit.replace(node, linear(edit, joined, weight, added))
    else:
        joined = edit.reshape(made, -1, *map(int, shape(last.rows)[1:-1]), heads * values.depth)
        both = [last.weight @ added] if added is not None else []
        both += [last.bias] if last.bias is not None else []
        edit.replace(last.node, linear(edit, joined, last.weight @ weight, sum(both) if both else None))
    return f"keys and values of {steps} steps"


def pays(keys: Layer, values: Layer, heads: int, steps: int) -> bool:
    """Whether it saves products, and a request of one row does not read much larger weights for that."""
    numbers = keys.weight.numel() + values.weight.numel()
    before = steps * (numbers + len(keys.weight) + len(values.weight))
    after = heads * (numbers + steps * (keys.depth + values.depth))
    return PAYS * after <= before and heads * numbers <= max(SMALL, numbers)


def check_biases(kind: int, mask: Any, keys: Layer, values: Layer) -> None:
    """Softmax takes no notice of what is added to all scores, and weights that sum to one give what is added to all values.

    Raises Miss where that is not so.
    """
    if kind == SILU and (keys.bias is not None or values.bias is not None):
        raise Miss("keys or values have a bias, and weights that are no softmax do not sum to one")
    if kind == SOFTMAX and mask is not None and values.bias is not None:
        raise Miss("values have a bias, which a query that sees no key does not get")


def projected(edit: Rewriter, node: Any) -> Layer | None:
    """The layer of constants of which [B, M, H, D] are the columns, or some of them, head by head."""
    if not is_op(node, aten.unflatten, aten.reshape) or only_user(node) is None:
        return None
    flat: Any = node.args[0]
    wide = value(flat).dim() == 3 and same_size(shape(flat)[1], shape(node)[1])
    if not wide or not same_size(shape(flat)[2], shape(node)[2] * shape(node)[3]):
        return None
    piece = piece_of(flat)
    if piece is None:
        return layer_of(edit, flat)
    layer = layer_of(edit, piece.source) if piece.dim == 2 and piece.split is None else None
    return None if layer is None else cut(layer, piece)


def cut(layer: Layer, piece: Piece) -> Layer:
    columns = slice(piece.start, piece.stop)
    return replace(layer, weight=layer.weight[columns], bias=None if layer.bias is None else layer.bias[columns])


def layer_of(edit: Rewriter, node: Any) -> Layer | None:
    if not is_op(node, aten.linear):
        return None
    weight, bias = attribute(edit.module, node.args[1]), argument(node, "bias")
    added = None if bias is None else attribute(edit.module, bias)
    if weight is None or weight.dim() != 2 or weight.dtype is not torch.float32 or (bias is not None and added is None):
        return None
    some = added is not None and bool(added.any())
    return Layer(node, node.args[0], weight.detach().double(), added.detach().double() if some else None)  # type: ignore[union-attr]


def private(attention: fx.Node, *layers: Layer) -> bool:
    """Whether nothing but this attention reads the layers, which are dead without it."""
    seen = {layer.node for layer in layers}
    waiting = list(seen)
    while waiting:
        for user in waiting.pop().users:
            if user is attention:
                continue
            if not is_op(user, *VIEWS, aten.slice):
                return False
            waiting.append(user)
    return True


def query_of(edit: Rewriter, node: Any, *shared: fx.Node) -> Layer | None:
    """The layer that makes the query and nothing else, but for what is in `shared`; of one step where it is one of many."""
    while is_op(node, *VIEWS) and only_user(node) is not None:
        node = node.args[0]
    pieces: list[Piece] = []
    while is_op(node, aten.slice) and only_user(node) is not None and (piece := piece_of(node)) is not None:
        pieces.append(piece)
        node = node.args[0]
    layer = layer_of(edit, node)
    if layer is None or (only_user(node) is None and node not in shared):
        return None
    for piece in reversed(pieces):
        if piece.dim == value(node).dim() - 1:
            layer = cut(layer, piece)
        else:
            layer = replace(layer, rows=edit.call(aten.slice.Tensor, layer.rows, piece.dim, piece.start, piece.stop))
    return layer


def reader_of(edit: Rewriter, node: fx.Node) -> Layer | None:
    """The layer that alone reads the result, all heads of it."""
    width, user = shape(node)[-1], only_user(node)
    while is_op(user, *VIEWS):
        user = only_user(user)  # type: ignore[arg-type]
    layer = layer_of(edit, user)
    fits = layer is not None and layer.depth == width and all(static(size) for size in shape(layer.rows)[1:])
    return layer if fits else None


def diagonal(heads: Tensor) -> Tensor:
    """[heads * columns, heads * depth]: each head's weight [columns, depth] beside those of the others."""
    return torch.block_diag(*heads)


def multiplied(edit: Rewriter, layer: Layer | None, node: Any, weight: Tensor) -> fx.Node:
    """What `weight` makes of a query [B, 1, H, D]; one layer where a layer made that."""
    if layer is None:
        return linear(edit, edit.reshape(node, -1, weight.shape[1]), weight, None)
    return linear(edit, layer.rows, weight @ layer.weight, None if layer.bias is None else weight @ layer.bias)


def linear(edit: Rewriter, rows: fx.Node, weight: Tensor, bias: Tensor | None) -> fx.Node:
    added = None if bias is None else edit.parameter("absorbed_bias", bias.float())
    return edit.call(aten.linear.default, rows, edit.parameter("absorbed_weight", weight.float().contiguous()), added)


def of_queries(edit: Rewriter, mask: Any) -> Any:
    """A mask [..., H, 1, M] of heads as one of queries, [..., 1, H, M]."""
    if mask is None or value(mask).dim() < 3 or same_size(shape(mask)[-3], 1):
        return mask
    return edit.call(aten.transpose.int, mask, -3, -2)
