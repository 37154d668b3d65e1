"""What follows a linear layer, given to its kernel: what becomes one call, what stays, and that no answer changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from grc.compiler import optimise
from grc.graph.capture import Source, capture
from grc.graph.match import aten, is_op
from grc.graph.model_file import from_module
from grc.kernels.packed_linear.activations import GELU_TANH, NONE, RELU
from grc.lowering import epilogue
from grc.lowering.engine import Lowerable
from grc.lowering.export import export_graph
from grc.lowering.twins import with_twins
from grc.options import Options
from grc.progress import Silent


class Layers(nn.Module):
    """One layer with ReLU, one whose product is read twice, one without bias, one with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice, self.bare, self.other = (nn.Linear(8, 8, bias=i != 2) for i in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(x))
        y = self.twice(x)
        x = torch.relu(y) + y
        x = x + nn.functional.gelu(self.bare(x), approximate="tanh")
        return torch.sigmoid(self.head(x + self.other(x)))


class CrossNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.cross = nn.Embedding(30, 12), nn.Linear(12, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x0 = self.table(ids)
        return x0 * self.cross(x0) + x0


def count(graph: fx.GraphModule, *ops: object) -> list[int]:
    return [sum(is_op(node, op) for node in graph.graph.nodes) for op in ops]


def same_answers(found: fx.GraphModule, source: Source) -> None:
    program = export_graph(Lowerable(found, source.inputs(7), source.shapes())).module()
    for batch in (1, 3, 7):
        (x,) = source.inputs(batch)
        torch.testing.assert_close(program(x)[0], source.graph(x)[0])


@pytest.fixture(params=[(), (5,)], ids=str)
def layers(request: pytest.FixtureRequest) -> Source:
    steps = request.param
    return capture(from_module(Layers().eval(), lambda batch: (torch.randn(batch, *steps, 8),)))


@torch.no_grad()
def test_relu_joins_the_product_that_it_alone_reads(layers: Source) -> None:
    found = epilogue.with_relu_in_products(layers.graph)
    assert count(found, aten._addmm_activation, aten.linear, aten.relu) == [1, 4, 1]
    same_answers(found, layers)


@torch.no_grad()
def test_narrow_heads_become_sums(layers: Source) -> None:
    found = epilogue.with_heads_as_sums(layers.graph)
    assert count(found, aten.linear, aten.sum) == [4, 1]
    same_answers(found, layers)


class Pooled(nn.Module):
    """Steps weighted and summed, and a product of whole matrices."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x.sum(-1), -1)
        return torch.matmul(weights.unsqueeze(1), x).squeeze(1) + torch.bmm(x, x.transpose(1, 2)).sum(1).mean(-1, True)


@torch.no_grad()
def test_weighted_sums_of_steps_are_no_matrix_products() -> None:
    source = capture(from_module(Pooled().eval(), lambda batch: (torch.randn(batch, 6, 5),)))
    found = epilogue.with_rows_as_sums(source.graph)
    before, after = (count(graph, aten.bmm, aten.matmul) for graph in (source.graph, found))
    assert sum(before) == 2 and sum(after) == 1
    same_answers(found, source)


@pytest.fixture
def as_reference(monkeypatch: pytest.MonkeyPatch) -> Callable[[fx.GraphModule], list[fx.Node]]:
    """Where no GPU is, the kernels' calls are answered by their references."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from grc.kernels.attention import reference as attention
    from grc.kernels.attention import triton as attention_op
    from grc.kernels.small_linear import attention_linear, attention_reference, reference, triton

    references = {
        triton.register(): reference,
        attention_linear.register(): attention_reference,
        attention_op.register(): attention,
    }

    def replace(graph: fx.GraphModule) -> list[fx.Node]:
        found = [node for node in graph.graph.nodes if node.target in references]
        for node in found:
            node.target = references[node.target]
        graph.recompile()
        return found

    return replace


@torch.no_grad()
def test_every_layer_but_a_narrow_head_goes_to_the_kernel_for_few_rows(
    layers: Source, as_reference: Callable[[fx.GraphModule], list[fx.Node]]
) -> None:
    assert epilogue.takes_small_linears(layers.graph)
    found = epilogue.with_small_linears(layers.graph)
    calls = as_reference(found)
    assert count(found, aten.linear, aten.gelu, aten.relu, aten.add) == [1, 0, 1, 2]
    assert [node.args[5] for node in calls] == [RELU, NONE, GELU_TANH, NONE]
    (x,) = layers.inputs(3)
    torch.testing.assert_close(found(x)[0], layers.graph(x)[0])


class Normed(nn.Module):
    """A norm that only layers read, and one that a sum reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(24), nn.LayerNorm(24, bias=False)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.layers[0](y) * functional.gelu(self.layers[1](y))
        y = self.second(x)
        return y + self.layers[2](y)


@torch.no_grad()
def test_a_norm_that_only_layers_read_goes_with_them(
    as_reference: Callable[[fx.GraphModule], list[fx.Node]],
) -> None:
    source = capture(from_module(Normed().eval(), lambda batch: (torch.randn(batch, 5, 24),)))
    found = epilogue.with_small_linears(source.graph)
    calls = as_reference(found)
    assert count(found, aten.layer_norm, aten.linear) == [1, 0]
    assert [len(call.args) for call in calls] == [9, 9, 6]
    torch.testing.assert_close(found(*source.inputs(3))[0], source.graph(*source.inputs(3))[0])


@torch.no_grad()
@pytest.mark.parametrize("steps", [6, 20])
def test_an_attention_over_a_few_steps_goes_with_its_layer(
    steps: int, as_reference: Callable[[fx.GraphModule], list[fx.Node]]
) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True).half().eval()
    source = capture(from_module(model, lambda batch: (torch.randn(batch, steps, 32).half(),)))
    graph = with_twins(optimise(source, Options(), Silent()).graph, torch.device("cpu"), True)[0]
    found = epilogue.with_small_linears(graph)
    calls = as_reference(found)
    together = ["attention_reference"] if steps == 6 else ["reference", "reference"]
    assert [call.target.__name__ for call in calls] == ["reference", *together, "reference", "reference"]
    assert count(found, aten.linear, aten.layer_norm, aten.add, aten.gelu) == [0, 0, 0, 0]
    inputs = source.inputs(3)
    torch.testing.assert_close(found(*inputs)[0], source.graph(*inputs)[0], rtol=4e-3, atol=4e-3)


@torch.no_grad()
def test_a_cross_layer_goes_to_the_kernel_for_few_rows(
    as_reference: Callable[[fx.GraphModule], list[fx.Node]],
) -> None:
    source = capture(from_module(CrossNet().eval(), lambda batch: (torch.arange(batch) % 30,)))
    graph = optimise(source, Options(), Silent()).graph
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"][-1].startswith("grc.cross")
    found = epilogue.with_small_linears(graph)
    (call,) = as_reference(found)
    assert call.args[3] is not None and call.args[4] is not None
    torch.testing.assert_close(found(*source.inputs(5))[0], source.graph(*source.inputs(5))[0])


def test_a_graph_without_layers_has_nothing_for_it() -> None:
    source = capture(from_module(nn.Embedding(9, 8).eval(), lambda batch: (torch.arange(batch) % 9,)))
    assert not epilogue.takes_small_linears(source.graph)
