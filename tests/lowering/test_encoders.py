"""Transformer layers over a few steps: which become one call, and what it answers where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import grc
from grc.compiler import optimise
from grc.errors import InputError
from grc.graph.capture import capture
from grc.graph.match import aten, is_op
from grc.graph.model_file import from_module
from grc.lowering.encoders import called, takes_encoders, with_encoders
from grc.lowering.epilogue import with_small_linears
from grc.lowering.twins import with_twins
from grc.options import Options
from grc.progress import Silent
from tests.lowering.on_gpu import check, check_beside_others

STEPS = 5


class Model(nn.Module):
    """Two pre-norm layers of torch's own between two others."""

    def __init__(self, layers: int = 2, norm_first: bool = True, width: int = 256):
        super().__init__()
        one = nn.TransformerEncoderLayer(width, 4, 512, activation="gelu", batch_first=True, norm_first=norm_first)
        self.first, self.last = nn.Linear(24, width), nn.Linear(width, 40)
        self.encoder = nn.TransformerEncoder(one, layers, enable_nested_tensor=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x)).mean(1))


class Separate(nn.Module):
    """Layers whose queries, keys and values are layers of their own, and what lies between two of them is an output too."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(6))
        self.up, self.down = (nn.ModuleList(nn.Linear(a, b) for _ in range(3)) for a, b in ((width, 512), (512, width)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = x
        for i, (query, key, value, out) in enumerate(self.layers):  # type: ignore[misc]
            rows = self.norms[2 * i](x)
            q, k, v = (part(rows).unflatten(-1, (4, -1)).transpose(1, 2) for part in (query, key, value))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(-2))
            x = x + self.down[i](torch.relu(self.up[i](self.norms[2 * i + 1](x))))
            between = x if i == 1 else between
        return x, between


def lowered(module: nn.Module, *shape: int) -> fx.GraphModule:
    source = capture(from_module(module.eval().half(), lambda batch: (torch.randn(batch, *shape).half(),)))
    found = optimise(source, Options(), Silent()).graph
    small = with_small_linears(with_twins(found, torch.device("cpu"), False)[0])
    return with_encoders(small)[0] if takes_encoders(found) else small


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if called(node, "encoder")]


def test_layers_in_a_row_are_one_call() -> None:
    graph = lowered(Model(), STEPS, 24)
    (call,) = calls(graph)
    assert call.args[3] == 2 and call.meta["val"].shape[1:] == (STEPS, 256)
    assert sum(called(node, "small_linear") for node in graph.graph.nodes) == 2  # before and after


def test_layers_whose_result_is_read_elsewhere_end_a_call() -> None:
    graph = lowered(Separate(), STEPS, 256)
    assert [call.args[3] for call in calls(graph)] == [2, 1]
    assert not any(called(node, "small_linear") for node in graph.graph.nodes)


def test_post_norm_layers_are_a_call_too_but_for_the_last_norm() -> None:
    graph = lowered(Model(norm_first=False, layers=3), STEPS, 24)
    (call,) = calls(graph)
    assert call.args[3] == 3 and [is_op(user, aten.layer_norm) for user in call.users] == [True]
    assert sum(is_op(node, aten.layer_norm) for node in graph.graph.nodes) == 1


def test_other_layers_stay() -> None:
    assert not calls(lowered(Model(width=128), STEPS, 24))


class Deep(nn.Module):
    """Layers whose rows have a mean far from zero, and large numbers, as the residual of a trained model may."""

    def __init__(self, width: int, hidden: int, heads: int, activation: str, pre: bool):
        super().__init__()
        one = nn.TransformerEncoderLayer(width, heads, hidden, activation=activation, batch_first=True, norm_first=pre)
        self.encoder = nn.TransformerEncoder(one, 3, enable_nested_tensor=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x * 4 + 10)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pre", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize(
    "steps, width, hidden, heads, activation",
    [(10, 512, 2048, 8, "gelu"), (16, 256, 512, 8, "relu"), (2, 256, 2048, 2, "gelu"), (3, 512, 4096, 16, "relu")],
)
@torch.no_grad()
def test_answers_on_a_gpu(
    steps: int, width: int, hidden: int, heads: int, activation: str, pre: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Deep(width, hidden, heads, activation, pre).eval().to(dtype)

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(batch)).to(dtype),)

    program = check(model, inputs, "inductor-encoder", (1, 4, 16), (1, 3, 13, 16), tmp_path / "m.grc")
    (x,) = inputs(3)
    x[1, 0, 0] = torch.nan
    with pytest.raises(InputError, match="nan"):
        program(x)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_gpu_that_others_share_gives_the_same_answers(tmp_path: Path) -> None:
    """Weights that the copy engine wrote over what a stopped block was still loading: see `arrive_after`."""
    torch.manual_seed(0)
    model = Deep(256, 512, 8, "relu", True).eval().half()
    requests = [(torch.randn(3, 16, 256, generator=torch.Generator().manual_seed(seed)).half(),) for seed in range(8)]
    options = Options(tmp_path / "m.grc", "cuda", "inductor-encoder", buckets=(4,), max_batch=4, streams=2)
    grc.compile(model, lambda batch: (torch.randn(batch, 16, 256).half(),), options)
    check_beside_others(grc.load(options.output), requests, 20)
