"""Which layers become towers, and what a tower answers in an artifact on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from grc.compiler import optimise
from grc.errors import LoweringError
from grc.graph.capture import capture
from grc.graph.match import attribute
from grc.graph.model_file import from_module
from grc.kernels import tower
from grc.kernels.packed_linear.activations import NONE, PRELU, RELU, SIGMOID
from grc.kernels.tower import Form
from grc.lowering.towers import takes_towers, with_towers
from grc.lowering.twins import with_twins
from grc.options import Options
from grc.progress import Silent
from tests.lowering.on_gpu import check

pytest.importorskip("triton", reason="Triton is not installed")


class Ranker(nn.Module):
    """Cross layers, a tower of dense ones, and a head whose answer is added to another term."""

    def __init__(
        self, width: int = 200, deep: tuple[int, ...] = (160, 96), activation: Callable[[], nn.Module] = nn.ReLU
    ):
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        layers: list[nn.Module] = []
        for before, after in zip((width, *deep), deep, strict=False):
            layers += [nn.Linear(before, after), activation()]
        self.deep = nn.Sequential(*layers, nn.Linear(deep[-1], 1))
        self.term, self.bias = nn.Linear(width, 1), nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for cross in self.crosses:
            y = x * cross(y) + y
        return torch.sigmoid(self.deep(y) + (self.bias + self.term(x).tanh())).squeeze(1)


def inputs_of(width: int, dtype: torch.dtype = torch.float16) -> Callable[[int], tuple[Tensor]]:
    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, width, generator=torch.Generator().manual_seed(batch)).to(dtype),)

    return inputs


@torch.no_grad()
def lowered(model: nn.Module, width: int) -> tuple[fx.GraphModule, list[Form]]:
    source = capture(from_module(model.eval().half(), inputs_of(width)))
    found = optimise(source, Options(), Silent()).graph
    return with_towers(with_twins(found, torch.device("cpu"), False, ("cross",))[0])


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is tower.register()]


def test_cross_layers_dense_layers_and_a_head_are_one_tower() -> None:
    model = Ranker()
    graph, (form,) = lowered(model, 200)
    (call,) = calls(graph)
    assert [(dense.cross, dense.activation) for dense in form.layers] == [
        (True, NONE), (True, NONE), (False, RELU), (False, RELU), (False, NONE),
    ]  # fmt: skip
    assert form.final == SIGMOID and call.args[1].target is torch.ops.aten.tanh.default
    assert call.args[4:] == (1, 0)
    vectors = attribute(graph, call.args[3])  # the constant of the sum is in the last bias
    assert vectors is not None and vectors[0, -16] == model.deep[-1].bias + model.bias


def test_slopes_go_with_their_layer() -> None:
    _, (form,) = lowered(Ranker(activation=nn.PReLU), 200)
    assert [dense.activation for dense in form.layers[2:]] == [PRELU, PRELU, NONE]


def test_a_layer_that_several_read_ends_a_tower() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.trunk(x)
            return [head(x) for head in self.heads]

    _, (form,) = lowered(Shared(), 64)  # the first layers of both heads are one, and its columns are read apart
    assert [(dense.depth, dense.columns) for dense in form.layers] == [(64, 128), (128, 64), (64, 64)]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), id="one layer"),
        pytest.param(nn.Sequential(nn.Linear(64, 8192), nn.ReLU(), nn.Linear(8192, 64)), id="too wide"),
        pytest.param(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)), id="a norm between"),
    ],
)
def test_what_is_no_tower(model: nn.Module) -> None:
    with pytest.raises(LoweringError, match="no dense layers that the kernel takes"):
        lowered(model, 64)


def test_float32_is_left_to_others() -> None:
    source = capture(from_module(Ranker().eval(), inputs_of(200, torch.float32)))
    assert not takes_towers(optimise(source, Options(), Silent()).graph)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "width, deep, activation",
    [(624, (1024, 512, 256), nn.ReLU), (39, (400, 400), nn.PReLU), (128, (96, 33), nn.GELU), (1000, (8,), nn.SiLU)],
)
@torch.no_grad()
def test_answers_on_a_gpu(
    width: int, deep: tuple[int, ...], activation: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Ranker(width, deep, activation).eval().to(dtype)
    check(model, inputs_of(width, dtype), "inductor-tower", (1, 16, 300), (1, 3, 17, 300), tmp_path / "m.grc")
