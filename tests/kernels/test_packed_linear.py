"""The packed linear against fp64, over tiles' remainders, epilogues, views, ISAs and threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from grc.errors import LoweringError
from grc.kernels import cpp
from grc.kernels.packed_linear import ACTIVATIONS, PACKED_LINEAR, pack, unpack
from grc.kernels.packed_linear.cases import arguments
from grc.kernels.packed_linear.panels import PANEL
from tests.kernels.contract import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


def answer(args: tuple[Any, ...], isa: str) -> Tensor:
    """The kernel's answer, from memory that last held NaN."""
    torch.full((*args[0].shape[:-1], args[5]), torch.nan)  # freed at once: the allocator hands the block out again
    return cpp.call(PACKED_LINEAR, *args, isa=isa)


def check(args: tuple[Any, ...], isa: str) -> None:
    """The error against fp64 is at most twice that of torch's own float32, give or take the last bit of the terms."""
    sizes = PACKED_LINEAR.reference(*(a.abs() if isinstance(a, Tensor) else a for a in wide(args)))
    y, plain, exact = answer(args, isa), PACKED_LINEAR.reference(*args), PACKED_LINEAR.reference(*wide(args))
    assert y.shape == exact.shape and y.dtype == torch.float32 and y.is_contiguous()
    if exact.numel():
        error, allowed = (y - exact).abs().max(), 2 * (plain - exact).abs().max()
        assert error <= allowed + 2**-24 * sizes.abs().max(), (error.item(), allowed.item())


def test_every_remainder_of_a_tile(isa: str) -> None:
    for m, k, n in itertools.product((1, 2, 5, 6, 7, 13), (1, 7, 33, 300), (1, 3, 4, 5, 16, 17, 47, 64, 65, 130)):
        check(arguments(m + k + n, (m, k), n, isa=isa), isa)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1100, 300), (64, 415, 130), (9, 520, 2000), (700, 300, 90), (900, 257, 1)]
)
def test_splits_over_threads(isa: str, threads: int, m: int, k: int, n: int) -> None:
    check(arguments(1, (m, k), n, activation=1, mul=True, add=True, isa=isa), isa)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_every_epilogue(isa: str, activation: int) -> None:
    for bias, mul, add in itertools.product((False, True), repeat=3):
        for n in (3, 75):
            check(arguments(activation, (41, 40), n, activation, bias, mul, add, isa), isa)


@pytest.mark.parametrize("case", PACKED_LINEAR.cases, ids=lambda case: case.name)
def test_cases(case: Any) -> None:
    check(tuple(case.build(3)), cpp.target_isa())


def test_nothing_to_multiply(isa: str) -> None:
    assert answer(arguments(0, (0, 5), 9, isa=isa), isa).shape == (0, 9)
    assert answer(arguments(0, (2, 0, 5), 9, isa=isa), isa).shape == (2, 0, 9)
    x, weight, bias, *rest = arguments(0, (4, 0), 70, isa=isa)
    assert torch.equal(answer((x, weight, bias, *rest), isa), bias.expand(4, 70))


def test_views_are_read_where_they_are(isa: str) -> None:
    x, weight, bias, _, _, n, _ = arguments(0, (6, 33), 75, isa=isa)
    wide_x = torch.randn(6, 4, 50)
    for view in (
        x[::2],
        x[:1].expand(5, 33),
        wide_x[:, 1, 9:42],
        wide_x[:, :, 9:42],
        wide_x[:, 1:3, 9:42],
        wide_x.transpose(0, 1)[:, :, 9:42],
        torch.randn(33, 8).t(),
        torch.randn(2, 33, 3).transpose(1, 2),
    ):
        y = (*view.shape[:-1], n)
        turned = torch.randn(*y[:-2], n, y[-2]).transpose(-1, -2)
        check((view, weight, bias, torch.randn(n).expand(y), turned, n, 0), isa)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_nan_and_infinity_go_through(isa: str, activation: int) -> None:
    for n in (2, 75):
        args = arguments(0, (13, 40), n, activation, isa=isa)
        args[0][4, 7] = torch.nan
        args[0][9, 3] = torch.inf
        y, exact = answer(args, isa), PACKED_LINEAR.reference(*wide(args))
        assert y[4].isnan().all()
        assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
        assert y[[0, 3, 5, 12]].isfinite().all()


def test_refuses_what_does_not_fit(isa: str) -> None:
    x, weight, bias, _, _, n, _ = arguments(0, (6, 33), 75, isa=isa)
    for args, reason in (
        ((x.double(), weight, bias, None, None, n, 0), "x is not float32"),
        ((x, weight, bias, None, None, 200, 0), "does not fit"),
        ((x[:, :9], weight, bias, None, None, n, 0), "does not fit"),
        ((x, torch.zeros(3, 33, 24), bias, None, None, n, 0), "another ISA"),
        ((x, weight.transpose(0, 1), bias, None, None, n, 0), "not contiguous"),
        ((x, weight, bias[:9], None, None, n, 0), "bias"),
        ((x, weight, bias, x, None, n, 0), "mul does not have the shape"),
        ((x, weight, bias, None, x[:3], n, 0), "add does not have the shape"),
        ((x, weight, bias, None, None, n, 7), "activation is 0 to 6"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            cpp.call(PACKED_LINEAR, *args, isa=isa)


def test_reference_refuses_an_unknown_activation() -> None:
    with pytest.raises(LoweringError, match="no activation 7"):
        PACKED_LINEAR.reference(*arguments(0, (2, 3), 5, activation=7))


@pytest.mark.parametrize("name", PANEL)
@pytest.mark.parametrize("n", [1, 4, 5, 64, 100])
def test_unpack_undoes_pack(name: str, n: int) -> None:
    weight = torch.randn(n, 33)
    packed = pack(weight, name)
    assert packed.is_contiguous() and packed.data_ptr() != weight.data_ptr()
    assert packed.shape == ((n, 33) if n <= 4 else (-(-n // PANEL[name]), 33, PANEL[name]))
    assert torch.equal(unpack(packed, n), weight)


def test_pack_refuses() -> None:
    with pytest.raises(LoweringError, match="no packed weight for ISA"):
        pack(torch.zeros(2, 2), "sve")
    with pytest.raises(LoweringError, match=r"is \[N, K\]"):
        pack(torch.zeros(2, 2, 2), "avx2")


def test_reference_traces_with_any_batch() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return PACKED_LINEAR.reference(x, weight, bias, x, None, 45, 2)

    x, weight, bias, *_ = arguments(0, (8, 45), 45)
    exported = torch.export.export(
        Layer(), (x, weight, bias), dynamic_shapes=({0: torch.export.Dim("batch")}, None, None)
    )
    other = torch.randn(3, 45)
    assert torch.equal(exported.module()(other, weight, bias), Layer()(other, weight, bias))


def test_cost_counts_each_operand_once() -> None:
    cost = PACKED_LINEAR.cost
    assert cost is not None
    counted = cost(*arguments(0, (2, 3, 10), 20, mul=True))
    assert counted.flops == 2 * 6 * 10 * 20
    assert counted.bytes == 4 * (6 * 10 + 10 * 20 + 20 + 6 * 20 + 6 * 20)


def test_schema_and_kernel_agree_on_the_c_signature() -> None:
    assert PACKED_LINEAR.cpu is not None
    source = " ".join(PACKED_LINEAR.cpu.read_text().split())
    assert " ".join(cpp.declaration(PACKED_LINEAR.schema).split()) in source
