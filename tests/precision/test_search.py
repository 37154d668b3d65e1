"""What the search lowers, what it keeps and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grc.compiler import optimise, traced
from grc.errors import GrcError
from grc.graph.model_file import load_model
from grc.options import Options
from grc.precision.calibration import Calibration, calibration_of
from grc.precision.formats import check_precision
from grc.precision.quality import budget
from grc.precision.search import Search
from grc.precision.sites import find_sites
from grc.progress import Silent
from grc.report.summary import precision as told
from tests.precision.models import (
    Fragile,
    Ranker,
    Retriever,
    Target,
    captured,
    fragile_inputs,
    ranker_inputs,
    retriever_inputs,
    searched,
    target_inputs,
)

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"
RANKER_SITES = ["deep.weight", "head.weight", "users.weight", "items.weight"]


def test_everything_goes_down_where_the_budget_is_wide() -> None:
    found = searched(Ranker(), ranker_inputs, "int8", "max-error=0.5")
    assert {d.name: d.format for d in found.decisions} == dict.fromkeys(RANKER_SITES, "int8")
    assert found.quality["max-error"] < 0.5
    # Rows of 16 take 20 bytes instead of 64, and weights a quarter.
    assert [(d.bytes, d.lowered_bytes) for d in found.decisions[2:]] == [(19200, 6000), (32000, 10000)]


def test_nothing_goes_down_where_the_budget_is_nothing() -> None:
    found = searched(Ranker(), ranker_inputs, "int8", "max-error=0")
    assert {d.format for d in found.decisions} == {"fp32"} and found.quality == {"max-error": 0.0}
    assert all(d.reason and d.reason.startswith(("int8: max-error", "bf16: max-error")) for d in found.decisions)
    assert found.notes[-1] == "nothing could be lowered within the budget"
    assert found.decisions[0].reason.endswith("of max-error=0")
    json.dumps(found.json(), allow_nan=False)  # a share of nothing is no number


def test_int4_is_for_tables_and_a_table_that_it_ruins_takes_more_bits() -> None:
    wide = searched(Ranker(), ranker_inputs, "int4", "max-error=0.5")
    assert [d.format for d in wide.decisions] == ["int8", "int8", "int4", "int4"]
    narrow = searched(Ranker(), ranker_inputs, "int4", "max-error=0.004")
    assert all(d.format != "int4" for d in narrow.decisions)
    assert any(d.format in ("int8", "fp16", "bf16") for d in narrow.decisions)
    assert narrow.quality["max-error"] <= 0.8 * 0.004


@pytest.mark.parametrize("precision", ["int4", "auto", "int8", "bf16"])
def test_what_is_in_its_smallest_format_was_not_kept_higher(precision: str) -> None:
    """The smallest for a layer is int8 where that for a table is int4."""
    wide = searched(Ranker(), ranker_inputs, precision, "max-error=0.5")
    assert told({"precision": wide.json()})["higher"] == []


def test_what_is_above_its_smallest_format_was_kept_higher() -> None:
    narrow = searched(Ranker(), ranker_inputs, "auto", "max-error=0.004")
    higher = [site["name"] for site in told({"precision": narrow.json()})["higher"]]
    assert higher == [d.name for d in narrow.decisions if d.format != ("int4" if d.kind == "table" else "int8")]
    assert {"users.weight", "items.weight"} <= set(higher)
    none = searched(Target(), target_inputs, "int8", "max-error=1")
    assert [site["name"] for site in told({"precision": none.json()})["higher"]] == [
        d.name for d in none.decisions if d.kind == "activation unit"
    ]


def test_a_site_that_costs_too_much_on_all_rows_takes_its_next_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not none at all, and the costliest first."""
    source, graph = captured(Ranker(), ranker_inputs)
    search = Search(graph, find_sites(graph), calibration_of(source, None), budget(["max-error=0.5"]), "int4", print)
    monkeypatch.setattr(search, "verified", lambda formats, outcome: "too much" if "int4" in formats.values() else None)
    found = search.run()
    assert {d.name: d.format for d in found.decisions} == dict.fromkeys(RANKER_SITES, "int8")


def test_the_costliest_in_the_formats_in_use_steps_back_first() -> None:
    search, users, items = tables_of(Ranker(), ranker_inputs, "int4")
    search.losses = {(users, "int4"): 9.0, (items, "int4"): 1.0, (users, "int8"): 0.1, (items, "int8"): 0.2}
    formats, taken = {users: "int4", items: "int4"}, []
    for _ in range(4):
        before = dict(formats)
        search.step_back(formats, {}, "too much")
        taken += [name for name in before if formats.get(name) != before[name]]
    assert taken[:3] == [users, items, items]


def test_tables_go_by_bytes_and_layers_by_work() -> None:
    """A big table that few rows of a request read saves more than a small one that every row reads."""
    search, users, items = tables_of(Ranker(), ranker_inputs, "int8")
    sites = {site.name: site for site in search.sites}
    sites[users].work = 1000 * sites[items].work
    saved = search.savings(search.sites)
    assert saved[items, "int8"] / saved[users, "int8"] == pytest.approx(500 / 300)
    assert saved[items, "int8"] + saved[users, "int8"] == pytest.approx(1)
    assert saved["deep.weight", "int8"] / saved["head.weight", "int8"] == pytest.approx(40)
    assert saved["deep.weight", "bf16"] / saved["deep.weight", "int8"] == pytest.approx(16 / 24)


def test_moves_are_the_corners_of_a_convex_hull() -> None:
    """A format that loses as much as a smaller one is passed over."""
    search, users, items = tables_of(Ranker(), ranker_inputs, "int4")
    search.losses = {(users, "fp16"): 0.1, (users, "int8"): 0.2, (users, "int4"): 0.9}
    search.losses |= {(items, "fp16"): 0.3, (items, "int8"): 0.3, (items, "int4"): 0.4}
    own = [site for site in search.sites if site.kind == "table"]
    moves = [(site.name, form) for site, form in search.moves(own)]
    assert [form for name, form in moves if name == users] == ["fp16", "int8", "int4"]
    assert [form for name, form in moves if name == items] == ["int8", "int4"]
    assert moves[0] == (users, "fp16") and moves[-1] == (users, "int4")
    assert [(site.name, form) for site, form in search.moves(own, 1)] == [(items, "int4"), (users, "int4")]


def test_a_format_that_alone_is_too_much_is_not_tried_beside_others() -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    search = Search(graph, find_sites(graph), calibration_of(source, None), budget(["max-error=0.004"]), "int4", print)
    found = search.run()
    hopeless = {(d.name, d.smallest) for d in found.decisions if d.loss > 0.8}
    assert {name for name, form in hopeless if form == "int4"} == {"users.weight", "items.weight"}
    assert not hopeless & {tried for step in found.path for tried in step.tried.items()}
    assert all((d.reason or "").startswith("int4: max-error") for d in found.decisions if d.smallest == "int4")


def test_where_small_formats_crowd_others_out_larger_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 of the small table is cheap for what it saves, and leaves nothing for the large one."""
    search, users, items = tables_of(Ranker(), ranker_inputs, "int4")
    cost = {(users, "int4"): 0.7, (users, "int8"): 0.1, (users, "fp16"): 0.05}
    cost |= {(items, "int4"): 9.0, (items, "int8"): 0.4, (items, "fp16"): 0.35}
    monkeypatch.setattr(search, "able", [site for site in search.sites if site.kind == "table"])
    monkeypatch.setattr(search, "moves", lambda sites, count=None: [(s, search.choices[s.name][0]) for s in sites])
    lost = lambda formats: sum(cost[key] for key in formats.items())  # noqa: E731
    monkeypatch.setattr(search, "measure", lambda formats, data=None: {"max-error": 0.5 * lost(formats)})
    found = {d.name: d for d in search.run().decisions if d.kind == "table"}
    assert {name: d.format for name, d in found.items()} == {users: "int8", items: "int8"}
    assert found[users].reason == "int4: all are smaller together without it"
    assert found[items].reason is not None and found[items].reason.startswith("int4: max-error")


@pytest.mark.parametrize("name", ["dcnv2", "din", "gr", "hstu", "sasrec"])
def test_a_wider_permission_never_gives_a_larger_outcome(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRC_ZOO_SIZE", "small")
    source = traced(load_model(ZOO / f"{name}.py"), Silent())
    graph = optimise(source, Options(), Silent()).graph
    data = calibration_of(source, None)
    for limit in (0.03, 0.01, 0.004):
        taken = []
        for precision in ("int4", "int8", "bf16"):
            limits = budget([f"max-error={limit}"])
            found = Search(graph, find_sites(graph), data, limits, precision, lambda text: None).run()
            taken.append(sum(decision.lowered_bytes for decision in found.decisions))
        assert taken == sorted(taken), limit


def tables_of(model: nn.Module, inputs, precision: str, device: str = "cpu") -> tuple:
    """A search over a model, and the names of its tables."""
    source, graph = captured(model, inputs)
    sites = find_sites(graph)
    search = Search(
        graph, sites, calibration_of(source, None), budget(["max-error=0.5"]), precision, lambda text: None, device
    )
    return search, *(site.name for site in sites if site.kind == "table")


class Narrow(nn.Module):
    """A table of one column and one of three, beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.few, self.head = nn.Embedding(90, 1), nn.Embedding(90, 3), nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([self.bias(ids[:, 0]), self.few(ids[:, 1])], 1)).squeeze(1)


def narrow_inputs(batch: int) -> tuple[Tensor]:
    return (torch.randint(90, (batch, 2), generator=torch.Generator().manual_seed(batch)),)


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_table_grows(precision: str, device: str) -> None:
    """A row of one column has its scale and offset for nothing; of formats that take as much, the widest is taken."""
    search, bias, few = tables_of(Narrow(), narrow_inputs, precision, device)
    found = {d.name: d for d in search.run().decisions}
    half = "bf16" if precision == "bf16" else "fp16"
    assert found[few].lowered_bytes < found[few].bytes and found[bias].lowered_bytes <= found[bias].bytes
    if device == "cpu":
        assert (found[bias].format, found[few].format) == ("fp32", half)
        assert found[bias].reason == f"{precision} makes rows of 1 columns no smaller"
    else:  # as tensors, rows of 16 bits are half as long
        assert (found[bias].format, found[few].format) == (half, half)


def test_data_that_the_model_does_not_take_is_named() -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    dense, ids = ranker_inputs(4)
    source.model.calibration = lambda: [(dense, ids + 10**6)]
    data = calibration_of(source, None)
    with pytest.raises(GrcError, match=r"the model fails on the calibration data \(calibration\(\)\): "):
        Search(graph, find_sites(graph), data, budget(["max-error=0.5"]), "int8", print)


def test_bf16_is_never_gone_below() -> None:
    found = searched(Ranker(), ranker_inputs, "bf16", "max-error=0.5")
    assert {d.format for d in found.decisions} == {"bf16"}


def test_a_head_that_fewer_bits_ruin_stays_in_fp32_and_says_why() -> None:
    found = searched(Fragile(), fragile_inputs, "int8", "max-error=0.02")
    body, head = found.decisions
    assert (body.name, body.format) == ("body.weight", "int8")
    assert (head.name, head.format) == ("head.weight", "fp32")
    assert head.reason is not None and head.reason.startswith("int8: max-error")
    assert head.loss is not None and head.loss > 2
    assert found.quality["max-error"] <= 0.02


class Heads(nn.Module):
    """Layers behind arithmetic, a gate, and one in the middle."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body, self.head, self.other = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.body(x)))
        match self.kind:
            case "scaled":
                return torch.sigmoid(y * 2.0 + 1.0)
            case "temperature":
                return (y / 1.7)[:, :2].clamp(-5.0, 5.0)
            case "wide and deep":
                return torch.sigmoid(y + self.other(x))
            case "tasks":
                return torch.stack([-y, 1.0 - self.other(x)], 1)
        return (y.softmax(1) * self.other(x)).sum(1)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("scaled", ["head"]),
        ("temperature", ["head"]),
        ("wide and deep", ["head", "other"]),
        ("tasks", ["head", "other"]),
        ("gate", ["head"]),
    ],
)
def test_layers_behind_arithmetic_before_an_answer_are_heads(kind: str, heads: list[str]) -> None:
    _, graph = captured(Heads(kind), fragile_inputs)
    assert sorted(site.name for site in find_sites(graph) if site.head) == [f"{name}.weight" for name in heads]


class Best(nn.Module):
    """The ids of the best alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 50)

    def forward(self, x: Tensor) -> Tensor:
        return torch.topk(self.scores(x), 5).indices


def test_a_model_that_answers_with_ids_has_errors_too() -> None:
    found = searched(Best(), fragile_inputs, "int8", "max-error=0.5")
    assert {d.format for d in found.decisions} == {"int8"} and 0 < found.quality["max-error"] < 0.5
    assert found.frontier[-1].quality["max-error"] > 0
    tight = searched(Best(), fragile_inputs, "int8", f"max-error={found.quality['max-error'] / 2}")
    assert {d.format for d in tight.decisions} <= {"bf16", "fp32"}


def test_heads_are_tried_when_all_else_is_done_and_by_themselves() -> None:
    found = searched(Ranker(), ranker_inputs, "int8", "max-error=0.004")
    heads = [set(step.tried) for step in found.path[:-1] if "head.weight" in step.tried]
    assert heads and all(tried == {"head.weight"} for tried in heads)
    first = next(i for i, step in enumerate(found.path) if "head.weight" in step.tried)
    assert {name for step in found.path[:first] for name in step.tried} == set(RANKER_SITES) - {"head.weight"}


def test_the_frontier_runs_from_nothing_to_everything() -> None:
    points = searched(Ranker(), ranker_inputs, "int8", "max-error=0.5").frontier
    assert [p.bytes for p in points] == sorted((p.bytes for p in points), reverse=True)
    assert points[0].quality == {"max-error": 0.0} and points[0].work == 1.0
    assert [p.chosen for p in points].count(True) == 1 and points[-1].chosen


def test_the_same_data_give_the_same_outcome() -> None:
    a, b = (searched(Ranker(), ranker_inputs, "int8", "max-error=0.01").json() for _ in range(2))
    assert a == b


def test_rows_to_check_again_take_an_eighth_of_the_weights_at_most() -> None:
    """But sixteen at least. The outcome is inside the budget on them too."""
    torch.manual_seed(0)
    source, graph = captured(Ranker(), ranker_inputs)
    source.model.calibration = lambda: [ranker_inputs(5000)]
    data, limits = calibration_of(source, None), budget(["max-error=0.01"])
    search = Search(graph, find_sites(graph), data, limits, "int8", print)
    found = search.run()
    whole, kept = sum(site.bytes for site in search.sites), found.kept.calibration.rows
    assert 16 < kept < search.some.calibration.rows == 256 and kept % 16 == 0
    assert sum(tensor.nbytes for tensor in found.kept.tensors.values()) <= whole / 8
    assert found.json()["calibration"] | {"sha256": ""} == {
        "origin": "calibration()", "rows": 5000, "kept": kept, "labels": False, "sha256": ""
    }  # fmt: skip
    assert 0 < search.measure(found.formats, found.kept)["max-error"] <= 0.8 * 0.01
    assert Search(graph, search.sites[1:2], data, limits, "int8", print).kept.calibration.rows == 16


def test_labels_judge_where_the_budget_asks_for_them() -> None:
    source, _ = captured(Ranker(), ranker_inputs)
    batches = [source.inputs(64), source.inputs(65)]
    labels = [torch.randint(0, 2, (64,)), torch.randint(0, 2, (65,))]
    data = Calibration(batches, labels, "test", True, sizes=[["batch", 8], ["batch", 2]])
    found = searched(Ranker(), ranker_inputs, "int8", "auc-drop=0.05", calibration=data)
    assert abs(found.quality["auc-drop"]) <= 0.05 and set(found.quality) == {"auc-drop"}


def test_an_outcome_says_what_the_winners_made_of_it() -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    search = Search(graph, find_sites(graph), calibration_of(source, None), budget(["max-error=0.5"]), "int8", print)
    found = search.run()
    assert found.choices["float-layers"] == dict.fromkeys(("users.weight", "items.weight"), "int8")
    before, bytes_before = dict(found.formats), found.frontier[-1].bytes
    search.settle(found, {1: "inductor", 64: "onnxruntime"})
    assert found.formats == before and not [note for note in found.notes if "layers" in note]
    search.settle(found, {1: "inductor", 64: "inductor-float-layers"})
    assert found.formats == before
    assert found.notes[-1] == "at batch 64 the engine chosen keeps layers in fp32: they are stored twice"
    search.settle(found, {1: "inductor-float-layers", 64: "inductor-float-layers"})
    assert found.formats == {"users.weight": "int8", "items.weight": "int8"}
    (chosen,) = [point for point in found.frontier if point.chosen]
    assert chosen.bytes > bytes_before and 0 < chosen.quality["max-error"] < found.quality["max-error"]


def test_an_outcome_says_that_a_gpu_took_layers_in_halves() -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    data, limits = calibration_of(source, None), budget(["max-error=0.5"])
    search = Search(graph, find_sites(graph), data, limits, "int8", print, "cuda")
    found = search.run()
    search.settle(found, {1: "inductor-half-layers", 64: "inductor-half-layers-small"})
    layers = [d for d in found.decisions if d.kind == "layer"]
    assert {(d.format, d.reason) for d in layers} == {("fp16", "int8: the engine chosen keeps layers in fp16")}
    assert all(2 * d.lowered_bytes == d.bytes for d in layers)


def test_on_a_gpu_the_tables_of_an_arena_take_the_widest_of_their_formats() -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    sites = find_sites(graph)
    users, items = (site.name for site in sites if site.kind == "table")
    search = Search(graph, sites, calibration_of(source, None), budget(["max-error=0.5"]), "fp16", print, "cuda")
    formats, reasons = {users: "fp16", "deep.weight": "fp16"}, {}
    search.one_format_an_arena(formats, reasons)
    assert formats == {"deep.weight": "fp16"}
    assert reasons == {users: "another table of its arena stays in float32"}
    mixed = {users: "int4", items: "fp16"}
    search.one_format_an_arena(mixed, reasons)
    assert mixed == {users: "fp16", items: "fp16"}
    assert {d.format for d in search.run().decisions} == {"fp16"}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_items_that_are_looked_up_and_ranked_are_stored_once_on_a_gpu(precision: str) -> None:
    """In 8 bits beside their float16 they would take more than in float16 for both."""
    found = searched(Retriever(), retriever_inputs, precision, "max-error=0.5", device="cuda")
    formats = {decision.kind: decision.format for decision in found.decisions}
    assert (formats["table"], formats["ranking"]) == ("fp16", "fp16")
    (table,) = [decision for decision in found.decisions if decision.kind == "table"]
    assert table.reason == f"{precision}: all are smaller together without it"


def test_a_gpu_without_fp8_is_named() -> None:
    check_precision("fp8", "cuda", "sm_90")
    with pytest.raises(GrcError, match="sm_80 has no fp8, which begins with sm_89"):
        check_precision("fp8", "cuda", "sm_80")


def test_random_inputs_are_told_to_say_little() -> None:
    source, _ = captured(Ranker(), ranker_inputs)
    (note,) = calibration_of(source, None).notes
    assert note.startswith("calibrated on what get_inputs draws: if its ids and values are random, they say little")
