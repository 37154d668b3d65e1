"""jagged: fbgemm's operators and their plain forms agree, and what has none is named."""

from __future__ import annotations

import pytest
import torch

from grc.passes.jagged import Jagged
from tests.graph.filecheck import check
from tests.passes.small import graph_of, misses, rows, run

pytest.importorskip("fbgemm_gpu", reason="needs fbgemm-gpu-cpu")

fbgemm = torch.ops.fbgemm
LENGTHS = torch.tensor([0, 2, 5, 0, 1, 3, 0])
TOTAL = int(LENGTHS.sum())


def offsets(lengths):
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(lengths.dtype)])


CASES = {
    "complete": (lambda v, n, d: fbgemm.asynchronous_complete_cumsum(n),),
    "inclusive": (lambda v, n, d: fbgemm.asynchronous_inclusive_cumsum(n),),
    "exclusive": (lambda v, n, d: fbgemm.asynchronous_exclusive_cumsum(n),),
    "two-dimensional": (lambda v, n, d: fbgemm.asynchronous_complete_cumsum(torch.stack([n, n * 2])),),
    "padded": (lambda v, n, d: fbgemm.jagged_to_padded_dense(v, [offsets(n)], [4], 0.0),),
    "padded with a value": (lambda v, n, d: fbgemm.jagged_to_padded_dense(v, [offsets(n)], [9], -3.0),),
    "2d": (lambda v, n, d: fbgemm.jagged_2d_to_dense(v, offsets(n), 4),),
    "1d of ids": (lambda v, n, d: fbgemm.jagged_1d_to_dense(v[:, 0].long(), offsets(n), 4, 7),),
    "to jagged": (lambda v, n, d: fbgemm.dense_to_jagged(d, [offsets(n)], v.shape[0])[0],),
    "add": (lambda v, n, d: fbgemm.jagged_dense_elementwise_add(v, [offsets(n)], d),),
    "add jagged": (lambda v, n, d: fbgemm.jagged_dense_elementwise_add_jagged_output(v, [offsets(n)], d)[0],),
    "softmax": (lambda v, n, d: fbgemm.jagged_softmax(v, offsets(n), 6)[0],),
    "product with dense": (lambda v, n, d: fbgemm.jagged_dense_bmm(v, offsets(n), d[:, :3], 6)[0],),
    "product with dense, cut": (lambda v, n, d: fbgemm.jagged_dense_bmm(v, offsets(n), d[:, :3], 3)[0],),
    "product of jagged": (lambda v, n, d: fbgemm.jagged_jagged_bmm(v, v * 2, offsets(n), 6),),
    "product of jagged, cut": (lambda v, n, d: fbgemm.jagged_jagged_bmm(v, v * 2, offsets(n), 3),),
    "vectors times jagged": (lambda v, n, d: fbgemm.batched_dense_vec_jagged_2d_mul(d[:, :, 0], v, offsets(n)),),
    "multiply": (lambda v, n, d: fbgemm.jagged_dense_elementwise_mul(v, [offsets(n)], d)[0],),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", CASES)
def test_plain_form_agrees(name, dtype):
    """Empty rows in front, inside and at the end; one row longer than the dense side."""
    (function,) = CASES[name]
    inputs = rows(TOTAL, 3), LENGTHS.to(dtype), rows(len(LENGTHS), 4, 3)
    graph = graph_of(lambda self, v, n, d: (function(v, n, d), v.sum(), d.sum()), *inputs)
    none = torch.empty(0, 3), torch.zeros(2, dtype=dtype), rows(2, 4, 3)
    full = name in ("multiply", "add jagged", "to jagged", "softmax", "product with dense", "product with dense, cut")
    run(graph, [Jagged()], inputs, *([] if full else [none]))
    check(graph, "CHECK-NOT: fbgemm.")


def test_features_in_another_order():
    def forward(self, values, lengths):
        order = torch.tensor([2, 0, 1], dtype=torch.int32)
        found = fbgemm.permute_2D_sparse_data(order, lengths, values, None, values.shape[0])
        return found[0], found[1]

    lengths = torch.tensor([[0, 2], [3, 0], [1, 4]])
    graph = graph_of(forward, torch.arange(10), lengths, fixed=(1,))
    run(graph, [Jagged()], (torch.arange(10), lengths))
    check(graph, "CHECK-NOT: fbgemm.")


def test_pooled_columns_in_another_order():
    def forward(self, pooled):
        ends, order = torch.tensor([0, 2, 3, 7]), torch.tensor([2, 0, 1])
        back, undo = torch.tensor([0, 4, 6, 7]), torch.tensor([1, 2, 0])
        return fbgemm.permute_pooled_embs(pooled, ends, order, back, undo)

    inputs = (rows(5, 7),)
    graph = graph_of(forward, *inputs)
    run(graph, [Jagged()], inputs)
    check(graph, "CHECK-NOT: fbgemm.")


def test_what_has_no_plain_form_stays_with_its_reason():
    graph = graph_of(
        lambda self, v, n, d: fbgemm.dense_to_jagged(d, [offsets(n)])[0],
        rows(TOTAL, 3),
        LENGTHS,
        rows(len(LENGTHS), 4, 3),
    )
    changes = Jagged().run(graph)
    assert misses(changes, "dense_to_jagged") == ["the number of values is read from the offsets: pass total_L"]
    check(graph, "CHECK: fbgemm.dense_to_jagged")
