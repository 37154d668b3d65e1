"""Write fbgemm's jagged operators in plain aten, so that the artifact needs no fbgemm and every engine can take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from grc.graph.jagged import ended
from grc.graph.match import Miss, argument, attribute
from grc.graph.rewrite import Rewriter
from grc.graph.segments import beneath
from grc.passes.manager import Change, Pass, rewritten


@dataclass(frozen=True)
class Jagged(Pass):
    """fbgemm's cumulative sums, paddings, permutations, softmax and products become aten; others stay, with the reason."""

    name = "jagged"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        calls = [node for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "fbgemm"]

        def rewrite(node: fx.Node) -> str:
            put(edit, node, plain(edit, node, node.target._opname))  # type: ignore[union-attr]
            return ""

        return rewritten(edit, [(node.target._opname, node) for node in calls], rewrite)


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
        raise Miss(f"fbgemm::{name} has no form in plain aten")
    given = [argument(node, a.name) for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if FORMS[name] is permute_columns:  # sizes are read from its tensors
        known = [attribute(edit.module, beneath(given[i])) for i in (1, 2)]
        given[1:] = [None if tensor is None else tensor.tolist() for tensor in known]
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
        raise Miss(f"a jagged tensor of {len(offsets)} levels")
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
        raise Miss("the number of values is read from the offsets: pass total_L")
    return [taken(dense, offsets, total), list(offsets)]


def taken(dense: Tensor, offsets: Sequence[Tensor], total: int) -> Tensor:
    if len(offsets) != 1:
        raise Miss(f"a jagged tensor of {len(offsets)} levels")
    ends = offsets[0]
    position = torch.arange(total, device=ends.device, dtype=ends.dtype)
    row = ended(ends[1:], position)
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
        raise Miss("the number of values is read from the lengths: pass permuted_lengths_sum")
    begin = complete_cumsum(lengths.flatten())[:-1].view_as(lengths)[permute].flatten()
    ordered = lengths[permute]
    ends = ordered.flatten().cumsum(0, dtype=lengths.dtype)
    position = torch.arange(total, device=values.device, dtype=lengths.dtype)
    segment = ended(ends, position)
    place = begin[segment] + position - (ends - ordered.flatten())[segment]
    return [ordered, values[place], None if weights is None else weights[place]]


def softmax(values: Tensor, offsets: Tensor, longest: int) -> list[Tensor]:
    """Softmax over the rows of each bag, column by column; zeros for rows from `longest` on."""
    dense = torch.softmax(to_padded(values, [offsets], [longest], -torch.inf), 1)
    return [taken(dense, [offsets], values.shape[0]), offsets]


def times_dense(values: Tensor, offsets: Tensor, dense: Tensor, longest: int) -> list[Tensor]:
    """`[V, K]` times `[B, K, N]`, every bag by its own matrix: `[V, N]`; zeros for rows from `longest` on."""
    found = torch.bmm(to_padded(values, [offsets], [longest]), dense)
    return [taken(found, [offsets], values.shape[0]), offsets]


def times_jagged(left: Tensor, right: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """`[V, M]` and `[V, N]` to `[B, M, N]`: the sum of outer products over the first `longest` rows of each bag."""
    return torch.bmm(to_padded(left, [offsets], [longest]).transpose(1, 2), to_padded(right, [offsets], [longest]))


def times_vectors(vectors: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """`[B * H, N]` weights of the rows of each bag and `[V, H * D]` to `[B * H, D]`: H heads, weighted sums of D columns."""
    bags, longest = offsets.shape[0] - 1, vectors.shape[1]
    heads = vectors.shape[0] // bags
    dense = to_padded(values, [offsets], [longest]).unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return torch.bmm(vectors.unsqueeze(1), dense).squeeze(1)


def permute_columns(pooled: Tensor, ends: Sequence[int] | None, order: Sequence[int] | None) -> Tensor:
    """Features of pooled rows `[B, D]`, which end at these columns, in another order."""
    if ends is None or order is None:
        raise Miss("the widths of its features are computed")
    return torch.cat([pooled[:, ends[i] : ends[i + 1]] for i in order], 1)


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
    "jagged_softmax": softmax,
    "jagged_softmax_forward": lambda *given: softmax(*given)[0],
    "jagged_dense_bmm": times_dense,
    "jagged_dense_bmm_forward": lambda *given: times_dense(*given)[0],
    "jagged_jagged_bmm": times_jagged,
    "jagged_jagged_bmm_forward": times_jagged,
    "batched_dense_vec_jagged_2d_mul": times_vectors,
    "batched_dense_vec_jagged_2d_mul_forward": times_vectors,
    "permute_pooled_embs": permute_columns,
    "permute_pooled_embs_auto_grad": permute_columns,
}
