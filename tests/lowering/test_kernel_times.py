"""Times of fused ops on a GPU: which tile is kept at each batch, and what is counted. A timer of numbers stands in for one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from grc.compiler import optimise
from grc.graph.capture import capture
from grc.graph.match import call_arguments
from grc.graph.model_file import from_module
from grc.lowering.kernel_times import COPIED, KernelTimes, arguments
from grc.options import Options
from grc.progress import Silent

CPU = torch.device("cpu")
ROWS, DIM, LENGTH = (20, 30, 40), 8, 3


class Bags(nn.Module):
    """Bags of three ids, of which each request has two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in ROWS)

    def forward(self, ids: Tensor) -> Tensor:
        lists = ids.view(-1, len(ROWS), LENGTH)
        return torch.cat([table(lists[:, i]) for i, table in enumerate(self.tables)], 1)


class Tile(NamedTuple):
    rows: int
    warps: int


FEW, SOME, MANY = Tile(1, 1), Tile(2, 1), Tile(4, 2)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    size = 2 * len(ROWS) * LENGTH
    source = capture(from_module(Bags().eval(), lambda batch: (torch.zeros(batch, size, dtype=torch.int64),)))
    return optimise(source, Options(), Silent()).graph


@pytest.fixture
def node(graph: fx.GraphModule) -> fx.Node:
    return next(n for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "grc")


def kernel(**given: Any) -> Tensor:
    return torch.zeros(given["ids"].shape[0], sum(given["dims"]))


MODULE = SimpleNamespace(register=lambda: kernel, tiles_of=lambda given: (FEW, SOME, MANY))


def times(seconds: dict[tuple[int, Tile], float], asked: list[int] | None = None) -> KernelTimes:
    def timer(calls: Sequence[partial[Any]]) -> float:
        if asked is not None:
            asked.append(len(calls))
        if "ids" not in calls[0].keywords:
            return 1.0  # a copy
        return seconds[calls[0].keywords["ids"].shape[0], Tile(*calls[0].keywords["tiles"][1:])]

    return KernelTimes(CPU, timer)


def test_each_batch_has_the_tile_that_is_fastest_there_but_for_ties(graph: fx.GraphModule, node: fx.Node) -> None:
    seconds = {
        (2, FEW): 1e-6, (2, SOME): 2e-6, (2, MANY): 3e-6,
        (16, FEW): 1.01e-6, (16, SOME): 2e-6, (16, MANY): 1e-6,
        (128, FEW): 9e-6, (128, SOME): 9e-6, (128, MANY): 8.9e-6,
        (256, FEW): 7e-6, (256, SOME): 5e-6, (256, MANY): 5.1e-6,
    }  # fmt: skip
    found = times(seconds)
    tiles = found.tiles(graph, node, MODULE, (128, 1, 64, 8))
    # At 256 and 128 bags SOME is as fast as any, at 16 another is faster.
    assert tiles == [2, *FEW, 16, *MANY, 256, *SOME]
    rows = found.entry()["fused"]
    wanted = [(1, FEW), (8, MANY), (64, SOME), (128, SOME)]
    assert [(row["batch"], Tile(*row["tile"])) for row in rows] == wanted
    assert [row["us"] for row in rows] == [1.0, 1.0, 9.0, 5.0]


def test_bytes_are_counted_once_and_held_against_a_copy(graph: fx.GraphModule, node: fx.Node) -> None:
    found = times({(4, tile): 1e-6 for tile in (FEW, SOME, MANY)})
    found.tiles(graph, node, MODULE, (2,))
    (row,) = found.entry()["fused"]
    ids, rows, answer = 4 * 9 * 8, 4 * 9 * DIM * 4, 4 * 3 * DIM * 4
    assert row["bytes"] == ids + rows + answer
    assert found.copies == 2 * COPIED and row["of_copy"] == round(row["bytes"] / 1e-6 / found.copies, 3)
    assert (row["op"], row["dtype"]) == ("lookup", "float32")


def test_calls_of_one_kind_are_timed_once_at_each_batch(graph: fx.GraphModule, node: fx.Node) -> None:
    asked: list[int] = []
    found = times({(2 * batch, tile): 1e-6 for tile in (FEW, SOME, MANY) for batch in (1, 8)}, asked)
    assert found.tiles(graph, node, MODULE, (1,)) == [2, *FEW]
    assert found.tiles(graph, node, MODULE, (1, 8)) == [16, *FEW]
    assert len(asked) == 2 * 3 + 1, "each tile at each batch, and the copy"
    assert [row["batch"] for row in found.entry()["fused"]] == [1, 8]


class OutOfResources(RuntimeError):
    """What Triton raises under this name."""


@pytest.mark.parametrize("spoilt", [(MANY,), (FEW, SOME, MANY)])
def test_a_tile_that_does_not_fit_is_left_out(graph: fx.GraphModule, node: fx.Node, spoilt: tuple[Tile, ...]) -> None:
    def timer(calls: Sequence[partial[Any]]) -> float:
        if Tile(*calls[0].keywords.get("tiles", [0, 0, 0])[1:]) in spoilt:
            raise OutOfResources("shared memory")
        return 1e-6

    found = KernelTimes(CPU, timer)
    wanted = None if len(spoilt) == 3 else [2, *FEW]
    assert found.tiles(graph, node, MODULE, (1,)) == wanted
    assert len(found.entry()["fused"]) == (0 if wanted is None else 1)


@pytest.mark.parametrize("captured", [False, True])
def test_where_there_is_no_memory_nothing_is_timed(graph: fx.GraphModule, node: fx.Node, captured: bool) -> None:
    def timer(calls: Sequence[partial[Any]]) -> float:
        try:
            raise torch.OutOfMemoryError("no memory")
        finally:
            if captured:
                raise RuntimeError("operation failed due to a previous error during capture")

    found = KernelTimes(CPU, timer)
    assert found.tiles(graph, node, MODULE, (1, 8)) is None
    assert found.entry() == {"copy_gbps": None, "fused": []}


def test_a_look_up_is_timed_as_it_is_packaged(graph: fx.GraphModule, node: fx.Node) -> None:
    seen: list[dict[str, Any]] = []

    def op(**given: Any) -> Tensor:
        seen.append(given)
        return kernel(**given)

    op._schema = SimpleNamespace(arguments=[SimpleNamespace(name="told")])  # type: ignore[attr-defined]
    found = KernelTimes(CPU, lambda calls: (calls[0](), 1.0)[1])
    found.tiles(graph, node, SimpleNamespace(register=lambda: op, tiles_of=lambda given: (FEW,)), (1,))
    assert all(not given["told"].any() and len(given["told"]) == 16 for given in seen if "ids" in given)


def test_an_op_without_tiles_is_timed_too(graph: fx.GraphModule, node: fx.Node) -> None:
    found = KernelTimes(CPU, lambda calls: 2e-6)
    module = SimpleNamespace(register=lambda: kernel)
    assert found.tiles(graph, node, module, (1, 8)) is None
    assert [(row["batch"], row["us"], row["tile"]) for row in found.entry()["fused"]] == [(1, 2.0, []), (8, 2.0, [])]


def test_ids_have_rows(graph: fx.GraphModule, node: fx.Node) -> None:
    ids = arguments(graph, call_arguments(node), 50, CPU)["ids"]
    assert ids.shape == (100, 9) and ids.dtype is torch.int64
    largest = ids.view(100, 3, 3).amax((0, 2))
    assert (ids >= 0).all() and (largest < torch.tensor(ROWS)).all() and (largest > torch.tensor(ROWS) // 2).all()
