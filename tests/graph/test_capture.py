"""Capture on what real models do: shapes, structures, dtypes and inputs that exporters stumble over."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import grc
from grc.graph.capture import Source, capture
from grc.graph.faults import fault_at
from grc.graph.model_file import from_module
from grc.graph.oracle import largest_error
from grc.lowering.store import Store
from grc.runtime.inputs import UNBOUNDED
from grc.runtime.structure import builder
from tests.graph.filecheck import check


class Forward(nn.Module):
    """A module whose forward is a function, so that a test reads as the model it is about."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Neighbours(Forward):
    """With the sparse adjacency of 50 users and items, as graph convolutions over them have."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__(function, **modules)
        edges = torch.randint(0, 50, (2, 200), generator=torch.Generator().manual_seed(0))
        adjacency = torch.sparse_coo_tensor(edges, torch.full((200,), 0.1), (50, 50), check_invariants=True)
        self.register_buffer("adjacency", adjacency.coalesce())


def rows(batch: int, *sizes: int) -> Tensor:
    return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(batch))


def ids(batch: int, columns: int, limit: int = 10) -> Tensor:
    return torch.randint(0, limit, (batch, columns), generator=torch.Generator().manual_seed(batch))


def captured(module: nn.Module, inputs) -> Source:
    torch.manual_seed(0)
    source = capture(from_module(module.eval(), inputs))
    agrees(source, 6, 19)
    return source


def captured_half() -> Source:
    torch.manual_seed(0)
    return capture(from_module(nn.Linear(8, 4).half().eval(), lambda b: (0.1 * rows(b, 8).half(),)))


@torch.no_grad()
def agrees(source: Source, *batches: int) -> None:
    """At batch sizes that neither the export nor its check has seen."""
    for batch in batches:
        assert largest_error(list(source.graph(*source.inputs(batch))), source.eager(batch)) < 1e-5


PLAIN_LAYER = """
CHECK: layer_norm
CHECK: linear
CHECK: scaled_dot_product_attention
CHECK-NOT: encoder_layer_fwd
"""


class TestExports:
    @pytest.mark.parametrize("reads_numpy", [False, True])
    def test_a_transformer_layer_is_its_operators_in_both_modes(self, reads_numpy: bool) -> None:
        """numpy in forward is what only the strict mode takes: there torch would trace its one kernel for the whole layer."""

        def forward(self, x):
            return self.layer(x) * float(x.shape[-1] if not reads_numpy else np.asarray(x.detach()).shape[-1])

        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        source = captured(Forward(forward, layer=layer), lambda b: (rows(b, 6, 32),))
        assert source.mode == ("strict" if reads_numpy else "non-strict")
        check(source.graph, PLAIN_LAYER)
        assert torch.backends.mha.get_fastpath_enabled()

    def test_a_half_precision_model_may_be_as_noisy_as_its_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = captured_half()
        answers, eps = source.eager(4), torch.finfo(torch.half).eps
        for change, fault in ((eps, None), (0.05, "the export answers differently at batch 4 (error 5.0e-02)")):
            monkeypatch.setattr(source, "eager", lambda batch, change=change: [a + change for a in answers])
            found = fault_at(source, 4)
            assert found is None if fault is None else found and found.startswith(fault)

    def test_numpy_in_forward_of_constant_values(self) -> None:
        scale = np.array([1.0, 2.0, 3.0], dtype=np.float32)
        source = captured(Forward(lambda self, x: x * torch.from_numpy(scale)), lambda b: (rows(b, 3),))
        assert source.mode in ("non-strict", "strict")

    def test_numpy_on_an_input_is_right_or_refused(self) -> None:
        """Strict traces numpy; non-strict can't. Whichever wins must answer as the model does."""
        model = Forward(lambda self, x: torch.from_numpy(np.tanh(x.numpy())))
        assert captured(model, lambda b: (rows(b, 3),)).mode == "strict"

    def test_where_strict_fails_non_strict_works(self) -> None:
        class Tagged:
            def __init__(self, x: Tensor) -> None:
                self.x = x

            def __getattr__(self, name: str):
                raise AttributeError(name)

        import ctypes

        def forward(self, x):
            ctypes.c_int(3)  # dynamo can't trace a foreign type
            return Tagged(x).x * 2

        assert captured(Forward(forward), lambda b: (rows(b, 3),)).mode == "non-strict"

    def test_a_view_that_refuses_batch_1_is_padded(self) -> None:
        model = Forward(lambda self, x: x.squeeze().sum(-1) if x.shape[0] > 1 else x.squeeze(1).sum(-1))
        source = captured(model, lambda b: (rows(b, 1, 4),))
        assert source.min_batch == 2

    def test_a_model_that_fails_at_batch_1_itself(self) -> None:
        model = Forward(lambda self, x: torch.stack([r.sum(-1) for r in (x.squeeze() * 2, x.squeeze() + 1)], 1))
        assert captured(model, lambda b: (rows(b, 1, 4),)).min_batch == 2

    def test_fixed_sizes(self) -> None:
        source = captured(Forward(lambda self, x: x @ x.T), (rows(5, 5),))
        assert not source.dynamic

    def test_no_grad_regions_are_inlined(self) -> None:
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
            return y + self.layer(x)

        source = captured(Forward(forward, layer=nn.Linear(4, 4)), lambda b: (rows(b, 4),))
        check(source.graph, "CHECK: aten.mul(%\nCHECK: aten.linear\nCHECK-NOT: wrap_with")


class TestIds:
    def test_inside_a_float_matrix(self) -> None:
        def forward(self, x):
            return self.table(x[:, 0].long()) * x[:, 1:]

        def inputs(b):
            return (torch.cat([ids(b, 1).float(), rows(b, 4)], 1),)

        source = captured(Forward(forward, table=nn.Embedding(10, 4)), inputs)
        assert source.dtypes == [torch.float32]

    def test_above_2_to_the_32(self) -> None:
        def inputs(b):
            return (ids(b, 2, 10) + 2**33,)

        source = captured(Forward(lambda self, x: self.table(x - 2**33), table=nn.Embedding(10, 4)), inputs)
        assert source.dtypes == [torch.int64]

    def test_hashed_from_any_integer(self) -> None:
        source = captured(
            Forward(lambda self, x: self.table((x * 2654435761) % 10), table=nn.Embedding(10, 4)),
            lambda b: (ids(b, 3, 1 << 40),),
        )
        check(source.graph, "CHECK: aten.remainder\nCHECK: aten.embedding")

    def test_as_output(self) -> None:
        source = captured(
            Forward(lambda self, x: self.score(x).topk(3).indices, score=nn.Linear(4, 20)), lambda b: (rows(b, 4),)
        )
        assert source.out_dtypes == [torch.int64]

    def test_int32_stays_int32(self) -> None:
        source = captured(
            Forward(lambda self, x: self.table(x), table=nn.Embedding(10, 4)), lambda b: (ids(b, 3).int(),)
        )
        assert source.dtypes == [torch.int32]


class Scores(NamedTuple):
    scores: Tensor
    items: Tensor


Local = namedtuple("Local", ["a", "b"])


class TestStructures:
    @pytest.mark.parametrize(
        ("function", "kind"),
        [
            (lambda x: torch.topk(x, 2), torch.return_types.topk),
            (lambda x: {"a": x, "b": [x + 1, (x + 2,)]}, dict),
            (lambda x: Scores(x, x + 1), Scores),
            (lambda x: (x, None, {"n": 3, "x": x * 2}), tuple),
            (lambda x: [x, x], list),
            (lambda x: Local(x, {"k": Local(x + 1, x + 2)}), Local),
        ],
        ids=["topk", "dict", "NamedTuple", "constants", "same twice", "namedtuple in dict"],
    )
    def test_outputs(self, function, kind: type) -> None:
        source = captured(Forward(lambda self, x: function(x)), lambda b: (rows(b, 4),))
        answer = builder(source.out_structure)(source.graph(*source.inputs(4)))
        wanted = function(source.inputs(4)[0])
        assert type(answer) is kind
        assert str(answer) == str(wanted)

    def test_dict_and_nested_inputs(self) -> None:
        def forward(self, dense, groups):
            return dense + groups["a"] + groups["b"][0] * groups["b"][1]

        def inputs(b):
            return {"dense": rows(b, 3), "groups": {"a": rows(b, 3), "b": [rows(b, 3), rows(b, 1)]}}

        source = captured(Forward(lambda self, dense, groups: forward(self, dense, groups)), inputs)
        assert source.names == ["dense", "groups.a", "groups.b[0]", "groups.b[1]"]


def lengths(batch: int, longest: int = 4) -> Tensor:
    return torch.randint(0, longest + 1, (batch,), generator=torch.Generator().manual_seed(batch))


class TestSizes:
    """Several sizes that vary on their own."""

    def test_jagged_values_with_lengths(self) -> None:
        def inputs(b):
            n = lengths(b)
            return ids(int(n.sum()), 1).squeeze(1), n

        def forward(self, values, n):
            return self.table(values, torch.cat([n.new_zeros(1), n.cumsum(0)]))

        bag = nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True)
        source = captured(Forward(forward, table=bag), inputs)
        assert [s.json() for sizes in source.sizes for s in sizes] == ["n0", "batch"]

    def test_two_jagged_inputs_vary_apart(self) -> None:
        def inputs(b):
            n, m = lengths(b), lengths(b, 9).flip(0)
            return ids(int(n.sum()), 1).squeeze(1), n.cumsum(0) - n, ids(int(m.sum()), 1).squeeze(1), m.cumsum(0) - m

        model = Forward(
            lambda self, v, o, w, p: self.a(v, o) + self.b(w, p),
            a=nn.EmbeddingBag(10, 4, mode="sum"),
            b=nn.EmbeddingBag(10, 4, mode="mean"),
        )
        source = captured(model, inputs)
        assert [sizes[0].json() for sizes in source.sizes] == ["n0", "batch", "n1", "batch"]

    def test_empty_bags_and_no_values_at_all(self) -> None:
        def inputs(b):
            n = lengths(b)
            return ids(int(n.sum()), 1).squeeze(1), n.cumsum(0) - n

        source = captured(Forward(lambda self, v, o: self.a(v, o), a=nn.EmbeddingBag(10, 4, mode="mean")), inputs)
        empty = source.graph(torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))[0]
        assert torch.equal(empty, torch.zeros(3, 4))

    def test_empty_histories(self) -> None:
        """A softmax over no step at all gives NaN where the model does."""

        def forward(self, steps, n):
            hidden = torch.arange(steps.shape[1]) >= n.unsqueeze(1)
            weights = steps.sum(-1).masked_fill(hidden, float("-inf")).softmax(-1)
            return (weights.unsqueeze(-1) * steps).sum(1)

        captured(Forward(forward), lambda b: (rows(b, 5, 3), lengths(b)))

    def test_history_length_that_varies_with_the_request(self) -> None:
        source = captured(Forward(lambda self, x: x.mean(1)), lambda b: (rows(b, 3 + (b * 7) % 5, 4),))
        assert [s.json() for s in source.sizes[0]] == ["batch", "n0", 4]

    def test_positions_bound_the_steps(self) -> None:
        """A compiled slice of a table reads beyond its end, and the last of no steps lies before the first."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            steps = x + self.table.weight[: x.shape[1]]
            return steps.mean(1), steps[:, -1]

        source = captured(Forward(forward, table=nn.Embedding(50, 4)), lambda b: (rows(b, 3 + (b * 7) % 5, 4),))
        assert (source.bounds, source.max_batch) == ([[(1, 1, 50)]], UNBOUNDED)
        assert source.notes == ["dimension 1 of input input0 is 1 to 50, and another request is refused"]

    def test_the_last_steps_bound_them_from_below(self) -> None:
        source = captured(Forward(lambda self, x: x[:, -5:].mean(1)), lambda b: (rows(b, 9 + (b * 7) % 5, 4),))
        assert source.bounds == [[(1, 5, UNBOUNDED)]]

    def test_steps_that_only_the_model_needs_have_no_bound(self) -> None:
        source = captured(Forward(lambda self, x: x.sum(1)), lambda b: (rows(b, 3 + (b * 7) % 5, 4),))
        assert (source.bounds, source.notes) == ([[]], [])

    def test_another_path_for_many_rows_bounds_the_batch(self) -> None:
        source = captured(Forward(lambda self, x: x * 2 if x.shape[0] > 100 else x), lambda b: (rows(b, 4),))
        assert (source.max_batch, source.bounds) == (100, [[]])
        assert source.notes == ["the batch is up to 100, and a larger request is refused"]

    def test_a_size_that_is_twice_the_batch(self) -> None:
        source = captured(Forward(lambda self, x: x.view(-1, 2, 3).sum(1)), lambda b: (rows(2 * b, 3),))
        assert source.sizes[0][0].json() == {"scale": 2, "offset": 0}


class TestSharedMemory:
    def test_sizes_that_are_compared_in_python(self) -> None:
        """The exporter records one batch size then, and passes would take it for a constant."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if int(x.shape[0]) != int(y.shape[0]):
                raise ValueError("rows differ")
            self.norm.num_batches_tracked += 1
            return torch.cat([torch.einsum("ij,jk->ijk", x, self.layer.weight), self.table(y)], 1)

        parts = {"table": nn.Embedding(10, 4), "layer": nn.Linear(4, 3), "norm": nn.BatchNorm1d(4)}
        source = captured(Forward(forward, **parts), lambda b: (rows(b, 3), ids(b, 2)))
        nodes = [node for node in source.graph.graph.nodes if node.op in ("placeholder", "call_function")]
        recorded = [node.meta["val"].shape[0] for node in nodes]
        batch = recorded[0].node.expr
        assert batch.is_symbol and all(size.node.expr == batch for size in recorded if not isinstance(size, int))
        assert [note.partition(" ")[0] for note in source.notes] == ["forward"]

    def test_one_tensor_given_twice_is_two_inputs(self) -> None:
        def inputs(b):
            x = rows(b, 3)
            return x, x

        source = captured(Forward(lambda self, x, y: x - 2 * y), inputs)
        x, y = rows(4, 3), rows(5, 3)[:4]
        assert torch.equal(source.graph(x, y)[0], x - 2 * y)

    def test_views_of_one_tensor_are_inputs_of_their_own(self) -> None:
        def forward(self, values, starts, ends):
            return self.a(values, starts) + self.b(values, ends)

        def inputs(b):
            ends = torch.arange(b + 1) * 2 - torch.arange(b + 1) // 3
            return ids(int(ends[-1]), 1).squeeze(1), ends[:-1], ends

        tables = {"a": nn.EmbeddingBag(10, 4), "b": nn.EmbeddingBag(10, 4, include_last_offset=True)}
        assert captured(Forward(forward, **tables), inputs).min_batch == 1


class TestState:
    def test_a_counter_in_a_buffer_is_kept_as_it_was(self) -> None:
        def forward(self, x: Tensor) -> Tensor:
            self.norm.num_batches_tracked += 1
            return torch.relu(self.norm(x))

        source = captured(Forward(forward, norm=nn.BatchNorm1d(4)), lambda b: (rows(b, 4),))
        assert source.notes == [
            "forward changes norm.num_batches_tracked: an artifact keeps it as it was when compiled"
        ]
        check(source.graph, "CHECK: relu\nCHECK-NOT: copy_")

    def test_an_input_that_forward_writes_to(self) -> None:
        source = captured(Forward(lambda self, x: x.clamp_(min=0) + 1), lambda b: (rows(b, 4),))
        assert source.notes == []
        check(source.graph, "CHECK: clamp\nCHECK-NOT: copy_")
        captured(Forward(lambda self, x: x.add_(1) * 2), lambda b: (rows(b, 4),))

    def test_a_weight_as_output(self) -> None:
        source = captured(
            Forward(lambda self, x: (self.layer(x), self.layer.weight), layer=nn.Linear(4, 3)), lambda b: (rows(b, 4),)
        )
        assert [s.json() for s in source.out_sizes[1]] == [3, 4]

    def test_rows_that_are_scaled_where_they_are_looked_up(self) -> None:
        table = nn.Embedding(10, 4, max_norm=1.0)
        source = captured(Forward(lambda self, x: self.table(x).sum(1), table=table), lambda b: (ids(b, 3),))
        assert "table.weight" in source.notes[0]


@dataclasses.dataclass
class Visit:
    user: Tensor
    seen: list[Tensor]
    weight: Tensor | None = None
    scale: float = 2.0


@dataclasses.dataclass
class Answer:
    score: Tensor
    visit: Visit


class TestDataclasses:
    def test_they_nest_in_inputs_and_outputs(self, tmp_path: Path) -> None:
        def forward(self, visit: Visit, x: Tensor) -> Answer:
            score = (self.table(visit.user) * x).sum(-1) * visit.scale + visit.seen[0].sum(1)
            return Answer(score, Visit(visit.user + 1, [score, x]))

        def inputs(batch: int) -> tuple[Visit, Tensor]:
            return Visit(ids(batch, 1)[:, 0], [rows(batch, 3)]), rows(batch, 4)

        torch.manual_seed(0)
        model = Forward(forward, table=nn.Embedding(10, 4)).eval()
        options = grc.Options(tmp_path / "visits.grc", batches=(4,), engine="eager", strict=True)
        program = grc.load(grc.compile(model, inputs, options).path)
        visit, x = inputs(6)
        want = model(visit, x)
        as_dict = {"user": visit.user, "seen": visit.seen, "weight": None, "scale": 2.0}
        for given in (visit, as_dict):  # whoever sends a request may not have the class
            answer = program(given, x)
            assert type(answer) is Answer and type(answer.visit) is Visit and answer.visit.weight is None
            torch.testing.assert_close(answer.score, want.score)
            torch.testing.assert_close(answer.visit.seen, want.visit.seen)
        with pytest.raises(grc.GrcError, match="the request holds"):
            program({**as_dict, "scale": 3.0}, x)


class TestConstants:
    def test_a_graph_convolution_is_a_look_up(self, tmp_path: Path) -> None:
        """LightGCN (He et al. 2020): the mean over layers of sums over neighbours, all of it known before any request."""

        def forward(self, x: Tensor) -> Tensor:
            layers = [torch.cat([self.users.weight, self.items.weight])]
            for _ in range(2):
                layers.append(torch.sparse.mm(self.adjacency, layers[-1]))
            users, items = torch.stack(layers, 1).mean(1).split([30, 20])
            return (users[x[:, 0]] * items[x[:, 1]]).sum(-1)

        torch.manual_seed(0)
        model = Neighbours(forward, users=nn.Embedding(30, 8), items=nn.Embedding(20, 8)).eval()
        options = grc.Options(tmp_path / "lightgcn.grc", batches=(4,), engine="eager", strict=True)
        program = grc.load(grc.compile(model, lambda b: (ids(b, 2),), options).path)
        x = ids(6, 2)
        torch.testing.assert_close(program(x), model(x))
        assert sorted(t.shape[0] for t in program.artifact.weights.values() if t.dim() == 2) in ([50], [20, 30])

    def test_a_sparse_constant_is_not_stored(self) -> None:
        with pytest.raises(grc.GrcError, match="adjacency is a sparse tensor") as caught:
            Store().add("adjacency", Neighbours(None).adjacency)
        assert "index_add" in str(caught.value.hint)

    def test_an_encoder_with_a_causal_mask_and_padding(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            mask, padding = nn.Transformer.generate_square_subsequent_mask(5), torch.arange(5) >= lengths[:, None]
            return self.encoder(x, mask=mask, src_key_padding_mask=padding)

        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        source = captured(Forward(forward, encoder=encoder), lambda b: (rows(b, 5, 8), torch.arange(b) % 5 + 1))
        check(source.graph, "CHECK-COUNT-2: = aten.scaled_dot_product_attention")


class TestNumerics:
    def test_dtypes_are_kept(self) -> None:
        model = Forward(lambda self, x: self.layer(x), layer=nn.Linear(4, 4)).bfloat16()
        source = captured(model, lambda b: (rows(b, 4).bfloat16(),))
        found = {n.meta["val"].dtype for n in source.graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
        assert found == {torch.bfloat16}

    def test_a_model_in_float64_stays_there(self) -> None:
        source = captured(
            Forward(lambda self, x: self.layer(x), layer=nn.Linear(4, 4)).double(), lambda b: (rows(b, 4).double(),)
        )
        assert source.out_dtypes == [torch.float64]

    def test_same_graph_twice(self) -> None:
        from grc.graph.show import show

        model = Forward(lambda self, x: torch.relu(self.layer(x)), layer=nn.Linear(4, 4))
        first, second = (show(captured(model, lambda b: (rows(b, 4),)).graph) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
@pytest.mark.parametrize("kind", ["buffer", "parameter", "layer"])
def test_names_that_a_graph_has_for_itself(name: str, kind: str) -> None:
    """An item's `meta`, a neighbour's `graph`: torch.export fails on them."""
    table = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    made = {"buffer": table, "parameter": nn.Parameter(table), "layer": nn.Embedding.from_pretrained(table)}[kind]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        found = getattr(self, name)
        return found(x).sum(1) if kind == "layer" else found[x].sum(1)

    model = Forward(forward)
    if kind == "buffer":
        model.register_buffer(name, made)
    else:
        setattr(model, name, made)
    source = captured(model, lambda b: (ids(b, 4),))
    assert torch.allclose(source.graph(*source.inputs(6))[0], source.eager(6)[0])
    assert source.names == ["input0"]
