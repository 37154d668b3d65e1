"""Where score_topk applies: the largest scores of a linear layer over all items, some of them hidden by a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from grc.graph.match import Miss, argument, aten, attribute, is_op, same_size, static, value
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

    Items that a constant sets to -inf, padding for one, become a bias of -inf.
    """

    name = "score-topk"
    op = SCORE_TOPK
    anchors = (aten.topk,)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        path = scoring(node)
        if not path:
            return None
        linear, weight = path[0], path[0].args[1]
        table = attribute(edit.module, weight)
        if table is None:
            raise Miss("the items are not a constant of the model")
        k = wanted(node)
        if any(user is not node and user not in path for step in path for user in step.users):
            raise Miss("the scores are read outside of the top-k too")
        bias = argument(linear, "bias")
        if len(path) > 1:
            hidden = hidden_items(edit.module, node.args[0], linear)  # type: ignore[arg-type]
            bias = hiding_bias(edit, bias, hidden, value(linear).dtype)
        new = edit.call(SCORE_TOPK.overload, linear.args[0], weight, bias, k)
        return Fused(node, new, saved(path, int(table.shape[0])))


def saved(path: list[fx.Node], items: int) -> str:
    written = [step for step in path if value(step).dim() and same_size(value(step).shape[-1], items)]
    launches = "1 launch" if len(written) == 1 else f"{len(written)} launches"
    return f"{launches}, {len(written) * items * value(path[0]).itemsize / 1024:.1f} KB a row"


def scoring(topk: fx.Node) -> list[fx.Node]:
    """The linear layer that a top-k reads and the masks between them; empty where there is none."""
    found: list[fx.Node] = []
    pending = [topk.args[0]]
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
        behind = topk.args[0]
        changed = isinstance(behind, fx.Node) and [n for n in behind.all_input_nodes if is_op(n, aten.linear)]
        if changed:
            raise Miss(f"{behind.target} stands between the scores and the top-k")  # type: ignore[union-attr]
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
