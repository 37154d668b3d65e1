"""Where score_topk applies: the largest scores of a linear layer over all items, some of them hidden by a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from grc.graph.match import Miss, argument, aten, attribute, is_op, same_size, shape, static, value
from grc.graph.rewrite import Rewriter
from grc.kernels.fusion import Fused, Fusion
from grc.kernels.score_topk import SCORE_TOPK

# What `scores[:, 0] = -inf`, masked_fill, where and cat become: they move and set scores without looking at them.
MASKS = (
    aten.masked_fill, aten.where, aten.fill, aten.select, aten.slice, aten.select_scatter, aten.slice_scatter,
    aten.index_put, aten.index_fill, aten.cat, aten.full_like,
)  # fmt: skip


class ScoreTopk(Fusion):
    """Retrieval over all items: score a table and keep the best k.

    Items that a constant sets to -inf, padding for one, become a bias of -inf. Items that the request names, those that the
    user has seen, are left out of as many more.
    """

    name = "score-topk"
    op = SCORE_TOPK
    anchors = (aten.topk,)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        scores, seen = seen_items(edit.module, node.args[0])
        path = scoring(scores)
        if not path:
            return None
        linear, weight = path[0], path[0].args[1]
        table = attribute(edit.module, weight)
        if table is None:
            raise Miss("the items are not a constant of the model")
        k = wanted(node)
        between = path if seen is None else [*path, node.args[0]]
        if any(user is not node and user not in between for step in between for user in step.users):
            raise Miss("the scores are read outside of the top-k too")
        bias = argument(linear, "bias")
        if len(path) > 1:
            hidden = hidden_items(edit.module, scores, linear)
            bias = hiding_bias(edit, bias, hidden, value(linear).dtype)
        items = int(table.shape[0])
        if seen is None:
            return Fused(node, edit.call(SCORE_TOPK.overload, linear.args[0], weight, bias, k), saved(between, items))
        left = items - int(shape(seen)[1]) - (int(hidden.sum()) if len(path) > 1 else 0)
        if k > left:
            raise Miss(f"of {items} items {left} may be left to show, fewer than {k}")
        more = edit.call(SCORE_TOPK.overload, linear.args[0], weight, bias, k + int(shape(seen)[1]))
        for user, answer in zip(
            node.users, unseen(edit, more, seen, k, [user.args[1] for user in node.users]), strict=True
        ):
            edit.replace(user, answer)
        return Fused(node, node, saved(between, items))  # its readers have theirs already


def unseen(edit: Rewriter, more: fx.Node, seen: fx.Node, k: int, wanted: list[Any]) -> list[fx.Node]:
    """The best k of more items, without those that were seen: their scores (0) and their ids (1), as `wanted` asks."""
    scores, ids = edit.item(more, 0), edit.item(more, 1)
    pairs = edit.call(aten.unsqueeze.default, ids, 2), edit.call(aten.unsqueeze.default, seen, 1)
    known = edit.call(aten.any.dim, edit.call(aten.eq.Tensor, *pairs), 2)
    best = edit.call(aten.topk.default, edit.call(aten.masked_fill.Scalar, scores, known, -torch.inf), k)
    places = edit.item(best, 1)
    return [edit.item(best, 0) if place == 0 else edit.call(aten.gather.default, ids, 1, places) for place in wanted]


def seen_items(module: fx.GraphModule, node: Any) -> tuple[Any, fx.Node | None]:
    """Scores [B, N] and the ids [B, L] of a request that are then set to -inf in them, each in its own row; None for none."""
    if is_op(node, aten.scatter) and value(node).dim() == 2 and argument(node, "dim") % 2 == 1:
        scores, _, ids, low = node.args
    elif is_op(node, aten.index_put) and value(node).dim() == 2 and len(node.args[1]) == 2 and not any(node.args[3:]):
        scores, (rows, ids), low = node.args[:3]
        while is_op(rows, aten.reshape):
            rows = rows.args[0]
        if not is_op(rows, aten.arange) or len(rows.args) != 1 or not same_size(shape(rows)[0], shape(scores)[0]):
            return node, None
    else:
        return node, None
    if is_op(low, aten.full, aten.full_like):
        low = argument(low, "fill_value")
    constant = attribute(module, low)
    if constant is not None and constant.numel() == 1:
        low = constant.item()
    if not isinstance(ids, fx.Node) or value(ids).dim() != 2 or ids.op == "get_attr":
        return node, None
    if low not in (-torch.inf, torch.finfo(value(node).dtype).min):
        raise Miss("items of the request are not hidden by -inf, which alone no score is below")
    if not same_size(shape(ids)[0], shape(node)[0]) or not static(shape(ids)[1]):
        raise Miss("how many items are hidden depends on the request")
    return scores, ids


def saved(path: list[fx.Node], items: int) -> str:
    written = [step for step in path if value(step).dim() and same_size(value(step).shape[-1], items)]
    launches = "1 launch" if len(written) == 1 else f"{len(written)} launches"
    return f"{launches}, {len(written) * items * value(path[0]).itemsize / 1024:.1f} KB a row"


def scoring(scores: Any) -> list[fx.Node]:
    """The linear layer that scores come from and the masks behind it; empty where there is none."""
    found: list[fx.Node] = []
    pending = [scores]
    while pending:
        step = pending.pop()
        if step in found or not isinstance(step, fx.Node):
            continue
        if is_op(step, aten.linear):
            found.append(step)
        elif is_op(step, *MASKS):
            found.append(step)
            pending += step.all_input_nodes
    linears = [step for step in found if is_op(step, aten.linear)]
    if not linears:
        if isinstance(scores, fx.Node) and any(is_op(n, aten.linear) for n in scores.all_input_nodes):
            raise Miss(f"{scores.target} stands between the scores and the top-k")
        return []
    if len(linears) > 1:
        raise Miss(f"the scores come from {len(linears)} linear layers")
    return [*linears, *(step for step in found if step is not linears[0])]


def wanted(topk: fx.Node) -> int:
    """k, of the largest scores over all items, falling."""
    rank = value(topk.args[0]).dim()
    if argument(topk, "dim") % rank != rank - 1:
        raise Miss(f"the top-k is along dimension {argument(topk, 'dim')}, not along the items")
    if not argument(topk, "largest"):
        raise Miss("the top-k takes the smallest scores")
    if not argument(topk, "sorted"):
        raise Miss("the top-k leaves its result unsorted: only the order of sorted=True is defined")
    k = argument(topk, "k")
    if not static(k):
        raise Miss("k depends on the request")
    return int(k)


def hidden_items(module: fx.GraphModule, filtered: fx.Node, linear: fx.Node) -> torch.Tensor:
    """Which of the items, bool `[N]`, the masks set to -inf: found by running them on scores that tell items apart."""
    scores = value(linear)
    if scores.dim() != 2:
        raise Miss(f"items are hidden in scores of {scores.dim()} dimensions, not [B, N]")
    items = torch.arange(int(scores.shape[1]))
    probe = torch.stack([items % 4096, items // 4096]).float()
    result = evaluated(module, linear, probe)(filtered)
    hidden = result == -torch.inf
    same = result.shape == probe.shape and bool(((result == probe) | hidden).all())
    if not same or not torch.equal(hidden[0], hidden[1]):
        raise Miss("the scores are changed by more than -inf for fixed items")
    return hidden[0]


def evaluated(module: fx.GraphModule, linear: fx.Node, probe: torch.Tensor) -> Callable[[fx.Node], Any]:
    """A function that computes a mask's node with `probe` as the scores."""
    known: dict[fx.Node, Any] = {linear: probe}

    def of(node: fx.Node) -> Any:
        if node not in known:
            constant = attribute(module, node)
            if constant is None and not is_op(node, *MASKS):
                raise Miss("which items are hidden depends on the request")
            if constant is not None:
                known[node] = constant.detach()
            else:
                args, kwargs = fx.map_arg(node.args, of), fx.map_arg(node.kwargs, of)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    return of


def hiding_bias(edit: Rewriter, bias: Any, hidden: torch.Tensor, dtype: torch.dtype) -> fx.Node:
    """The layer's bias, or zero, with -inf for hidden items."""
    own = attribute(edit.module, bias)
    if own is None and bias is not None:
        raise Miss("the bias of the scores is not a constant")
    start = torch.zeros(hidden.shape[0], dtype=dtype) if own is None else own.detach()
    return edit.parameter("item_bias", start.masked_fill(hidden, -torch.inf))
