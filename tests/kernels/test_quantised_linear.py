"""The quantised linear against its reference, which rounds as the kernel must: over remainders, epilogues, views, ISAs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from grc.errors import LoweringError
from grc.kernels import cpp
from grc.kernels.packed_linear import ACTIVATIONS
from grc.kernels.packed_linear.panels import PANEL
from grc.kernels.quantised_linear import MAX_DEPTH, QUANTISED_LINEAR, quantise, rounded, simulated
from grc.kernels.quantised_linear.cases import arguments
from grc.kernels.quantised_linear.panels import unpack
from tests.kernels.contract import ISAS

NAMES = {torch.int8: "int8", torch.bfloat16: "bf16"}
FORMATS = pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bfloat16"])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def answer(args: tuple[Any, ...], isa: str) -> Tensor:
    """The kernel's answer, from memory that last held NaN."""
    torch.full((*args[0].shape[:-1], args[6]), torch.nan)  # freed at once: the allocator hands the block out again
    return cpp.call(QUANTISED_LINEAR, *args, isa=isa)


def check(args: tuple[Any, ...], isa: str) -> None:
    """x rounds to the same steps as in the reference, so what is left is float32's rounding of exact or float32 sums."""
    y = answer(args, isa)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.dtype is torch.float32 else a for a in args)
    exact = QUANTISED_LINEAR.reference(*wide)
    assert y.shape == exact.shape and y.dtype == torch.float32 and y.is_contiguous()
    if exact.numel():
        rounding = 1e-4 if args[7] == 2 else 4e-6  # the kernel's GELU is a shorter polynomial
        allowed = rounding * max(1.0, exact.abs().max().item()) * max(1.0, (args[0].shape[-1] / 256) ** 0.5)
        assert (y - exact).abs().max().item() <= allowed


@FORMATS
def test_every_remainder_of_a_tile_and_of_a_group(isa: str, dtype: torch.dtype) -> None:
    for m, k, n in itertools.product(
        (1, 2, 5, 6, 7, 13, 17, 45), (1, 3, 7, 33, 128, 302), (1, 4, 5, 16, 17, 47, 65, 130)
    ):
        check(arguments(m + k + n, (m, k), n, dtype, isa=isa), isa)


@FORMATS
def test_products_of_other_libraries_between_ours(dtype: torch.dtype) -> None:
    """oneDNN multiplies by AMX's tiles too, and remembers what it configured."""
    x, w = torch.randn(96, 256).bfloat16(), torch.randn(256, 160).bfloat16()
    alone = [x @ w, x[:33] @ w]
    for _ in range(3):
        check(arguments(1, (40, 302), 130, dtype), cpp.target_isa())
        assert torch.equal(x @ w, alone[0]) and torch.equal(x[:33] @ w, alone[1])


@FORMATS
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_answer(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for m, k, n in ((1, 1100, 3000), (64, 415, 1300), (900, 257, 70)):
            args = arguments(1, (m, k), n, dtype, activation=1, mul=True, add=True)
            torch.set_num_threads(threads)
            got = answer(args, cpp.target_isa())
            torch.set_num_threads(1)
            alone = answer(args, cpp.target_isa())
            # Tiles of another height sum bfloat16 products in another order; int8 sums are exact.
            assert torch.equal(got, alone) if dtype is torch.int8 else torch.allclose(got, alone, atol=1e-5)
            check(args, cpp.target_isa())
    finally:
        torch.set_num_threads(before)


@FORMATS
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_every_epilogue(isa: str, dtype: torch.dtype, activation: int) -> None:
    for bias, mul, add in itertools.product((False, True), repeat=3):
        for n in (3, 75):
            check(arguments(activation, (41, 40), n, dtype, activation, bias, mul, add, isa), isa)


@pytest.mark.parametrize("case", QUANTISED_LINEAR.cases, ids=lambda case: case.name)
def test_cases(case: Any) -> None:
    check(tuple(case.build(3)), cpp.target_isa())


def test_int8_sums_are_the_same_on_every_isa(isa: str) -> None:
    """Whole numbers in, so that the scales are exact: then every ISA must give the same bits."""
    x = torch.randint(-120, 136, (9, 333), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0], x[:, 1] = -120, 135
    weight = torch.randint(-127, 128, (70, 333), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0] = 127
    want = x.double() @ weight.double().T
    q = quantise(weight, torch.int8, isa)
    got = answer((x, q.packed, q.scale, None, None, None, 70, 0), isa)
    assert torch.equal(got.double(), want)


def test_the_deepest_sums_stay_in_32_bits(isa: str) -> None:
    """Every product the largest there is: 65536 of 255 * 127, and of 255 * -127."""
    x = torch.ones(2, MAX_DEPTH)
    weight = torch.stack([torch.ones(MAX_DEPTH), -torch.ones(MAX_DEPTH)])
    q = quantise(weight, torch.int8, isa)
    got = answer((x, q.packed, q.scale, None, None, None, 2, 0), isa)
    assert torch.allclose(got, torch.tensor([[65536.0, -65536.0]] * 2), rtol=1e-5)
    deeper = torch.ones(2, MAX_DEPTH + 1)
    with pytest.raises(LoweringError, match="a layer of 65537 inputs is too deep for int8"):
        quantise(deeper, torch.int8, isa)


@FORMATS
def test_views_are_read_where_they_are(isa: str, dtype: torch.dtype) -> None:
    x, *rest, n, _ = arguments(0, (6, 33), 75, dtype, isa=isa)
    wide = torch.randn(6, 4, 50)
    for view in (x[::2], x[:1].expand(5, 33), wide[:, 1, 9:42], wide[:, 1:3, 9:42], torch.randn(33, 8).t()):
        check((view, *rest[:3], None, torch.randn(n).expand(*view.shape[:-1], n), n, 0), isa)


@FORMATS
def test_rows_with_nan_or_infinity_give_nan_and_spare_the_others(isa: str, dtype: torch.dtype) -> None:
    args = arguments(0, (13, 40), 75, dtype, isa=isa)
    clean = answer(args, isa)
    args[0][4, 7] = torch.nan
    args[0][9, 3] = torch.inf
    y = answer(args, isa)
    assert y[4].isnan().all() and not y[9].isfinite().any()
    others = [i for i in range(13) if i not in (4, 9)]
    assert torch.equal(y[others], clean[others])


def test_rows_of_zeros_of_one_value_and_of_denormals(isa: str) -> None:
    args = arguments(0, (5, 40), 75, isa=isa)
    x = args[0]
    x[0], x[1], x[2], x[3] = 0.0, 3.5, -2.0, 1e-44
    check(args, isa)
    assert torch.equal(answer(args, isa)[0], args[3]) and torch.equal(answer(args, isa)[3], args[3])


def test_one_huge_row_leaves_the_others_exact(isa: str) -> None:
    args = arguments(0, (5, 64), 75, isa=isa)
    clean = answer(args, isa)
    args[0][2] *= 1e30
    assert torch.equal(answer(args, isa)[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_refuses_what_does_not_fit(isa: str) -> None:
    x, weight, scale, bias, _, _, n, _ = arguments(0, (6, 33), 75, isa=isa)
    for args, reason in (
        ((x.double(), weight, scale, bias, None, None, n, 0), "x is not float32"),
        ((x, weight, None, bias, None, None, n, 0), "a weight of int8 has a scale"),
        ((x, weight.to(torch.bfloat16), scale, bias, None, None, n, 0), "one of bfloat16 has none"),
        ((x, weight, scale, bias, None, None, 200, 0), "does not fit"),
        ((x[:, :9], weight, scale, bias, None, None, n, 0), "does not fit"),
        ((x, torch.zeros(3, 9, 24, 4, dtype=torch.int8), scale, bias, None, None, n, 0), "another ISA"),
        ((x, weight, scale[:9], bias, None, None, n, 0), "scale is not a contiguous"),
        ((x, weight, scale, bias, x, None, n, 0), "mul does not have the shape"),
        ((x, weight, scale, bias, None, None, n, 7), "activation is 0 to 6"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            cpp.call(QUANTISED_LINEAR, *args, isa=isa)


@FORMATS
def test_unpack_undoes_the_layout(isa: str, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (5, 7), (64, 32), (100, 33), (5000, 130)):  # the last in several blocks
        weight = torch.randn(n, k)
        q = quantise(weight, dtype, isa)
        assert q.packed.is_contiguous() and q.packed.shape[2] == PANEL[isa]
        values = unpack(q.packed, n, k).float()
        values = values if q.scale is None else values * q.scale[:n, None]
        assert torch.equal(values, rounded(weight, NAMES[dtype]))


def test_rounding_is_at_most_half_a_step_and_keeps_rows_apart() -> None:
    weight = torch.randn(50, 33)
    weight[7] *= 1e6
    weight[8] = 0.0
    weight[9] = 1e-40
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded(weight, "int8") - weight).abs() <= step * 0.5001 + 1e-44).all()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.full((3, 4), torch.nan), "a weight to quantise holds NaN or infinity"),
        (torch.zeros(3, 4, 5), r"a weight to quantise is \[N, K\], not \[3, 4, 5\]"),
    ],
)
def test_quantise_refuses(weight: Tensor, reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        quantise(weight, torch.int8, "avx2")


@FORMATS
def test_the_simulation_is_the_kernel(dtype: torch.dtype) -> None:
    x, _, _, bias, _, _, n, _ = arguments(5, (37, 120), 90, dtype)
    weight = torch.randn(n, 120, generator=torch.Generator().manual_seed(5)) / 120**0.5
    q = quantise(weight, dtype, cpp.target_isa())
    got = answer((x, q.packed, q.scale, bias, None, None, n, 0), cpp.target_isa())
    assert torch.allclose(torch.cat(list(simulated(x, weight, bias, NAMES[dtype])), 1), got, atol=1e-5)


@FORMATS
def test_reference_traces_with_any_batch(dtype: torch.dtype) -> None:
    args = arguments(0, (8, 45), 45, dtype, activation=2, add=True)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return QUANTISED_LINEAR.reference(x, *args[1:4], x, None, 45, 2)

    exported = torch.export.export(Layer(), (args[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = torch.randn(3, 45)
    assert torch.equal(exported.module()(other), Layer()(other))


def test_schema_and_kernel_agree_on_the_c_signature() -> None:
    assert QUANTISED_LINEAR.cpu is not None
    source = " ".join(QUANTISED_LINEAR.cpu.read_text().split())
    assert " ".join(cpp.declaration(QUANTISED_LINEAR.schema).split()) in source
