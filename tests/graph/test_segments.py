"""segments: which input holds the lengths or offsets of which, however the model uses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grc.graph.segments import Segments, segments
from tests.passes.small import graph_of, ids

LENGTHS = torch.tensor([0, 2, 3, 1, 0, 4])
ENDS = torch.tensor([0, 0, 2, 5, 6, 6, 10])
VALUES = ids(10, 1).squeeze(1)
BY_LENGTHS, BY_OFFSETS = [Segments(0, 1, "lengths")], [Segments(0, 1, "offsets")]


def bag(last=False):
    return nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=last)


def zeros_in_front(lengths):
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


FROM_LENGTHS = {
    "zeros in front": lambda n: zeros_in_front(n),
    "a constant in front": lambda n: torch.cat([torch.tensor([0]), torch.cumsum(n, 0)]),
    "padded": lambda n: nn.functional.pad(n.cumsum(0), (1, 0)),
    "cast and reshaped": lambda n: zeros_in_front(n.to(torch.int32).view(2, -1).reshape(-1)).long(),
}
WITHOUT_LAST = {
    "last taken off": lambda n: zeros_in_front(n)[:-1],
    "exclusive": lambda n: n.cumsum(0) - n,
}


@pytest.mark.parametrize("how", FROM_LENGTHS)
def test_offsets_from_lengths(how):
    graph = graph_of(lambda self, v, n: self.bag(v, FROM_LENGTHS[how](n)), VALUES, LENGTHS, bag=bag(last=True))
    assert segments(graph) == BY_LENGTHS


@pytest.mark.parametrize("how", WITHOUT_LAST)
def test_offsets_from_lengths_without_the_last(how):
    graph = graph_of(lambda self, v, n: self.bag(v, WITHOUT_LAST[how](n)), VALUES, LENGTHS, bag=bag())
    assert segments(graph) == BY_LENGTHS


def test_starts_as_they_are_and_cut_from_offsets():
    graph = graph_of(lambda self, v, o: self.bag(v, o), VALUES, ENDS[:-1].clone(), bag=bag())
    assert segments(graph) == [Segments(0, 1, "starts")]
    graph = graph_of(lambda self, v, o: self.bag(v, o[:-1]), VALUES, ENDS, bag=bag())
    assert segments(graph) == BY_OFFSETS


def test_offsets_as_they_are():
    graph = graph_of(lambda self, v, o: self.bag(v, o), VALUES, ENDS, bag=bag(last=True))
    assert segments(graph) == BY_OFFSETS


def test_two_features_with_offsets_of_their_own():
    graph = graph_of(
        lambda self, v, o, w, p: self.a(v, o) + self.b(w, p),
        VALUES,
        ENDS,
        VALUES[:7].clone(),
        ENDS.clone(),
        a=bag(True),
        b=bag(True),
    )
    assert segments(graph) == [Segments(0, 1, "offsets"), Segments(2, 3, "offsets")]


def test_a_split_by_sums_of_lengths():
    def forward(self, values, lengths):
        matrix = lengths.view(2, -1)
        first, second = values.split(matrix.sum(1).tolist())
        return first.sum() + second.sum()

    assert segments(graph_of(forward, VALUES, LENGTHS)) == BY_LENGTHS


def test_a_split_by_differences_of_offsets():
    def forward(self, values, offsets):
        first, second = values.split((offsets[1:] - offsets[:-1]).view(2, -1).sum(1).tolist())
        return first.sum() + second.sum()

    assert segments(graph_of(forward, VALUES, ENDS)) == BY_OFFSETS


def test_rows_repeated_by_lengths():
    def forward(self, values, lengths):
        owner = torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths, output_size=values.shape[0])
        return torch.zeros(lengths.shape[0]).index_add(0, owner, values.float())

    assert segments(graph_of(forward, VALUES, LENGTHS)) == BY_LENGTHS


def test_weights_beside_values_need_no_entry_of_their_own():
    graph = graph_of(lambda self, v, o, w: self.bag(v, o, w), VALUES, ENDS, torch.rand(10), bag=bag(last=True))
    assert segments(graph) == BY_OFFSETS


def test_what_is_not_proven_is_not_told():
    """Offsets of ids that are no input, offsets that are computed otherwise, and a size that has nothing to do with them."""
    table = bag(last=True)
    graph = graph_of(lambda self, v, o: self.bag(v[:5], o.clamp(0, 5)), VALUES, ENDS, bag=table)
    assert segments(graph) == []
    graph = graph_of(lambda self, v, n: self.bag(v, zeros_in_front(n).clamp(max=10)), VALUES, LENGTHS, bag=table)
    assert segments(graph) == []
    graph = graph_of(lambda self, v, o: self.bag(v, o[:-2]), VALUES, ENDS, bag=bag())
    assert segments(graph) == []
    graph = graph_of(lambda self, v, n: v.sum() + n.cumsum(0).sum(), VALUES, LENGTHS)
    assert segments(graph) == []


def test_jagged_operators_of_fbgemm():
    pytest.importorskip("fbgemm_gpu", reason="needs fbgemm-gpu-cpu")
    fbgemm = torch.ops.fbgemm

    def forward(self, values, lengths):
        return fbgemm.jagged_to_padded_dense(self.table(values), [fbgemm.asynchronous_complete_cumsum(lengths)], [4])

    graph = graph_of(forward, VALUES, LENGTHS, table=nn.Embedding(10, 4))
    assert segments(graph) == BY_LENGTHS
    graph = graph_of(lambda self, v, o: fbgemm.jagged_1d_to_dense(v, o, 4, 0), VALUES, ENDS)
    assert segments(graph) == BY_OFFSETS

    def permuted(self, values, lengths):
        order = torch.tensor([1, 0], dtype=torch.int32)
        return fbgemm.permute_2D_sparse_data(order, lengths.view(2, -1), values, None, values.shape[0])[1]

    assert segments(graph_of(permuted, VALUES, LENGTHS)) == BY_LENGTHS
