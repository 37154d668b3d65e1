"""Linear layers aligned for the GPU: what becomes wider, what stays, and that no answer changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")
from grc.compiler import optimise
from grc.graph.capture import capture
from grc.graph.match import aten, is_op
from grc.graph.model_file import from_module
from grc.lowering.align import aligned
from grc.lowering.epilogue import with_heads_as_sums, with_relu_in_products, with_small_linears
from grc.lowering.in_place import with_parts_in_place
from grc.lowering.twins import with_twins
from grc.options import Options
from grc.progress import Silent


class Two(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.first, self.second = nn.Linear(width, 24, dtype=dtype), nn.Linear(24, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def graph_of(model: nn.Module, inputs: object) -> torch.fx.GraphModule:
    return capture(from_module(model.eval(), inputs)).graph


@torch.no_grad()
@pytest.mark.parametrize(
    ("width", "dtype", "wide"),
    [(77, torch.half, 80), (80, torch.half, 80), (77, torch.float, 77), (13, torch.half, 13)],
)
def test_odd_layers_in_half_precision_become_whole_vectors(width: int, dtype: torch.dtype, wide: int) -> None:
    torch.manual_seed(0)
    graph = graph_of(Two(width, dtype), lambda batch: (torch.randn(batch, width).to(dtype),))
    found = aligned(graph)
    weights = [
        dict(found.named_parameters())[str(n.args[1].target)] for n in found.graph.nodes if is_op(n, aten.linear)
    ]
    assert [tuple(w.shape) for w in weights] == [(24, wide), (3, 24)]
    x = torch.randn(5, width).to(dtype)
    torch.testing.assert_close(found(x), graph(x), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_an_input_that_is_padded_goes_through_what_follows() -> None:
    torch.manual_seed(0)
    graph = graph_of(Two(77, torch.half), lambda batch: (torch.randn(batch, 77).half(),))
    summed = with_heads_as_sums(with_parts_in_place(aligned(graph)))
    x = torch.randn(5, 77).half()
    torch.testing.assert_close(with_relu_in_products(summed)(x), graph(x), rtol=2e-3, atol=2e-3)
    (layer,) = [node for node in with_small_linears(summed).graph.nodes if "small_linear" in str(node.target)]
    assert layer.args[0].meta["val"].shape[1] == 80


class Dots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 16) for n in (20, 30, 40))
        self.top = nn.Linear(16 + 6, 3)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        rows = torch.stack([dense, *[table(ids[:, i]) for i, table in enumerate(self.tables)]], 1)
        pairs = torch.bmm(rows, rows.transpose(1, 2))
        i, j = torch.tensor([1, 2, 2, 3, 3, 3]), torch.tensor([0, 0, 1, 0, 1, 2])
        return self.top(torch.cat([dense, pairs[:, i, j]], 1))


def test_our_own_kernel_writes_rows_that_wide() -> None:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 16), torch.stack([torch.arange(batch) % n for n in (20, 30, 40)], 1)

    source = capture(from_module(Dots().eval(), inputs))
    graph = optimise(source, Options(), Silent()).graph
    found = aligned(with_twins(graph, torch.device("cpu"), count=False)[0])
    dots = [n for n in found.graph.nodes if getattr(n.target, "namespace", "") == "grc_cuda"]
    assert [n.target._opname for n in dots] == ["bag_dot"] and dots[0].args[-1] == 24
    layer = next(n for n in found.graph.nodes if is_op(n, aten.linear))
    assert dict(found.named_parameters())[str(layer.args[1].target)].shape == (3, 24)
    assert not [n for n in found.graph.nodes if is_op(n, aten.constant_pad_nd)]
