"""Write fbgemm's jagged operators in plain aten, so that the artifact needs no fbgemm and every engine can take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from grc.graph.match import argument, source_text, where
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass


class Unsupported(Exception):
    """An operator is used in a way that plain aten can't say without reading sizes from data."""


@dataclass(frozen=True)
class Jagged(Pass):
    """fbgemm's cumulative sums, paddings and permutations become aten; the others stay, with the reason."""

    name = "jagged"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        changes: list[Change] = []
        for node in list(graph.graph.nodes):
            if getattr(node.target, "namespace", "") != "fbgemm":
                continue
            name = node.target._opname  # type: ignore[union-attr]
            place = (name, where(node), source_text(node))
            try:
                with edit.at(node):
                    new = plain(edit, node, name)
            except Unsupported as reason:
                changes.append(Change(*place, missed=str(reason)))
                continue
            put(edit, node, new)
            changes.append(Change(*place))
        edit.finish()
        return changes


def put(edit: Rewriter, old: fx.Node, new: Any) -> None:
    """Give the readers of a value its new form; of a list, each item to its readers."""
    if isinstance(new, fx.Node):
        edit.replace(old, new)
        return
    for user in list(old.users):
        put(edit, user, new[user.args[1]])  # type: ignore[index]


def plain(edit: Rewriter, node: fx.Node, name: str) -> Any:
    """The results of an operator's plain form: one node, or a list of them."""
    if name not in FORMS:
        raise Unsupported(f"fbgemm::{name} has no form in plain aten")
    given = [argument(node, a.name) for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return edit.inline(FORMS[name], *given)


def complete_cumsum(values: Tensor) -> Tensor:
    """`[..., N]` lengths to `[..., N + 1]` offsets, in the dtype of the lengths."""
    return functional.pad(values.cumsum(-1, dtype=values.dtype), (1, 0))


def inclusive_cumsum(values: Tensor) -> Tensor:
    return values.flatten().cumsum(0, dtype=values.dtype).view_as(values)


def exclusive_cumsum(values: Tensor) -> Tensor:
    return inclusive_cumsum(values) - values


def to_padded(values: Tensor, offsets: Sequence[Tensor], longest: Sequence[int], padding: float = 0.0) -> Tensor:
    """`[V, ...]` to `[B, L, ...]`: row b holds `values[offsets[b]:offsets[b + 1]]`, cut at L, padded behind."""
    if len(offsets) != 1:
        raise Unsupported(f"a jagged tensor of {len(offsets)} levels")
    ends = offsets[0]
    place = ends[:-1].unsqueeze(1) + torch.arange(longest[0], device=ends.device)
    # One row of padding behind the values, so that no row is read where there are none.
    rows = torch.cat([values, values.new_full((1, *values.shape[1:]), padding)])
    inside = place < ends[1:].unsqueeze(1)
    return rows[torch.where(inside, place, values.shape[0])]


def two_to_dense(values: Tensor, offsets: Tensor, longest: int) -> Tensor:
    return to_padded(values, [offsets], [longest])


def one_to_dense(values: Tensor, offsets: Tensor, longest: int, padding: float) -> Tensor:
    return to_padded(values, [offsets], [longest], padding)


def to_jagged(dense: Tensor, offsets: Sequence[Tensor], total: int | None = None) -> list[Any]:
    """`[B, L, ...]` to `[V, ...]`: the inverse of `to_padded`; zeros where a row is longer than L."""
    if total is None:
        raise Unsupported("the number of values is read from the offsets: pass total_L")
    return [taken(dense, offsets, total), list(offsets)]


def taken(dense: Tensor, offsets: Sequence[Tensor], total: int) -> Tensor:
    if len(offsets) != 1:
        raise Unsupported(f"a jagged tensor of {len(offsets)} levels")
    ends = offsets[0]
    position = torch.arange(total, device=ends.device, dtype=ends.dtype)
    row = torch.searchsorted(ends[1:].contiguous(), position, right=True)
    column = position - ends[row]
    found = dense[row, column.clamp(max=dense.shape[1] - 1)]
    inside = (column < dense.shape[1]).view(-1, *[1] * (dense.dim() - 2))
    return torch.where(inside, found, 0)


def add_dense(values: Tensor, offsets: Sequence[Tensor], dense: Tensor) -> Tensor:
    return dense + to_padded(values, offsets, [dense.shape[1]])


def add_values(values: Tensor, offsets: Sequence[Tensor], *dense: Tensor) -> Tensor:
    """The dense rows of each jagged value added to it; the result stays jagged."""
    for rows in dense:
        values = values + taken(rows, offsets, values.shape[0])
    return values


def mul_values(values: Tensor, offsets: Sequence[Tensor], dense: Tensor) -> Tensor:
    return values * taken(dense, offsets, values.shape[0])


def with_offsets(form: Callable[..., Tensor]) -> Callable[..., list[Any]]:
    """For operators that give their offsets back beside the values."""
    return lambda values, offsets, *dense: [form(values, offsets, *dense), list(offsets)]


def permute_features(
    permute: Tensor, lengths: Tensor, values: Tensor, weights: Tensor | None = None, total: int | None = None
) -> list[Any]:
    """Lengths `[T, B]` and values `[V]` with the features in another order: each keeps its bags."""
    if total is None:
        raise Unsupported("the number of values is read from the lengths: pass permuted_lengths_sum")
    begin = complete_cumsum(lengths.flatten())[:-1].view_as(lengths)[permute].flatten()
    ordered = lengths[permute]
    ends = ordered.flatten().cumsum(0, dtype=lengths.dtype)
    position = torch.arange(total, device=values.device, dtype=lengths.dtype)
    segment = torch.searchsorted(ends, position, right=True)
    place = begin[segment] + position - (ends - ordered.flatten())[segment]
    return [ordered, values[place], None if weights is None else weights[place]]


FORMS: dict[str, Callable[..., Any]] = {
    "asynchronous_complete_cumsum": complete_cumsum,
    "asynchronous_batched_complete_cumsum": complete_cumsum,
    "asynchronous_inclusive_cumsum": inclusive_cumsum,
    "asynchronous_exclusive_cumsum": exclusive_cumsum,
    "jagged_to_padded_dense": to_padded,
    "jagged_to_padded_dense_forward": to_padded,
    "jagged_2d_to_dense": two_to_dense,
    "jagged_1d_to_dense": one_to_dense,
    "dense_to_jagged": to_jagged,
    "dense_to_jagged_forward": lambda dense, offsets, total: to_jagged(dense, offsets, total)[0],
    "jagged_dense_elementwise_add": add_dense,
    "jagged_dense_elementwise_add_jagged_output": with_offsets(add_values),
    "jagged_dense_dense_elementwise_add_jagged_output": with_offsets(add_values),
    "jagged_dense_dense_elementwise_add_jagged_output_forward": add_values,
    "jagged_dense_elementwise_mul": with_offsets(mul_values),
    "jagged_dense_elementwise_mul_forward": mul_values,
    "permute_2D_sparse_data": permute_features,
}
