"""The oracle runs a module in double precision, whatever its functions think of mixed dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grc.graph.oracle import run_fp64

MODULES = [
    nn.Sequential(nn.Linear(6, 6), nn.PReLU()),
    nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2)),
    nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU()),
]


def test_complex_numbers_are_widened_too() -> None:
    def some_frequencies(x: torch.Tensor) -> torch.Tensor:
        whole = torch.fft.rfft(x, dim=1)
        kept = torch.zeros(whole.shape, dtype=torch.cfloat)
        kept[:, [0, 2]] = whole[:, [0, 2]]
        return torch.fft.irfft(kept, n=6, dim=1)

    x = torch.rand(3, 6)
    torch.testing.assert_close(run_fp64(some_frequencies, x), some_frequencies(x).double(), rtol=1e-5, atol=1e-6)
    assert run_fp64(some_frequencies, x).dtype is torch.float64


@pytest.mark.parametrize("module", MODULES, ids=["prelu", "conv1d", "layer norm"])
def test_a_float32_module_is_answered_in_float64(module: nn.Module) -> None:
    x = torch.rand(3, 6)
    truth = run_fp64(module, x)
    assert truth.dtype is torch.float64
    with torch.no_grad():
        expected = module.double()(x.double())
        module.float()
    torch.testing.assert_close(truth, expected, rtol=1e-12, atol=1e-12)


class Sizes(TorchDispatchMode):
    """The bytes of every tensor in double precision that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen += [t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.dtype is torch.float64]
        return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 50), (3, 2, 50)])
def test_a_large_weight_is_widened_in_blocks(
    bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Linear(50, 130, bias=bias), torch.rand(shape)
    with torch.no_grad():
        expected = layer.double()(x.double())
    layer.float()
    monkeypatch.setattr("grc.graph.oracle.BLOCK", 4 * 50 * 40)
    weight, own = layer.weight.detach(), layer.bias
    composed = [
        lambda x: torch.ops.aten.linear.default(x, weight, own),
        lambda x: torch.ops.aten.matmul.default(x, weight.t()) + (0 if own is None else own),
    ]
    for function in (layer, *composed):
        with Sizes() as sizes:
            truth = run_fp64(lambda x, function=function: function(x * 1.0), x)
        torch.testing.assert_close(truth, expected, rtol=1e-12, atol=1e-12)
        assert max(sizes.seen) <= 8 * 50 * 40
