"""Trials answer as what is built would: packed layers, tables of bytes, and the graph that a GPU is given."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from grc.graph.capture import Source
from grc.graph.spec import verify
from grc.kernels import cpp
from grc.kernels.lookup.row_formats import ROW_FORMATS
from grc.kernels.quantised_linear import panels
from grc.lowering.pack import pack_linears
from grc.precision.apply import graphs_of, with_tables
from grc.precision.calibration import calibration_of
from grc.precision.formats import FORMATS
from grc.precision.gpu import halved_layers, narrowed, tables_of_bytes
from grc.precision.quality import budget
from grc.precision.search import Search
from grc.precision.sites import find_sites
from grc.precision.trial import Trial
from tests.precision.models import (
    Bags,
    Ranker,
    Retriever,
    Target,
    bag_inputs,
    captured,
    ranker_inputs,
    retriever_inputs,
    searched,
    target_inputs,
)


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_trials_of_layers_answer_as_the_packed_graph_does(form: str) -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    sites = find_sites(graph)
    formats = {"deep.weight": form, "head.weight": form}
    packed = pack_linears(graph, cpp.target_isa(), formats)
    for batch in (1, 37):
        inputs = source.inputs(batch)
        trial = Trial(graph, sites, formats).answers(inputs)
        assert torch.allclose(trial[0], packed(*inputs)[0], atol=1e-5)


@pytest.mark.parametrize("shift", range(len(ROW_FORMATS)))
def test_trials_of_tables_answer_as_the_graph_of_bytes_does(shift: int, tmp_path) -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    sites = find_sites(graph)
    formats = {"users.weight": ROW_FORMATS[shift], "items.weight": ROW_FORMATS[(shift + 1) % len(ROW_FORMATS)]}
    formats = {name: form for name, form in formats.items() if form != "fp32"}
    lowered = with_tables(graph, sites, formats, tmp_path)
    assert "uint8" in str({n.meta["val"].dtype for n in lowered.graph.nodes if n.op == "get_attr"})
    for batch in (1, 37):
        inputs = source.inputs(batch)
        trial = Trial(graph, sites, formats).answers(inputs)
        assert torch.allclose(trial[0], lowered(*inputs)[0], atol=1e-5)


def agree(
    source: Source, graph: fx.GraphModule, formats: dict[str, str], folder: Path, batches: tuple[int, ...]
) -> None:
    """A trial answers as the graph with tables of bytes does, and otherwise than the one that it came from."""
    sites = find_sites(graph)
    lowered = with_tables(graph, sites, formats, folder)
    for batch in batches:
        inputs = source.inputs(batch)
        trial = Trial(graph, sites, formats).answers(inputs)
        assert torch.allclose(trial[0], lowered(*inputs)[0], atol=1e-5)
        assert not torch.equal(trial[0], graph(*inputs)[0])


def test_tables_of_bags_and_of_offsets(tmp_path) -> None:
    source, graph = captured(Bags(), bag_inputs)
    sites = find_sites(graph)
    tables = [site for site in sites if site.kind == "table"]
    assert [len(site.features) for site in tables if site.elements == 60 * 8] == [3]  # one table, not three
    assert "history.weight" in [site.name for site in tables]
    formats = {site.name: "int8" for site in tables}
    agree(source, graph, formats, tmp_path, (3, 20))


class Widths(nn.Module):
    """Tables of three widths, none a multiple of another, that end in one cat: one arena holds their numbers in line."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.hours = nn.Embedding(30, 16), nn.Embedding(40, 12), nn.Embedding(7, 5)
        self.head = nn.Linear(33, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.users(ids[:, 0]), self.items(ids[:, 1]), self.hours(ids[:, 2])], 1)
        return self.head(x).squeeze(1)


def width_inputs(batch: int) -> tuple[Tensor]:
    return (torch.randint(7, (batch, 3), generator=torch.Generator().manual_seed(batch)),)


@pytest.mark.parametrize("form", ["int8", "int4", "bf16"])
def test_tables_of_several_widths_in_one_arena(form: str, tmp_path) -> None:
    source, graph = captured(Widths(), width_inputs)
    sites = find_sites(graph)
    assert len({site.arena for site in sites if site.kind == "table"}) == 1
    formats = {site.name: form for site in sites if site.kind == "table"}
    agree(source, graph, formats, tmp_path, (1, 20))


@pytest.mark.parametrize(("value", "told"), [(1e6, "1e+06"), (-7e4, "-70000"), (torch.nan, "nan"), (torch.inf, "inf")])
def test_a_row_that_float16_can_not_scale_leaves_its_table_in_bfloat16(value: float, told: str, tmp_path) -> None:
    """The data to calibrate on never read that row."""
    model = Widths()
    with torch.no_grad():
        model.items.weight[33, 2] = value
    source, graph = captured(model, width_inputs)
    search = Search(graph, find_sites(graph), calibration_of(source, None), budget(["max-error=0.5"]), "int8", print)
    found = search.run()
    decided = {d.name: d for d in found.decisions}
    assert {name: d.format for name, d in decided.items()} == {
        "head.weight": "int8", "users.weight": "int8", "items.weight": "bf16", "hours.weight": "fp16"
    }  # fmt: skip
    assert decided["hours.weight"].reason == "int8 makes rows of 5 columns no smaller"
    assert decided["items.weight"].smallest == "int8"
    assert decided["items.weight"].reason == f"row 33 holds {told}, and float16, which scales it, ends at 65504"
    lowered = with_tables(graph, search.sites, found.formats, tmp_path)
    assert torch.isfinite(lowered(*source.inputs(9))[0]).all()
    gpu = Search(graph, search.sites, calibration_of(source, None), budget(["max-error=0.5"]), "int8", print, "cuda")
    assert {d.format for d in gpu.run().decisions if d.kind == "table"} == {"fp32"}


class Steps(nn.Module):
    """Attention over the steps of a history, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(16, 96), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(found.transpose(1, 2).flatten(2).mean(1))


def step_inputs(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 6, 16, generator=torch.Generator().manual_seed(batch)),)


def smallest(sites, precision: str) -> dict[str, str]:
    """Every site in the smallest format that a precision has for it on a GPU."""
    wanted = {site.name: FORMATS[site.kind]["cuda"][precision] for site in sites if site.reason is None}
    return {name: options[0] for name, options in wanted.items() if options}


def test_items_that_are_scored_and_looked_up_are_two_sites() -> None:
    _, graph = captured(Retriever(), retriever_inputs)
    sites = {site.name: site for site in find_sites(graph)}
    assert [site.kind for site in sites.values()] == ["layer", "ranking", "table"]
    assert sites["items.weight"].kind == "ranking" and sites["items.weight"].head and not sites["user.weight"].head
    found = searched(Retriever(), retriever_inputs, "int8", "max-error=0.1", "topk-overlap@5=0.8")
    assert [d.format for d in found.decisions] == ["int8"] * 3
    assert 0.8 <= found.quality["topk-overlap@5"] < 1.0


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_trials_of_items_answer_as_the_packed_graph_does(form: str) -> None:
    source, graph = captured(Retriever(), retriever_inputs)
    sites = find_sites(graph)
    packed = pack_linears(graph, cpp.target_isa(), {"items.weight": form})
    for batch in (1, 37):
        inputs = source.inputs(batch)
        values, found = Trial(graph, sites, {"items.weight": form}).answers(inputs)
        ours, items = packed(*inputs)
        assert torch.allclose(values, ours, atol=1e-5) and (found == items).double().mean() > 0.95
        assert not torch.allclose(values, graph(*inputs)[0], atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_items_are_ranked_in_blocks_as_in_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, graph = captured(Retriever(), retriever_inputs)
    sites, inputs = find_sites(graph), source.inputs(37)
    for form in ("fp32", "int8", "bf16"):
        trial = Trial(graph, sites, {"items.weight": form} if form != "fp32" else {}, device)
        monkeypatch.setattr(panels, "BLOCK", 1 << 18)
        values, found = trial.answers(inputs)
        monkeypatch.setattr(panels, "BLOCK", 3 * 24)  # of 3 items, fewer than are ranked
        ours, items = trial.answers(inputs)
        assert torch.allclose(ours, values, atol=1e-6) and (items == found).double().mean() > 0.95


def test_a_gpu_ranks_items_in_half_precision() -> None:
    source, graph = captured(Retriever(), retriever_inputs)
    sites = find_sites(graph)
    narrow = narrowed(graph, sites, smallest(sites, "int8"))
    (call,) = [n for n in narrow.graph.nodes if "score_topk" in str(n.target)]
    assert call.args[0].meta["val"].dtype is torch.float16
    values, items = narrow(*source.inputs(9))
    assert values.dtype is torch.float32 and items.dtype is torch.int64
    torch.testing.assert_close(values, graph(*source.inputs(9))[0], atol=0.05, rtol=0)


# How far results may be from a trial: products of halves are rounded in another order.
ROUNDED = {"fp16": 0.005, "bf16": 0.04, "int8": 0.01, "int4": 0.01, "fp8": 0.01}


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize(("model", "inputs"), [(Bags, bag_inputs), (Steps, step_inputs), (Target, target_inputs)])
def test_the_graph_that_a_gpu_is_given_answers_as_the_trial_does(precision: str, model, inputs, tmp_path) -> None:
    source, graph = captured(model(), inputs)
    sites = find_sites(graph)
    formats = smallest(sites, precision)
    tabled = with_tables(graph, sites, tables_of_bytes(sites, formats), tmp_path)
    narrow = narrowed(tabled, sites, formats)
    verify(narrow)
    for batch in (3, 20):
        given = source.inputs(batch)
        trial = Trial(graph, sites, formats, "cuda").answers(given)
        assert torch.allclose(trial[0], narrow(*given)[0], atol=ROUNDED[precision])
        assert not torch.equal(narrow(*given)[0], graph(*given)[0])


class Large(nn.Module):
    """A layer and a sum of rows that float16 has no numbers for; what is answered is small."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.bag, self.head = nn.Linear(64, 64), nn.EmbeddingBag(50, 16, mode="sum"), nn.Linear(80, 1)
        with torch.no_grad():
            self.large.weight.mul_(60000)
            self.bag.weight.mul_(10000)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([torch.log1p(torch.relu(self.large(x))), torch.log1p(self.bag(ids).abs())], 1)
        return self.head(x).squeeze(1)


def large_inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 64, generator=make), torch.randint(50, (batch, 40), generator=make)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_what_overflows_in_half_precision_stays_in_float32_on_a_gpu(precision: str, tmp_path) -> None:
    source, graph = captured(Large(), large_inputs)
    data, limits = calibration_of(source, None), budget(["max-error=0.2"])
    search = Search(graph, find_sites(graph), data, limits, precision, lambda text: None, "cuda")
    found = search.run()
    formats = {d.name: d.format for d in found.decisions}
    wide = {"large.weight": "fp32", "bag.weight": "fp32"} if precision != "bf16" else dict.fromkeys(formats, "bf16")
    assert formats["head.weight"] != "fp32" and wide.items() <= formats.items()
    assert all("max-error inf" in (d.reason or "") for d in found.decisions if d.format == "fp32")
    built = graphs_of(found, search.sites, graph, "cuda", tmp_path)
    for narrow in [graph for graphs, _ in built for graph in graphs.values()]:
        assert torch.isfinite(narrow(*source.inputs(30))[0]).all()


def test_a_full_disk_is_an_error_before_a_table_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing through a map to a full disk ends the process by a signal."""

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("grc.graph.rewrite.SMALL", 1000)
    _, graph = captured(Ranker(), ranker_inputs)
    sites = find_sites(graph)
    with pytest.raises(OSError, match="No space left"):
        with_tables(graph, sites, smallest(sites, "int8"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "dtypes"), [("fp16", {torch.float16}), ("bf16", {torch.bfloat16})])
def test_halves_are_stored_as_such(precision: str, dtypes: set[torch.dtype]) -> None:
    _, graph = captured(Steps(), step_inputs)
    sites = find_sites(graph)
    assert [site.kind for site in sites] == ["layer", "attention", "layer"]
    narrow = narrowed(graph, sites, smallest(sites, precision))
    assert {n.meta["val"].dtype for n in narrow.graph.nodes if n.op == "get_attr"} == dtypes
    (attention,) = [n for n in narrow.graph.nodes if "attention" in str(n.target)]
    assert {attention.meta["val"].dtype} == dtypes


@pytest.mark.parametrize(("precision", "dtype"), [("int8", torch.float16), ("bf16", torch.bfloat16)])
def test_an_activation_unit_is_halved_on_a_gpu_and_not_on_a_cpu(precision: str, dtype: torch.dtype) -> None:
    _, graph = captured(Target(), target_inputs)
    sites = find_sites(graph)
    assert [site.kind for site in sites] == ["layer", "activation unit"]
    (call,) = [
        n for n in narrowed(graph, sites, smallest(sites, precision)).graph.nodes if "activation_unit" in str(n.target)
    ]
    assert {n.meta["val"].dtype for n in call.args if hasattr(n, "meta")} == {dtype}
    decided = {d.kind: d for d in searched(Target(), target_inputs, precision, "max-error=1").decisions}
    assert decided["activation unit"].reason == f"{precision} has no format for activation units on a CPU"


def test_layers_of_8_bits_have_a_second_form_in_halves() -> None:
    _, graph = captured(Ranker(), ranker_inputs)
    sites = find_sites(graph)
    assert halved_layers(sites, {"deep.weight": "int8", "head.weight": "fp8", "users.weight": "int8"}) == {
        "deep.weight": "fp16", "head.weight": "fp16", "users.weight": "int8"
    }  # fmt: skip


def test_calibration_names_an_id_that_its_table_lacks() -> None:
    source, graph = captured(Ranker(), ranker_inputs)
    batch = source.inputs(5)
    batch[1][2, 0] = 300
    with pytest.raises(Exception, match="id 300 of feature 0"):
        Trial(graph, find_sites(graph), {"users.weight": "int8"}).answers(batch)


def test_a_trial_of_a_look_up_that_reads_no_row(tmp_path) -> None:
    source, graph = captured(Bags(), bag_inputs)
    sites = find_sites(graph)
    values, offsets, ids = source.inputs(5)
    given = [torch.full_like(values, 3), offsets, ids]  # padding
    formats = {"bag.weight": "int8"}
    (trial,) = Trial(graph, sites, formats).answers(given)
    assert torch.equal(trial, with_tables(graph, sites, formats, tmp_path)(*given)[0])
