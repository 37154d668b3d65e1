"""Normalise: one form for each way of writing the same mathematics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from grc.graph.flat import flat_graph
from grc.passes.normalise import Normalise
from tests.graph.filecheck import check
from tests.passes.small import Small, graph_of, ids, rows, run


def normalised(function, *inputs, **modules):
    graph = graph_of(function, *inputs, **modules)
    run(graph, [Normalise()], inputs)
    return graph


BMM = "CHECK: %transpose{{.*}} = aten.transpose(%x, 1, 2)\nCHECK: aten.bmm(%x, %transpose{{.*}})\nCHECK-NOT: aten."


@pytest.mark.parametrize(
    "gram",
    [
        lambda x: x @ x.transpose(1, 2),
        lambda x: torch.bmm(x, x.permute(0, 2, 1)),
        lambda x: torch.matmul(x, x.transpose(-1, -2)),
        lambda x: torch.einsum("bnd,bmd->bnm", x, x),
        lambda x: x.contiguous() @ x.clone().mT,
    ],
    ids=["@", "permute", "matmul", "einsum", "aliases"],
)
def test_one_form_of_all_pairs(gram):
    graph = normalised(lambda self, x: gram(x), rows(4, 3, 8))
    text = BMM.replace("%x", "%inputs_0")
    check(graph, text)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: torch.mm(x, w.transpose(0, 1)),
        lambda x, w: functional.linear(x, w),
        lambda x, w: torch.addmm(torch.zeros(5), x, w.t()),
    ],
    ids=["@", "mm", "linear", "addmm"],
)
def test_one_form_of_a_linear_layer(layer):
    graph = normalised(lambda self, x: layer(x, self.layer.weight), rows(4, 3), layer=nn.Linear(3, 5))
    check(graph, "CHECK: aten.linear(%{{.*}}, %layer_weight\nCHECK-NOT: aten.")


@pytest.mark.parametrize("same", [lambda w: w.permute(0, 1), lambda w: w.transpose(1, -1), lambda w: w.permute(-2, -1)])
def test_a_matrix_in_its_own_order_is_not_transposed(same):
    inputs, layer = (rows(4, 3),), nn.Linear(3, 3)
    graph = normalised(lambda self, x: x @ same(self.layer.weight), *inputs, layer=layer)
    assert torch.allclose(graph(*inputs)[0], inputs[0] @ layer.weight)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w: torch.einsum("bsk,nk->bsn", x, w),
        lambda x, w: torch.einsum("bsk,kn->bsn", x, w.t()),
        lambda x, w: torch.einsum("kn,bsk->bsn", w.t(), x),
        lambda x, w: torch.einsum("bk,nk->bn", x[:, 0], w),
    ],
    ids=["nk", "kn", "weight first", "rows"],
)
def test_an_einsum_with_a_weight_is_a_linear_layer(layer):
    graph = normalised(lambda self, x: layer(x, self.layer.weight), rows(4, 2, 3), layer=nn.Linear(3, 5))
    check(graph, "CHECK: aten.linear(\nCHECK-NOT: aten.einsum")


@pytest.mark.parametrize("equation", ["bsk,kn->bns", "bsk,sn->bkn", "bsk,sk->bs", "bsk,kn->bkn"])
def test_other_einsums_with_a_weight_stay(equation):
    weight = {"kn": (3, 5), "sn": (2, 5), "sk": (2, 3)}[equation[4:6]]
    graph = normalised(lambda self, x: torch.einsum(equation, x, self.weight), rows(4, 2, 3), weight=rows(*weight))
    check(graph, "CHECK: aten.einsum(")


EXPERTS = {
    "rows": ("bi,eio->beo", (4, 3, 5), lambda x: x),
    "weight first": ("eoi,bi->beo", (4, 5, 3), lambda x: x),
    "outputs first": ("bi,eio->boe", (4, 3, 5), lambda x: x),
    "stacked": ("ijk,jkl->ijl", (4, 3, 5), lambda x: torch.stack([x] * 4, 1)),
    "expanded": ("bei,eio->beo", (4, 3, 5), lambda x: x.unsqueeze(1).expand(-1, 4, -1)),
    "repeated": ("bei,eoi->beo", (4, 5, 3), lambda x: x.unsqueeze(1).repeat(1, 4, 1)),
}


@pytest.mark.parametrize(("equation", "weight", "rows_of"), EXPERTS.values(), ids=EXPERTS)
def test_experts_of_one_row_are_one_linear_layer(equation, weight, rows_of):
    """Their biases and activation are that layer's."""

    def forward(self, x):
        sides = (self.weight, rows_of(x)) if equation[:2] == "eo" else (rows_of(x), self.weight)
        return (torch.einsum(equation, *sides) + self.bias).relu()

    last = (5, 4) if equation.endswith("oe") else (4, 5)
    graph = normalised(forward, rows(6, 3), weight=nn.Parameter(rows(*weight)), bias=nn.Parameter(rows(*last)))
    check(
        graph,
        f"""
        CHECK: %linear{{{{.*}}}} : float32[{{{{.*}}}}, 20] = aten.linear(%inputs_0, %weight_layers, %bias_flat
        CHECK-NEXT: aten.relu(%linear
        CHECK-NEXT: aten.reshape(%relu{{{{.*}}}}, [-1, {last[0]}, {last[1]}])
        CHECK-NOT: aten.
        """,
    )


@pytest.mark.parametrize(
    ("equation", "rows_of"),
    [
        ("bei,eio->beo", lambda x: torch.stack([x, x * 2, x, x], 1)),
        ("bei,eio->beo", lambda x: x.reshape(-1, 1, 3).repeat(2, 4, 1)),
        ("bei,eio->bo", lambda x: torch.stack([x] * 4, 1)),
        ("bi,eio->beio", lambda x: x),
        ("bi,eio->ebo", lambda x: x),
    ],
    ids=["other rows", "more rows", "summed", "not summed", "experts first"],
)
def test_other_experts_stay(equation, rows_of):
    graph = normalised(
        lambda self, x: torch.einsum(equation, rows_of(x), self.weight), rows(6, 3), weight=nn.Parameter(rows(4, 3, 5))
    )
    check(graph, "CHECK: aten.einsum(\nCHECK-NOT: aten.linear(")


def test_a_product_of_columns_is_a_linear_layer_with_a_bias():
    """deepctr's cross layer: W @ x of `[B, D, 1]`, plus a bias `[D, 1]`, times x0, plus x."""

    def cross(self, x):
        column = x.unsqueeze(2)
        return (column * (self.layer.weight @ column + self.layer.bias.view(3, 1)) + column).squeeze(2)

    graph = normalised(cross, rows(4, 3), layer=nn.Linear(3, 3))
    check(
        graph,
        """
        CHECK: %linear{{.*}} : float32[{{.*}}, 3] = aten.linear(%inputs_0, %layer_weight, %
        CHECK-NEXT: aten.mul(%inputs_0, %linear
        CHECK-NEXT: aten.add(%mul{{.*}}, %inputs_0)
        CHECK-NOT: aten.
        """,
    )


def test_shapes_are_one_reshape():
    graph = normalised(
        lambda self, x: x.view(-1, 2, 6).flatten(1).unsqueeze(1).squeeze(1).reshape(-1, 3, 4), rows(4, 12)
    )
    check(graph, "CHECK: aten.reshape(%inputs_0, [-1, 3, 4])\nCHECK-NOT: aten.")


def test_of_two_sizes_that_vary_a_view_is_a_reshape_too():
    """Torch's attention makes its mask of the padding so: the view reads what a copy made contiguous."""

    def heads(_, mask):
        return mask[:, None, None].expand(-1, 2, -1, -1).clone().view(-1, 1, mask.size(1)).exp()

    inputs = (rows(4, 5),)
    shapes = {"inputs": ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)}
    graph = flat_graph(torch.export.export(Small(heads), inputs, dynamic_shapes=shapes, strict=False))
    run(graph, [Normalise()], inputs)
    check(graph, "CHECK: aten.expand(\nCHECK-NOT: view(\nCHECK: aten.reshape(%expand")


@pytest.mark.parametrize("made", [rows, ids], ids=["of floats", "of ids"])
def test_bits_as_another_type_are_no_reshape(made):
    graph = normalised(lambda self, x: x.view(torch.int32) % 97, made(4, 6))
    check(graph, "CHECK: aten.view(%inputs_0, torch.int32)")


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.stack([a, b], 1),
        lambda a, b: torch.cat([a.unsqueeze(1), b.unsqueeze(1)], 1),
        lambda a, b: torch.cat([a, b], 1).view(-1, 2, 4),
    ],
    ids=["stack", "cat of rows", "cat"],
)
def test_one_form_of_a_stack(join):
    graph = normalised(lambda self, a, b: join(a, b), rows(4, 4), rows(4, 4))
    check(
        graph,
        "CHECK: %cat{{.*}} = aten.cat([%inputs_0, %inputs_1], 1)\nCHECK-NEXT: aten.reshape(%cat{{.*}}, [-1, 2, 4])",
    )


def test_rows_of_one_are_joined_along_their_width():
    graph = normalised(lambda self, a, b: torch.cat([a, b], -1).squeeze(1), rows(4, 1, 3), rows(4, 1, 5))
    check(graph, "CHECK: aten.cat([{{.*}}], 1)\nCHECK-NOT: aten.reshape(%cat")


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: torch.cat(x.split([2, 3, 1], 1), 1),
        lambda x: torch.cat([x[:, :2], x[:, 2:5], x[:, 5:]], 1),
        lambda x: torch.cat(x.chunk(3, 1), 1),
    ],
    ids=["split", "slices", "chunk"],
)
def test_what_is_cut_and_joined_is_left_alone(cut):
    check(normalised(lambda self, x: torch.relu(cut(x)), rows(4, 6)), "CHECK: aten.relu(%inputs_0)\nCHECK-NOT: aten.")


@pytest.mark.parametrize(
    "heads",
    [
        lambda x: torch.stack(x.split(4, 2)),
        lambda x: torch.stack(x.chunk(3, -1), 2),
        lambda x: torch.stack([x[:, :2], x[:, 2:4], x[:, 4:]], -1),
        lambda x: torch.cat(x.split(1, 1), -1).squeeze(1),
        lambda x: torch.cat(x.split(2, 1), 0),
        lambda x: torch.cat(torch.stack(x.split(4, 2)).split(1), -1).squeeze(0),
    ],
    ids=["stack first", "stack within", "stack slices", "steps side by side", "steps as rows", "there and back"],
)
def test_pieces_joined_across_are_views(heads):
    graph = normalised(lambda self, x: heads(x), rows(5, 6, 12))
    check(graph, "CHECK-NOT: aten.split\nCHECK-NOT: aten.slice\nCHECK-NOT: aten.cat\nCHECK-NOT: aten.stack")


@pytest.mark.parametrize(
    "heads",
    [
        lambda x: torch.stack(x.split(4, 2)[::-1]),
        lambda x: torch.stack(x.split(4, 2)[:2]),
        lambda x: torch.cat(x.split(5, 2)[:2], 1),
        lambda x: torch.stack([x[:, :2], x[:, 1:3], x[:, 4:]]),
    ],
    ids=["turned round", "not all", "a rest", "overlapping"],
)
def test_other_pieces_are_joined_as_they_are(heads):
    graph = normalised(lambda self, x: heads(x), rows(5, 6, 12))
    assert any("cat" in str(n.target) or "stack" in str(n.target) for n in graph.graph.nodes)


def test_neighbouring_columns_are_one_slice():
    graph = normalised(lambda self, x: torch.cat([x[:, 1:2], x[:, 2:4], x[:, 5:6]], 1), rows(4, 6))
    check(graph, "CHECK-COUNT-2: aten.slice\nCHECK: aten.slice(%inputs_0, 1, 1, 4)")


def test_the_order_of_pieces_is_kept():
    graph = normalised(lambda self, x: torch.cat([x[:, 3:], x[:, :3]], 1), rows(4, 6))
    check(graph, "CHECK: aten.cat([%slice{{.*}}, %slice{{.*}}], {{-1|1}})")


def test_a_piece_of_a_cat_is_its_operand():
    graph = normalised(lambda self, a, b: torch.relu(torch.cat([a, b], 1)[:, 3:]), rows(4, 3), rows(4, 2))
    check(graph, "CHECK: aten.relu(%inputs_1)\nCHECK-NOT: aten.")


def test_same_calls_are_one_value_and_random_ones_are_not():
    graph = normalised(lambda self, x: torch.relu(x + 1) * torch.sigmoid(x + 1), rows(4, 3))
    check(graph, "CHECK-COUNT-1: aten.add(")
    graph = graph_of(lambda self, x: torch.rand_like(x) - torch.rand_like(x), rows(4, 3))
    Normalise().run(graph)
    check(graph, "CHECK-COUNT-2: aten.rand_like")


def test_arguments_of_other_types_are_other_calls():
    graph = normalised(
        lambda self, x: (x.sum(1, keepdim=True), x.sum(1), torch.full((1,), 1), torch.full((1,), 1.0)), rows(4, 3)
    )
    check(graph, "CHECK-COUNT-2: aten.sum")


@pytest.mark.parametrize(
    ("square", "wanted"),
    [
        (lambda x: x.pow(2), "aten.mul(%inputs_0, %inputs_0)"),
        (lambda x: x.square(), "aten.mul(%inputs_0, %inputs_0)"),
        (lambda x: x / 2, "aten.mul(%inputs_0, 0.5)"),
        (lambda x: x.new_zeros(x.shape) + x.relu(), "aten.relu(%inputs_0)"),
    ],
    ids=["pow", "square", "half", "zeros"],
)
def test_arithmetic(square, wanted):
    check(normalised(lambda self, x: square(x), rows(4, 3)), f"CHECK: {wanted}\nCHECK-NOT: aten.")


def test_division_that_rounds_stays():
    check(normalised(lambda self, x: torch.div(x, 2, rounding_mode="floor"), rows(4, 3)), "CHECK: aten.div(")


@pytest.mark.parametrize(
    "read",
    [
        lambda table, x: table(x),
        lambda table, x: table.weight[x],
        lambda table, x: torch.index_select(table.weight, 0, x),
        lambda table, x: functional.one_hot(x, 10).float() @ table.weight,
    ],
    ids=["embedding", "index", "index_select", "one_hot"],
)
def test_one_form_of_a_look_up(read):
    graph = normalised(lambda self, x: read(self.table, x), ids(4, 1).squeeze(1), table=nn.Embedding(10, 3))
    check(graph, "CHECK: aten.embedding(%{{.*}}, %inputs_0)\nCHECK-NOT: aten.")


def test_computed_indices_may_be_negative_and_stay_an_index():
    graph = normalised(lambda self, x: self.table.weight[x - 5], ids(4, 1).squeeze(1), table=nn.Embedding(10, 3))
    check(graph, "CHECK: aten.index(\nCHECK-NOT: aten.embedding")


def test_a_table_whose_rows_are_limited_is_limited_once():
    def forward(self, x, y):
        return self.table(x) + self.table(y[:, None]).squeeze(1)

    table = nn.Embedding(10, 3, max_norm=0.5)
    graph = normalised(forward, ids(4, 1).squeeze(1), ids(4, 1).squeeze(1) // 2, table=table)
    check(graph, "CHECK-COUNT-2: aten.embedding(%limited_table\nCHECK-NOT: renorm")
    free = normalised(lambda self, x: self.table(x) + self.table.weight.sum(), ids(4, 1), table=table)
    check(free, "CHECK: aten.embedding_renorm")  # rows that are read without being limited


def test_what_is_computed_of_weights_is_computed_once():
    def forward(self, x):
        items = functional.normalize(self.items.weight, dim=-1) * self.scale.weight.exp().mean()
        return self.scale(x) @ items.t() + self.items.weight.sum()

    graph = normalised(forward, rows(4, 3), items=nn.Linear(3, 1000), scale=nn.Linear(3, 3, bias=False))
    check(graph, "CHECK: aten.linear(%inputs_0\nCHECK-NOT: aten.exp\nCHECK-NOT: aten.div\nCHECK-NOT: aten.sum")


@pytest.mark.parametrize(
    "zeros",
    [
        lambda self, x: x + torch.zeros(1, 3),
        lambda self, x: torch.zeros_like(x) + x,
        lambda self, x: torch.zeros(x.shape[0], 3) + x,
    ],
    ids=["a constant", "like it", "of its size"],
)
def test_nothing_added_is_nothing(zeros):
    check(
        normalised(lambda self, x: zeros(self, x).relu(), rows(4, 3)), "CHECK: aten.relu(%inputs_0)\nCHECK-NOT: aten."
    )


def test_a_row_added_to_zeros_is_that_row_for_each_user():
    graph = normalised(
        lambda self, x: x * (torch.zeros(x.shape[0], 2, 3) + self.row), rows(4, 2, 3), row=torch.ones(1, 2, 3)
    )
    check(graph, "CHECK: aten.expand(%row, [\nCHECK-NOT: aten.add")


def test_a_bias_that_happens_to_be_zeros_stays():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.bias)
    check(
        normalised(lambda self, x: x.relu() + self.layer.bias, rows(4, 3), layer=layer),
        "CHECK: aten.add(%relu, %layer_bias)",
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_one_number_is_that_number_times_a_row(bias):
    graph = normalised(lambda self, x: self.layer(x[:, 1:2]), rows(4, 3), layer=nn.Linear(1, 5, bias=bias))
    product = "CHECK: aten.mul(%slice{{.*}}, %layer_weight_row)\n"
    check(graph, product + ("CHECK-NEXT: aten.add(%mul" if bias else "CHECK-NOT: aten.linear"))


ORDERED = {
    "a catalogue": (lambda self, x: x @ self.e(torch.arange(10)).T, "CHECK: aten.linear(%inputs_0, %e_weight"),
    "some positions": (lambda self, x: x[:, None] + self.e(torch.arange(7)), "CHECK: aten.add(%{{.*}}, %first_rows)"),
    "positions of a batch": (
        lambda self, x: x[:, None] + self.e(torch.arange(7)[None]),
        "CHECK: aten.add(%{{.*}}, %constant",
    ),
}


@pytest.mark.parametrize(("read", "text"), ORDERED.values(), ids=ORDERED)
def test_rows_looked_up_in_order_are_the_table(read, text):
    graph = normalised(read, rows(4, 3), e=nn.Embedding(10, 3))
    check(graph, f"{text}\nCHECK-NOT: aten.embedding")


def test_rows_looked_up_in_order_lie_where_the_table_lies():
    e = nn.Embedding(10, 3)
    graph = normalised(lambda self, x: x[:, None] + self.e(torch.arange(7)), rows(4, 3), e=e)
    assert graph.first_rows.untyped_storage().data_ptr() == e.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2, 1], [0, 1, 1]])
def test_rows_in_another_order_are_looked_up(order):
    graph = normalised(lambda self, x: x[:, None] + self.e(torch.tensor(order)), rows(4, 3), e=nn.Embedding(10, 3))
    check(graph, "CHECK: aten.embedding(%e_weight")


def test_products_of_weights_may_grow():
    """The item tower over a whole catalogue, wider than its table; a cast alone does not wait for anything."""
    graph = normalised(
        lambda self, x: x @ self.tower(self.e.weight).T, rows(4, 24), e=nn.Embedding(50_000, 8), tower=nn.Linear(8, 24)
    )
    check(graph, "CHECK: aten.linear(%inputs_0, %constant, None)\nCHECK-NOT: aten.linear")
    graph = normalised(
        lambda self, x: x @ self.tower(self.e.weight).T, rows(4, 64), e=nn.Embedding(50_000, 8), tower=nn.Linear(8, 64)
    )
    check(graph, "CHECK: aten.linear(%e_weight, %tower_weight, %tower_bias)")


def test_weights_that_would_grow_stay():
    graph = normalised(lambda self, x: x @ self.a.weight.t().float(), rows(4, 3), a=nn.Linear(3, 200_000).half())
    check(graph, "CHECK: aten.to(\nCHECK: aten.matmul(")


def test_layers_stacked_in_one_parameter_share_its_storage():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, 3, 3))

    graph = normalised(
        lambda self, x: x @ self.stack.weights[0] + x @ self.stack.weights[1], rows(4, 3), stack=Stacked()
    )
    check(graph, "CHECK-COUNT-2: aten.linear\nCHECK-NOT: aten.select")


def test_a_second_run_finds_nothing():
    graph = normalised(lambda self, x: torch.stack([x.pow(2), x[:, :2].square().relu().repeat(1, 2)], 1), rows(4, 4))
    assert Normalise().run(graph) == []
