"""Fusions: every way of writing an interaction matches once, and a refusal gives its reason."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from grc.kernels import FUSIONS
from grc.passes.fuse import Fuse
from tests.graph.filecheck import check
from tests.passes.small import FUSED, graph_of, ids, made, misses, rows, run

COUNT, WIDTH = 4, 8
PAIRS = list(combinations(range(COUNT), 2))


def tables(count=COUNT, width=WIDTH):
    return nn.ModuleList(nn.Embedding(10 + i, width) for i in range(count))


def fused(function, *inputs, **modules):
    graph = graph_of(function, *inputs, **modules)
    return graph, run(graph, FUSED, inputs)


def looked_up(self, x):
    return [t(x[:, i]) for i, t in enumerate(self.tables)]


def by_index(z):
    i, j = torch.tensor(PAIRS).T
    return z[:, i, j]


def by_tril(z):
    i, j = torch.tril_indices(z.shape[1], z.shape[1], -1)
    return z[:, i, j]


PLACES = torch.ones(COUNT, COUNT).tril(-1).flatten().bool().nonzero().flatten()


def by_place(z):
    return z.flatten(1).index_select(1, PLACES)


class TestBagDot:
    @pytest.mark.parametrize("pick", [by_index, by_tril, by_place], ids=["triu", "tril", "places"])
    def test_products_of_all_features(self, pick):
        def forward(self, x):
            t = torch.stack(looked_up(self, x), 1)
            return pick(torch.bmm(t, t.transpose(1, 2)))

        graph, changes = fused(forward, ids(4, COUNT), tables=tables())
        assert made(changes, "bag-dot") == 1
        check(graph, "CHECK: grc.bag_dot(%arena, %inputs_0\nCHECK-NEXT: return\nCHECK-NOT: bmm")

    @pytest.mark.parametrize(
        "order", [PAIRS, [(j, i) for i, j in PAIRS], [(j, i) for j in range(COUNT) for i in range(j)]]
    )
    def test_products_of_a_loop_over_pairs(self, order):
        def forward(self, x):
            e = looked_up(self, x)
            return torch.stack([(e[i] * e[j]).sum(1) for i, j in order], 1)

        graph, changes = fused(forward, ids(4, COUNT), tables=tables())
        assert made(changes, "bag-dot") == 1
        check(graph, "CHECK: grc.bag_dot(\nCHECK-NOT: aten.mul")

    @pytest.mark.parametrize("keep", [True, False])
    def test_products_of_rows_joined_pair_by_pair(self, keep):
        """PNN's inner products, beside the rows themselves."""

        def forward(self, x):
            e = [row.unsqueeze(1) for row in looked_up(self, x)]
            left, right = (torch.cat([e[pair[side]] for pair in PAIRS], 1) for side in (1, 0))
            return torch.cat([torch.cat(e, -1).flatten(1), (left * right).sum(2, keep).flatten(1)], 1)

        graph, changes = fused(forward, ids(4, COUNT), tables=tables())
        assert made(changes, "bag-dot") == 1
        check(graph, "CHECK: grc.lookup(\nCHECK: grc.bag_dot(\nCHECK: aten.cat(\nCHECK-NEXT: return")

    def test_a_dense_vector_in_front_stays_in_the_answer(self):
        def forward(self, x, d):
            t = torch.cat([d.unsqueeze(1), torch.stack(looked_up(self, x), 1)], 1)
            return torch.cat([d, by_tril(torch.bmm(t, t.transpose(1, 2)))], 1)

        graph, changes = fused(forward, ids(4, COUNT), rows(4, WIDTH), tables=tables())
        assert made(changes, "bag-dot") == 1
        check(graph, "CHECK: grc.bag_dot(%arena, %inputs_0, None, None, %inputs_1\nCHECK-NEXT: return")

    def refusal(self, forward, *inputs, **modules):
        _, changes = fused(forward, *inputs, **modules)
        assert made(changes, "bag-dot") == 0
        return misses(changes, "bag-dot")

    def test_not_a_triangle(self):
        def forward(self, x):
            t = torch.stack(looked_up(self, x), 1)
            return torch.bmm(t, t.transpose(1, 2))[:, torch.tensor([1, 3]), torch.tensor([0, 1])]

        assert self.refusal(forward, ids(4, COUNT), tables=tables()) == [
            "the 2 products taken are not one triangle, row by row"
        ]

    def test_dense_behind(self):
        def forward(self, x, d):
            t = torch.cat([torch.stack(looked_up(self, x), 1), d.unsqueeze(1)], 1)
            return by_tril(torch.bmm(t, t.transpose(1, 2)))

        found = self.refusal(forward, ids(4, COUNT), rows(4, WIDTH), tables=tables())
        assert found == ["1 dense vectors beside the look-up; one, in front, is supported"]

    def test_no_look_up(self):
        def forward(self, x):
            return by_tril(torch.bmm(x, x.transpose(1, 2)))

        assert self.refusal(forward, rows(4, COUNT, WIDTH)) == [
            "the features do not come from look-ups that end in one cat"
        ]


def sum_square(e):
    return 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)


def kept_dims(e):
    cross = torch.pow(e.sum(1, keepdim=True), 2) - torch.sum(e * e, 1, keepdim=True)
    return 0.5 * torch.sum(cross, 2)


def summed_first(e):
    return (e.sum(1).square() - e.square().sum(1)).sum(-1, keepdim=True) / 2


def all_pairs(e):
    return by_tril(torch.bmm(e, e.transpose(1, 2))).sum(1, keepdim=True)


def triangle_with_zeros(e):
    return (e @ e.transpose(1, 2)).triu(1).sum((1, 2)).unsqueeze(1)


FORMS = [sum_square, kept_dims, summed_first, all_pairs, triangle_with_zeros]


class TestBagFm:
    @pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
    @pytest.mark.parametrize("linear", [True, False])
    def test_a_machine_alone_reads_its_embedding(self, form, linear):
        """Rendle's machine without a deep part: no cat and no layer reads the rows."""

        def forward(self, x):
            x = x + self.offsets
            return form(self.table(x)) + (self.weights(x).sum(1) if linear else 0)

        table, weights = nn.Embedding(10 * COUNT, WIDTH), nn.Embedding(10 * COUNT, 1)
        graph, changes = fused(
            forward, ids(4, COUNT), table=table, weights=weights, offsets=torch.arange(COUNT).unsqueeze(0) * 10
        )
        assert made(changes, "bag-fm") == 1 and misses(changes, "look-up") == []
        check(
            graph,
            f"CHECK: grc.bag_fm(%table_weight, {'%weights_weight' if linear else 'None'}, %inputs_0\nCHECK-NOT: aten.embedding",
        )

    @pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
    def test_the_second_order_term(self, form):
        graph, changes = fused(lambda self, x: form(torch.stack(looked_up(self, x), 1)), ids(4, COUNT), tables=tables())
        assert made(changes, "bag-fm") + made(changes, "bag-dot") == 1
        check(graph, "CHECK: grc.bag_{{fm|dot}}(%arena")

    def test_a_loop_over_pairs(self):
        def forward(self, x):
            e = looked_up(self, x)
            return sum((e[i] * e[j]).sum(1) for i, j in PAIRS)

        graph, changes = fused(forward, ids(4, COUNT), tables=tables())
        assert made(changes, "bag-fm") + made(changes, "bag-dot") == 1
        check(graph, "CHECK-NOT: aten.mul")

    @pytest.mark.parametrize("terms", [1, 2, 3])
    def test_the_linear_term_among_other_terms(self, terms):
        def forward(self, x, d):
            weights = torch.cat([t(x[:, i]) for i, t in enumerate(self.linear)], 1).sum(1, keepdim=True)
            second = sum_square(torch.stack(looked_up(self, x), 1))
            total = weights + self.dense(d) if terms == 2 else weights
            total = total + second
            return self.dense(d) + total if terms == 3 else total

        graph, changes = fused(
            forward, ids(4, COUNT), rows(4, 3), tables=tables(), linear=tables(width=1), dense=nn.Linear(3, 1)
        )
        assert made(changes, "bag-fm") == 1
        check(graph, "CHECK: grc.bag_fm(%arena{{.*}}, %arena{{.*}}, %inputs_0\nCHECK-NOT: grc.lookup")

    @pytest.mark.parametrize("deep", [False, True], ids=["beside", "within another sum"])
    def test_the_linear_term_of_one_table_with_a_bias(self, deep):
        def forward(self, x):
            rows = x + self.starts
            first = self.weights(rows).sum(1) + self.bias
            first = first + self.bias if deep else first
            features = self.table(rows)
            return first + sum_square(features), features.flatten(1)

        modules = dict(table=nn.Embedding(50, WIDTH), weights=nn.Embedding(50, 1))
        constants = dict(starts=torch.arange(COUNT) * 10, bias=nn.Parameter(torch.randn(1)))
        graph, changes = fused(forward, ids(4, COUNT), **modules, **constants)
        assert made(changes, "bag-fm") == 1
        check(graph, f"CHECK: grc.bag_fm(%table_weight, {'None' if deep else '%weights_weight'}, %inputs_0")

    @pytest.mark.parametrize(
        "form",
        [
            lambda e: 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)),
            lambda e: (e.sum(1, keepdim=True) ** 2 - (e * e).sum(1, keepdim=True)).squeeze(1) * 0.5,
            lambda e: (e.sum(1).square() - e.square().sum(1)) / 2,
            lambda e: e.sum(1) ** 2 - (e**2).sum(1),
        ],
        ids=["pow", "kept dims", "divided", "not halved"],
    )
    @pytest.mark.parametrize("deep", [False, True], ids=["alone", "beside the rows"])
    def test_bi_interaction_pooling(self, form, deep):
        """A neural factorisation machine's layers read every number of the second-order term; rows are kept for others."""

        def forward(self, x):
            e = torch.stack(looked_up(self, x), 1)
            pooled = self.layer(self.norm(form(e)).relu())
            return (pooled, e.flatten(1)) if deep else pooled

        layer, norm = nn.Linear(WIDTH, 3), nn.BatchNorm1d(WIDTH)
        graph, changes = fused(forward, ids(4, COUNT), tables=tables(), layer=layer, norm=norm)
        assert made(changes, "bag-fm") == 1
        check(graph, f"CHECK: grc.bag_fm(%arena, None, %inputs_0{{{{.*}}}}, [], False, {deep})\nCHECK-NOT: grc.lookup")

    def test_rows_that_nothing_else_reads_are_not_kept(self):
        graph, _ = fused(lambda self, x: sum_square(torch.stack(looked_up(self, x), 1)), ids(4, COUNT), tables=tables())
        check(graph, "CHECK: grc.bag_fm(%arena, None, %inputs_0{{.*}}, [], True, False)\nCHECK-NOT: grc.lookup")

    def test_the_linear_term_beside_bi_interaction_stays(self):
        def forward(self, x):
            e = torch.stack(looked_up(self, x), 1)
            return 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)) + torch.cat([t(x[:, :1]) for t in self.linear], 1).sum(1)

        graph, changes = fused(forward, ids(4, COUNT), tables=tables(), linear=tables(width=1))
        assert made(changes, "bag-fm") == 1
        check(graph, "CHECK: grc.bag_fm(%arena{{.*}}, None,")

    def test_several_ids_a_feature(self):
        def forward(self, x):
            e = torch.stack([t(x[:, 2 * i : 2 * i + 2]).sum(1) for i, t in enumerate(self.tables)], 1)
            return sum_square(e)

        _, changes = fused(forward, ids(4, 2 * COUNT), tables=tables())
        assert misses(changes, "bag-fm") == ["a feature has more than one id"]

    def test_sums_over_features_and_width_at_once(self):
        def forward(self, x):
            e = torch.cat(looked_up(self, x), 1)
            return (e.sum(1).square() - e.square().sum(1)) * 0.5

        _, changes = fused(forward, ids(4, COUNT), tables=tables())
        assert misses(changes, "bag-fm") == [
            "the sums run over features and width at once, so every number is a feature of its own"
        ]


class TestCross:
    @pytest.mark.parametrize(
        "layer",
        [
            lambda self, x0, x: x0 * self.layer(x) + x,
            lambda self, x0, x: x + self.layer(x) * x0,
            lambda self, x0, x: torch.addcmul(x, x0, self.layer(x)),
            lambda self, x0, x: x0 * (x @ self.layer.weight.T + self.layer.bias) + x,
        ],
        ids=["x0*f+x", "x+f*x0", "addcmul", "bias apart"],
    )
    def test_any_order_of_operands(self, layer):
        graph, changes = fused(lambda self, a, b: layer(self, a, b), rows(4, 6), rows(4, 6) + 1, layer=nn.Linear(6, 6))
        assert made(changes, "cross") == 1
        check(graph, "CHECK: grc.cross(%inputs_0, %inputs_1, %layer_weight\nCHECK-NEXT: return")

    def test_the_first_layer_where_x_is_x0(self):
        graph, changes = fused(lambda self, x: x * self.layer(x) + x, rows(4, 6), layer=nn.Linear(6, 6))
        assert made(changes, "cross") == 1
        check(graph, "CHECK: grc.cross(%inputs_0, %inputs_0")

    def test_low_rank(self):
        graph, changes = fused(
            lambda self, x: x * self.w(self.v(x)) + x, rows(4, 6), v=nn.Linear(6, 2, bias=False), w=nn.Linear(2, 6)
        )
        assert made(changes, "cross") == 1
        check(graph, "CHECK: aten.linear(%inputs_0, %v_weight\nCHECK-NEXT: grc.cross(%inputs_0, %linear")

    def test_the_product_is_read_elsewhere(self):
        def forward(self, x):
            y = self.layer(x)
            return x * y + x, y

        _, changes = fused(forward, rows(4, 6), layer=nn.Linear(6, 6))
        assert misses(changes, "cross") == ["the product is read outside of the cross layer too"]

    def test_a_sequence(self):
        _, changes = fused(lambda self, x: x * self.layer(x) + x, rows(4, 5, 6), layer=nn.Linear(6, 6))
        assert [reason.endswith("not all [B, D]") for reason in misses(changes, "cross")] == [True]

    def test_float64(self):
        _, changes = fused(lambda self, x: x * self.layer(x) + x, rows(4, 6).double(), layer=nn.Linear(6, 6).double())
        assert misses(changes, "cross") == ["values are torch.float64"]

    def test_one_vector(self):
        def forward(self, x):
            column = x.unsqueeze(2)
            weighed = torch.tensordot(column, self.layer.weight, dims=([1], [0]))
            return (column @ weighed + self.bias.weight + column).squeeze(2)

        _, changes = fused(forward, rows(4, 6), layer=nn.Linear(1, 6), bias=nn.Linear(1, 6))
        reason = "the cross layer weighs by one vector (DCN, 2017); only the matrix form has a kernel"
        assert misses(changes, "cross") == [reason]


def test_a_second_run_finds_nothing():
    def forward(self, x, d):
        t = torch.stack(looked_up(self, x), 1)
        return by_tril(torch.bmm(t, t.transpose(1, 2))), sum_square(t), d * self.layer(d) + d

    graph, changes = fused(forward, ids(4, COUNT), rows(4, 6), tables=tables(), layer=nn.Linear(6, 6))
    assert made(changes, "cross") == 1
    assert [c for c in Fuse(FUSIONS).run(graph) if c.missed is None] == []
