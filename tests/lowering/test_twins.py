"""Fused look-ups given to their Triton twins: the calls, their lists, and the count of ids outside of their tables."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("triton", reason="Triton is not installed")
from grc.compiler import optimise
from grc.graph.capture import capture
from grc.graph.match import call_arguments
from grc.graph.model_file import from_module
from grc.kernels import OPS
from grc.lowering.check_ids import with_checked_ids
from grc.lowering.engine import Lowerable
from grc.lowering.export import export_graph
from grc.lowering.kernel_times import KernelTimes
from grc.lowering.twins import optional_twins, with_twins
from grc.options import Options
from grc.progress import Silent
from grc.runtime.engines import COUNTER

CPU = torch.device("cpu")


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (20, 30, 40))
        self.top = nn.Linear(24, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))


def inputs(batch: int) -> tuple[Tensor]:
    return (torch.stack([torch.arange(batch) % n for n in (20, 30, 40)], 1),)


@pytest.fixture(scope="module")
def lowerable() -> Lowerable:
    source = capture(from_module(Tables().eval(), inputs))
    graph = optimise(source, Options(), Silent()).graph
    return Lowerable(graph, source.inputs(7), source.shapes())


def calls(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "grc_cuda"]


def test_a_look_up_becomes_its_twin_on_ready_made_lists(lowerable: Lowerable) -> None:
    graph, counts = with_twins(lowerable.graph, CPU, count=False)
    assert calls(graph) == ["grc_cuda.lookup.default"] and not counts
    tables = next(t for name, t in graph.named_buffers() if name.endswith("_tables"))
    assert tables.tolist()[:6] == [0, 20 * 8, 50 * 8, 20, 30, 40]
    assert calls(lowerable.graph) == [], "the graph that was given stays as it was"


def test_where_to_count_is_a_constant_and_survives_the_export(lowerable: Lowerable) -> None:
    graph, counts = with_twins(lowerable.graph, CPU, count=True)
    program = export_graph(Lowerable(graph, lowerable.inputs, lowerable.shapes), OPS)
    assert counts and len(program.graph_signature.user_outputs) == 1
    assert COUNTER in program.graph_signature.buffers
    assert [n for n in program.graph.nodes if n.target is torch.ops.grc_cuda.lookup.default]
    assert not program.constants, "a constant made while tracing would be copied to the device in every run"


def test_timed_tiles_stand_in_the_call_where_the_kernel_takes_them(lowerable: Lowerable) -> None:
    times = KernelTimes(CPU, lambda calls: 1e-6)
    known = SimpleNamespace(tiles=lambda graph, node, module, batches: [*batches, 64, 2])
    graph, _ = with_twins(lowerable.graph, CPU, True, (), known, (8,))  # type: ignore[arg-type]
    node = next(n for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "grc_cuda")
    given = call_arguments(node)
    assert (
        given["tiles"] == [8, 64, 2] and given["told"].target == COUNTER and given["tables"].target.endswith("_tables")
    )
    assert with_twins(lowerable.graph, CPU, True, (), times, ())[1] and not times.found, (
        "without buckets nothing is timed"
    )


def test_ids_of_look_ups_that_are_not_ours_are_counted_too() -> None:
    class History(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(20, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.items(ids).softmax(1)

    source = capture(from_module(History().eval(), lambda batch: (torch.arange(3 * batch).view(batch, 3) % 20,)))
    graph = with_checked_ids(optimise(source, Options(), Silent()).graph)
    found, counts = with_twins(graph, CPU, count=True)
    call = next(n for n in found.graph.nodes if getattr(n.target, "namespace", "") == "grc_cuda")
    assert counts and str(call.target) == "grc_cuda.checked_ids.default"
    assert call.args[1] == 20 and call.args[2].target == COUNTER


class Mixed(nn.Module):
    """Two tables in float32, and two in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (20, 30))
        self.half_tables = nn.ModuleList(nn.Embedding(n, 8, dtype=torch.half) for n in (20, 30))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.cat([table(ids[:, i]) for i, table in enumerate(tables)], 1)
            for tables in (self.tables, self.half_tables)
        )


@pytest.mark.parametrize(("known", "count"), [((torch.float32,), False), ((torch.float32, torch.half), True)])
def test_ids_are_counted_where_every_look_up_has_a_kernel(
    known: tuple[torch.dtype, ...], count: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grc.kernels.rows.able", lambda arena, dims, packing: arena.dtype in known)
    source = capture(from_module(Mixed().eval(), lambda batch: (torch.arange(2 * batch).view(batch, 2) % 20,)))
    graph = optimise(source, Options(), Silent()).graph
    found, counts = with_twins(graph, CPU, count=True)
    assert calls(found) == ["grc_cuda.lookup.default"] * len(known) and counts == count


class Crossed(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.linear(x) + x


@pytest.mark.parametrize(("dtype", "names"), [(torch.half, ["cross"]), (torch.float, [])])
def test_what_inductor_could_do_too_is_optional(dtype: torch.dtype, names: list[str]) -> None:
    source = capture(from_module(Crossed(dtype).eval(), lambda batch: (torch.randn(batch, 16).to(dtype),)))
    graph = optimise(source, Options(), Silent()).graph
    assert optional_twins(graph) == names
    assert calls(with_twins(graph, CPU, count=False)[0]) == [f"grc_cuda.{name}.default" for name in names]
    assert calls(with_twins(graph, CPU, count=False, without=names)[0]) == []
