"""merge-tables: look-ups that end in one cat become one grc.lookup, whatever they were written with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grc.passes.fuse import GATHERED, OFFSETS, Fuse
from grc.passes.merge_tables import MergeTables
from tests.graph.filecheck import check
from tests.passes.small import MERGED, graph_of, ids, made, misses, rows, run


def merged(function, *inputs, requests=(), **modules):
    graph = graph_of(function, *inputs, **modules)
    changes = run(graph, [*MERGED, Fuse()], inputs, *requests)
    return graph, changes


def tables(count, dim=4, limit=10):
    return nn.ModuleList(nn.Embedding(limit + i, dim) for i in range(count))


@pytest.mark.parametrize("count", [2, 3, 7, 26])
def test_any_number_of_tables(count):
    graph, changes = merged(
        lambda self, x: torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1),
        ids(4, count),
        tables=tables(count),
    )
    assert made(changes, f"{count} look-ups of {count} tables -> 1") == 1
    check(
        graph,
        """
        CHECK: %arena : float32[{{.*}}, 4] = get_attr[arena]
        CHECK: grc.lookup(%arena, %inputs_0, None, None, [0, 10{{[],]}}
        CHECK-NEXT: return
        CHECK-NOT: aten.
        """,
    )


def test_the_arena_is_the_models_own_memory():
    table = tables(3)
    graph, _ = merged(
        lambda self, x: torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1), ids(4, 3), tables=table
    )
    assert table[1].weight.data_ptr() == graph.arena.data_ptr() + 10 * 4 * 4
    assert graph.arena.shape == (33, 4)


def test_a_stack_keeps_its_shape():
    graph, _ = merged(
        lambda self, x: torch.stack([t(x[:, i]) for i, t in enumerate(self.tables)], 1), ids(4, 3), tables=tables(3)
    )
    check(graph, "CHECK: grc.lookup(\nCHECK-NEXT: aten.reshape(%lookup{{.*}}, [-1, 3, 4])\nCHECK-NEXT: return")


def test_ids_in_another_order_are_gathered():
    graph, _ = merged(
        lambda self, x: torch.cat([self.a(x[:, 2]), self.b(x[:, 0])], 1),
        ids(4, 3),
        a=nn.Embedding(10, 4),
        b=nn.Embedding(11, 4),
    )
    check(graph, "CHECK: %cat{{.*}} = aten.cat([%slice{{.*}}, %slice{{.*}}], 1)\nCHECK: grc.lookup(%arena, %cat")


def test_ids_from_several_inputs():
    graph, _ = merged(
        lambda self, x, y: torch.cat([self.a(x), self.b(y)], 1), ids(4, 1).squeeze(1), ids(5, 1)[:4, 0],
        a=nn.Embedding(10, 4), b=nn.Embedding(11, 4),
    )  # fmt: skip
    check(graph, "CHECK-COUNT-1: grc.lookup(\nCHECK-NOT: aten.embedding")


def test_ids_as_columns_of_a_float_matrix_are_cast_once():
    graph, _ = merged(
        lambda self, x: torch.cat([t(x[:, i : i + 1].long()) for i, t in enumerate(self.tables)], -1).flatten(1),
        ids(4, 3).float(),
        tables=tables(3),
    )
    check(
        graph,
        "CHECK: %to{{.*}} : int64[{{.*}}, 3] = aten.to(%inputs_0, torch.int64)\nCHECK-NEXT: grc.lookup(%arena, %to",
    )


def test_different_widths_lie_in_a_flat_arena():
    graph, _ = merged(
        lambda self, x: torch.cat([self.a(x[:, 0]), self.b(x[:, 1])], 1),
        ids(4, 2),
        a=nn.Embedding(10, 4),
        b=nn.Embedding(20, 6),
    )
    check(
        graph,
        "CHECK: %arena : float32[160] = get_attr\nCHECK: grc.lookup(%arena, %inputs_0, None, None, [0, 40], [10, 20], [4, 6]",
    )


def test_one_table_with_offsets():
    class Offsets(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(60, 4)
            self.register_buffer("offsets", torch.tensor([0, 10, 30]))

    graph, _ = merged(lambda self, x: self.t.table(x + self.t.offsets).flatten(1), ids(4, 3), t=Offsets())
    check(
        graph,
        "CHECK: grc.lookup(%t_table_weight, %inputs_0, None, None, [0, 10, 30], [60, 50, 30]\nCHECK-NOT: aten.add",
    )


def test_a_table_shared_by_two_groups_is_stored_once():
    def forward(self, x):
        first = torch.cat([self.a(x[:, 0]), self.b(x[:, 1])], 1)
        return first, torch.cat([self.b(x[:, 2]), self.c(x[:, 3])], 1).relu()

    graph, changes = merged(forward, ids(4, 4), a=nn.Embedding(10, 4), b=nn.Embedding(20, 4), c=nn.Embedding(30, 4))
    assert made(changes, "2 look-ups of 2 tables -> 1") == 2
    check(graph, "CHECK-COUNT-2: grc.lookup(%arena\nCHECK-COUNT-1: get_attr\nCHECK: %arena : float32[60, 4]")


def test_other_readers_get_their_slice():
    def forward(self, x):
        a, b = self.a(x[:, 0]), self.b(x[:, 1])
        return torch.cat([a, b], 1), (a * b).sum(1)

    graph, _ = merged(forward, ids(4, 2), a=nn.Embedding(10, 4), b=nn.Embedding(20, 4))
    check(graph, "CHECK-COUNT-1: grc.lookup(\nCHECK: aten.slice(%lookup\nCHECK-NOT: aten.embedding")


def test_a_reader_before_the_last_member_moves_behind_the_look_up():
    def forward(self, x):
        a = self.a(x[:, 0])
        early = torch.relu(a)
        return torch.cat([a, self.b(x[:, 1])], 1), early

    graph, _ = merged(forward, ids(4, 2), a=nn.Embedding(10, 4), b=nn.Embedding(20, 4))
    check(graph, "CHECK: grc.lookup(\nCHECK: aten.relu(")


def test_rows_that_cats_join_more_than_once():
    """As over all pairs of features: no cat has every table, and none has them side by side."""

    def forward(self, x):
        a, b, c = (table(x[:, i]) for i, table in enumerate(self.tables))
        return torch.cat([a, a, b], 1) * torch.cat([b, c, c], 1)

    graph, changes = merged(forward, ids(4, 3), tables=tables(3))
    assert made(changes, "3 look-ups of 3 tables -> 1") == 1
    check(graph, "CHECK: grc.lookup(\nCHECK-NOT: aten.embedding")


def test_ids_that_depend_on_another_member_are_not_merged_with_it():
    def forward(self, x):
        a = self.a(x[:, 0])
        return torch.cat([a, self.b(a.argmax(1))], 1)

    graph, changes = merged(forward, ids(4, 1), a=nn.Embedding(10, 4), b=nn.Embedding(20, 4))
    assert misses(changes, "look-ups") == ["the ids of one look-up are computed from the rows of another"]
    check(graph, "CHECK-COUNT-2: aten.embedding(")


def test_two_groups_in_one_cat():
    def forward(self, x):
        pooled = [
            self.a(x[:, :3]).sum(1),
            self.b(x[:, 3:6]).sum(1),
            self.a(x[:, 1:4]).mean(1),
            self.b(x[:, 2:5]).mean(1),
        ]
        return torch.cat(pooled, 1)

    graph, changes = merged(forward, ids(4, 6), a=nn.Embedding(10, 4), b=nn.Embedding(20, 4))
    assert made(changes, "2 look-ups of 2 tables -> 1") == 2
    check(graph, "CHECK-COUNT-2: grc.lookup(\nCHECK: aten.cat([%lookup{{.*}}, %lookup{{.*}}], 1)")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_fixed_length(mode):
    graph, _ = merged(
        lambda self, x: torch.cat([self.a(x[:, :3]), self.b(x[:, 3:])], 1), ids(4, 5),
        a=nn.EmbeddingBag(10, 4, mode=mode), b=nn.EmbeddingBag(20, 4, mode=mode),
    )  # fmt: skip
    check(
        graph,
        "CHECK: grc.lookup(%arena, %inputs_0, None, None, [0, 10], [10, 20], [4, 4], [3, 2]\nCHECK-NOT: aten.embedding_bag",
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_with_offsets(mode, last, padding):
    """Empty bags in front, inside and at the end."""
    a, b = (nn.EmbeddingBag(n, 4, mode=mode, include_last_offset=last, padding_idx=padding) for n in (10, 20))
    ends = torch.tensor([0, 0, 3, 3, 7, 7])
    values, offsets = ids(7, 2), ends if last else ends[:-1]
    graph = graph_of(
        lambda self, v, w, o: torch.cat([self.a(v, o), self.b(w, o)], 1),
        values[:, 0].clone(),
        values[:, 1].clone(),
        offsets,
        a=a,
        b=b,
    )
    changes = run(graph, MERGED, (values[:, 0].clone(), values[:, 1].clone(), offsets))
    assert made(changes, "2 look-ups of 2 tables -> 1") == 1
    check(graph, "CHECK: grc.lookup(%arena, %cat{{.*}}, %cat\nCHECK-NOT: aten.embedding_bag")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_bag_that_stands_alone(mode, last, dtype):
    """No cat reads it, and its layer stays."""
    bag = nn.EmbeddingBag(10, 4, mode=mode, include_last_offset=last)
    values, ends = ids(7, 1).squeeze(1).to(dtype), torch.tensor([0, 0, 3, 3, 7, 7], dtype=dtype)
    inputs = values, ends if last else ends[:-1].clone()
    graph, changes = merged(lambda self, v, o: self.bag(v, o).relu(), *inputs, bag=bag)
    assert made(changes, "look-up and pooling") == 1
    offsets = "%inputs_1" if last else "%cat"
    check(
        graph, f"CHECK: grc.lookup(%bag_weight, %inputs_0, {offsets}\nCHECK: aten.relu\nCHECK-NOT: aten.embedding_bag"
    )


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_bag_of_fixed_length_that_stands_alone(length):
    graph, changes = merged(lambda self, x: self.bag(x).relu(), ids(4, length), bag=nn.EmbeddingBag(10, 4, mode="mean"))
    assert made(changes, "1 look-ups of 1 table -> 1" if length == 1 else "look-up and pooling") == 1
    check(graph, f"CHECK: grc.lookup(%bag_weight, %inputs_0, None, None, [0], [10], [4], [{length}]")


def test_a_bag_of_each_candidate_of_a_user():
    """Ids `[B, N, L]`, flattened: the offsets say nothing, and the look-up needs none."""
    graph, _ = merged(
        lambda self, x: self.bag(x.reshape(x.shape[0] * 6, -1)).view(-1, 6, 4).relu(),
        ids(4, 18).view(4, 6, 3), bag=nn.EmbeddingBag(10, 4, mode="mean"),
    )  # fmt: skip
    check(
        graph,
        "CHECK: aten.reshape(%inputs_0, [-1, 3])\nCHECK-NEXT: grc.lookup(%bag_weight, %reshape{{.*}}, None, None\n"
        "CHECK-NOT: aten.arange",
    )


def test_offsets_that_leave_the_last_bag_more_are_kept():
    graph, _ = merged(
        lambda self, v: self.bag(v, torch.arange(0, v.shape[0] - 2, 3)).relu(), ids(12, 1).squeeze(1),
        bag=nn.EmbeddingBag(10, 4, mode="sum"),
    )  # fmt: skip
    check(graph, "CHECK: grc.lookup(%bag_weight, %inputs_0, %cat")


MASKED = {
    "rows by weights": lambda self, x, w: (self.e(x) * w.unsqueeze(2)).sum(1).relu(),
    "weights by rows": lambda self, x, w: torch.sum(w[:, :, None] * self.e(x), dim=1, keepdim=True).squeeze(1).relu(),
    "product": lambda self, x, w: torch.bmm(w.unsqueeze(1), self.e(x)).squeeze(1).relu(),
    "einsum": lambda self, x, w: torch.einsum("bkl,bld->bkd", w.unsqueeze(1), self.e(x)).squeeze(1).relu(),
    "einsum of steps": lambda self, x, w: torch.einsum("bld,bl->bd", self.e(x), w).relu(),
    "repeated": lambda self, x, w: (self.e(x) * w.unsqueeze(2).repeat_interleave(4, 2)).sum(1).relu(),
    "expanded": lambda self, x, w: (self.e(x) * w.unsqueeze(2).expand(-1, -1, 4)).sum(1).relu(),
}


@pytest.mark.parametrize("pool", MASKED.values(), ids=MASKED)
def test_a_weighted_sum_of_rows_is_a_bag(pool):
    """Masked means of a history are written so."""
    graph, changes = merged(pool, ids(5, 3), rows(5, 3), e=nn.Embedding(10, 4))
    assert made(changes, "look-up and pooling") == 1
    check(
        graph,
        "CHECK: grc.lookup(%e_weight, %inputs_0, None, %inputs_1, [0], [10], [4], [3], 0\n"
        "CHECK: aten.relu\nCHECK-NOT: aten.bmm",
    )


HIDDEN = {
    "bools": lambda e, mask: e * mask.unsqueeze(-1),
    "integers": lambda e, mask: mask.long().unsqueeze(-1) * e,
    "filled": lambda e, mask: e.masked_fill(~mask.unsqueeze(-1), 0.0),
    "filled where": lambda e, mask: torch.where(mask.unsqueeze(-1), e, 0.0),
    "filled elsewhere": lambda e, mask: torch.where(~mask.unsqueeze(-1), 0.0, e),
    "zeros where": lambda e, mask: torch.where(mask[..., None], e, torch.zeros_like(e)),
    "full where": lambda e, mask: torch.where(mask[..., None].expand_as(e), e, torch.full_like(e, 0)),
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_a_mask_is_a_weight(hidden):
    def pool(self, x):
        return hidden(self.e(x), x != 0).sum(1).relu()

    graph, changes = merged(pool, ids(5, 3), e=nn.Embedding(10, 4))
    assert made(changes, "look-up and pooling") == 1
    check(graph, "CHECK: grc.lookup(%e_weight, %inputs_0, None, %{{\\w+}}, [0]\nCHECK: aten.relu\nCHECK-NOT: aten.bmm")


@pytest.mark.parametrize(
    "pool",
    [
        lambda self, x: self.e(x).masked_fill((x == 0).unsqueeze(-1), 1.0).sum(1),
        lambda self, x: torch.where((x == 0).unsqueeze(-1), 0.0, torch.where(x[..., None] > 3, self.e(x), 2.0)).sum(1),
        lambda self, x: self.broken(x).masked_fill((x == 0).unsqueeze(-1), 0.0).sum(1),
    ],
    ids=["other than zeros", "two conditions", "a row that is no number"],
)
def test_a_mask_that_is_no_weight(pool):
    broken = nn.Embedding.from_pretrained(torch.eye(10).index_fill(0, torch.tensor([0]), float("nan")))
    _, changes = merged(pool, ids(5, 3), e=nn.Embedding(10, 4), broken=broken)
    assert made(changes, "look-up and pooling") == 0


def test_a_size_that_varies_is_no_weight():
    """Nor the end of the rules."""
    graph = graph_of(
        lambda self, x, w: (self.e(x) * w.size(0)).sum(1).relu(), ids(5, 3), rows(5, 3), e=nn.Embedding(10, 4)
    )
    assert made(run(graph, MERGED, (ids(4, 3), rows(4, 3))), "look-up and pooling") == 0


def test_tables_of_another_width_of_numbers_stay_beside_those_that_merge():
    """A kernel reads no float64, and the others' merge does not fall with it."""
    graph, changes = merged(
        lambda self, x: torch.cat([self.a(x[:, 0]), self.b(x[:, 1]), self.c(x).sum(1).float()], 1), ids(5, 3),
        a=nn.Embedding(10, 4), b=nn.Embedding(10, 4), c=nn.Embedding(10, 4, dtype=torch.float64),
    )  # fmt: skip
    assert made(changes, "2 look-ups of 2 tables -> 1") == 1 and made(changes, "look-up and pooling") == 0
    missed = [c.missed for c in Fuse(()).run(graph) if c.missed]
    assert missed == ["its table is float64: kernels read rows of float32, float16 and bfloat16"]


def test_a_weighted_sum_of_rows_that_are_read_elsewhere_is_a_product():
    graph, changes = merged(
        lambda self, x, w: ((e := self.e(x)) * w.unsqueeze(2)).sum(1) + e[:, -1], ids(5, 3), rows(5, 3),
        e=nn.Embedding(10, 4),
    )  # fmt: skip
    assert made(changes, "look-up and pooling") == 0
    check(graph, "CHECK: aten.bmm(%{{.*}}, %embedding)\nCHECK-NOT: grc.lookup")


@pytest.mark.parametrize(
    "pool",
    [
        lambda self, x, w: (self.e(x) * w.unsqueeze(2)).sum(2),
        lambda self, x, w: (self.e(x) * w[:, :1].unsqueeze(2)).sum(1),
        lambda self, x, w: (self.e(x) * w.mean(1, keepdim=True).unsqueeze(1)).sum(1),
        lambda self, x, w: (self.e(x) * self.e.weight[:3]).sum(1),
    ],
    ids=["over the width", "one weight a user", "one for all", "a weight for each number"],
)
def test_other_sums_of_products_are_no_bags(pool):
    _, changes = merged(pool, ids(5, 3), rows(5, 3), e=nn.Embedding(10, 4))
    assert made(changes, "look-up and pooling") == 0


def test_a_weighted_bag_that_stands_alone():
    graph, _ = merged(
        lambda self, v, o, w: self.bag(v, o, w).relu(), ids(7, 1).squeeze(1), torch.tensor([0, 2, 2, 6]), torch.rand(7),
        bag=nn.EmbeddingBag(10, 4, mode="sum", padding_idx=3),
    )  # fmt: skip
    check(graph, "CHECK: grc.lookup(%bag_weight, %inputs_0, %cat{{.*}}, %inputs_2, [0], [10], [4], [], 0, [3])")


def test_per_sample_weights():
    a, b = nn.EmbeddingBag(10, 4, mode="sum"), nn.EmbeddingBag(20, 4, mode="sum")
    graph, changes = merged(
        lambda self, x, w: torch.cat([self.a(x[:, :2], None, w[:, :2]), self.b(x[:, 2:], None, w[:, 2:])], 1),
        ids(4, 5), rows(4, 5), a=a, b=b,
    )  # fmt: skip
    assert made(changes, "2 look-ups of 2 tables -> 1") == 1
    check(graph, "CHECK: grc.lookup(%arena, %inputs_0, None, %inputs_1")


def test_keyed_features_need_no_split():
    """Values split by the sums of a matrix of lengths, as TorchRec exports its EmbeddingBagCollection."""

    def forward(self, values, lengths):
        matrix = lengths.view(2, -1)
        parts = values.split(matrix.sum(1).tolist())
        offsets = torch.cat([matrix.new_zeros(2, 1), matrix.cumsum(-1)], -1).unbind(0)
        return torch.cat([self.a(parts[0], offsets[0]), self.b(parts[1], offsets[1])], 1)

    lengths = torch.tensor([0, 2, 3, 1, 0, 4])
    a, b = (nn.EmbeddingBag(n, 4, mode="sum", include_last_offset=True) for n in (10, 20))
    graph, _ = merged(forward, ids(10, 1).squeeze(1), lengths, a=a, b=b)
    check(
        graph,
        """
        CHECK: aten.cumsum(%reshape{{.*}}, 0)
        CHECK-NEXT: %cat{{.*}} = aten.cat([%constant{{.*}}, %cumsum{{.*}}], 0)
        CHECK-NEXT: grc.lookup(%arena, %inputs_0, %cat
        CHECK-NEXT: return
        """,
    )


@pytest.mark.parametrize("order", [[0, "d", 1, 2], [0, 1, "d", 2], [0, "d", 1, "d", 2]])
def test_look_ups_with_numbers_between_them_are_one(order):
    def forward(self, x, d):
        parts = {i: self.tables[i](x[:, i]) for i in range(3)} | {"d": d}
        return torch.cat([parts[key] for key in order], 1)

    graph, changes = merged(forward, ids(4, 3), rows(4, 2), tables=tables(3))
    assert made(changes, "3 look-ups of 3 tables -> 1") == 1 and misses(changes, "look-up") == []
    check(graph, "CHECK: grc.lookup(%arena, %inputs_0\nCHECK: aten.cat([%slice\nCHECK-NOT: grc.lookup")


def test_look_ups_of_two_kinds_between_each_other_are_two():
    def forward(self, x):
        return torch.cat([self.a(x[:, 0]), self.b(x[:, :3]), self.a(x[:, 1]), self.c(x[:, 3:])], 1)

    a, b, c = nn.Embedding(10, 4), nn.EmbeddingBag(10, 4, mode="max"), nn.EmbeddingBag(10, 4, mode="mean")
    graph, changes = merged(forward, ids(4, 6), a=a, b=b, c=c)
    assert made(changes, "3 look-ups of 2 tables -> 1") == 1 and made(changes, "look-up and pooling") == 1
    check(graph, "CHECK-COUNT-2: grc.lookup(")


def test_rows_that_no_cat_and_no_sum_reads_stay_with_their_readers():
    graph, changes = merged(
        lambda self, x, y: (self.a(x).relu(), self.a(y) * 2), ids(4, 3), ids(5, 1)[:4, 0].clone(), a=nn.Embedding(10, 4)
    )
    assert misses(changes, "look-up") == [GATHERED, GATHERED]
    check(graph, "CHECK-COUNT-2: aten.embedding(\nCHECK-NOT: grc.lookup")


def test_a_sum_over_parts_of_a_table_says_why_it_is_no_bag():
    offsets = torch.tensor([0, 4, 8])
    _, changes = merged(lambda self, x: self.a(x + offsets).sum(1), ids(4, 3), a=nn.Embedding(40, 1))
    assert misses(changes, "look-up") == [OFFSETS]


def test_constant_ids_are_no_look_up():
    _, changes = merged(lambda self, x: x + self.a(torch.arange(4)), rows(3, 4, 4), a=nn.Embedding(10, 4))
    assert changes == [] or misses(changes, "look-up") == []


def test_a_computed_table_is_named():
    def forward(self, v, o):
        return torch.nn.functional.embedding_bag(v, self.a.weight * o.sum(), o, mode="sum")

    graph, changes = merged(forward, ids(7, 1).squeeze(1), torch.tensor([0, 2, 2, 6]), a=nn.Embedding(10, 4))
    assert misses(changes, "look-up") == [
        "its table is computed: only a parameter or buffer [rows, width] has rows to read"
    ]
    check(graph, "CHECK: aten.embedding_bag(")


def test_dtypes_are_not_mixed():
    _, changes = merged(
        lambda self, x: torch.cat([self.a(x[:, 0]).float(), self.b(x[:, 1])], 1), ids(4, 2),
        a=nn.Embedding(10, 4).half(), b=nn.Embedding(20, 4),
    )  # fmt: skip
    assert made(changes, "2 look-ups of 2 tables -> 1") == 0


def test_a_second_run_finds_nothing():
    graph, _ = merged(
        lambda self, x: torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1), ids(4, 3), tables=tables(3)
    )
    assert MergeTables().run(graph) == []
