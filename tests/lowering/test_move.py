"""Moving a captured graph to another device: nothing stays behind. The meta device stands in for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grc.errors import LoweringError
from grc.graph.capture import capture
from grc.graph.model_file import from_module
from grc.lowering.cuda import mixed_rows
from grc.lowering.move import moved
from grc.runtime.device import DeviceWeights

META = torch.device("meta")


class MadeHere(nn.Module):
    """Makes tensors without a word about devices, as most models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, ids: Tensor) -> Tensor:
        index = torch.tensor([2, 0])
        grid = torch.arange(4) + torch.full((4,), 2.0) + torch.zeros(4, device="cpu")
        rows = self.table(ids) * self.scale + grid.to("cpu")
        return torch.cat([rows, rows[:, index], torch.ones(ids.shape[0], 1)], 1)


class Normalised(nn.Module):
    """Its rows read each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def ids(batch: int) -> tuple[Tensor]:
    return (torch.arange(batch) % 10,)


def ramp(batch: int) -> tuple[Tensor]:
    return (torch.arange(2.0 * batch).view(batch, 2),)


def test_every_constant_and_every_factory_moves() -> None:
    source = capture(from_module(MadeHere().eval(), ids))
    weights = DeviceWeights(META)
    graph, originals = moved(source.graph, META, weights.on_device)
    (answer,) = graph(torch.zeros(5, dtype=torch.int64, device=META))
    assert answer.device == META and answer.shape == (5, 7)
    assert {path for path, _ in graph.named_parameters()} == {"table.weight"}
    assert originals["table.weight"].device.type == "cpu"


def test_the_graph_that_was_captured_stays_as_it_was() -> None:
    source = capture(from_module(MadeHere().eval(), ids))
    before = str(source.graph.code)
    moved(source.graph, META, DeviceWeights(META).on_device)
    assert str(source.graph.code) == before
    assert source.graph(*ids(3))[0].device.type == "cpu"


def test_refuses_control_flow() -> None:
    class Either(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    graph = torch.export.export(Either().eval(), ramp(3)).module()
    with pytest.raises(LoweringError, match="a graph of its own"):
        moved(graph, META, DeviceWeights(META).on_device)


def test_rows_that_read_each_other_are_seen() -> None:
    mixed = capture(from_module(Normalised().eval(), ramp))
    assert mixed_rows(mixed, mixed.graph) == "the answer of a row depends on the other rows"
    alone = capture(from_module(MadeHere().eval(), ids))
    assert mixed_rows(alone, alone.graph) is None
    assert alone.described()[0] == [{"name": "ids", "dtype": "int64", "sizes": ["batch"]}]
