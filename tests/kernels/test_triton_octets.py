"""The Triton kernels of 8 and 4 bits: look-ups of packed rows and the scaled product, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from grc.kernels import rows as shared
from grc.kernels.bag_dot import triton as bag_dot
from grc.kernels.bag_fm import triton as bag_fm
from grc.kernels.lookup import triton as lookup
from grc.kernels.lookup.row_formats import packing
from grc.kernels.quantised_linear import rounded, simulated
from grc.kernels.scaled_linear import SCALED_LINEAR, rows_in_8_bits, weight_in_8_bits
from grc.kernels.scaled_linear import triton as scaled_linear
from tests.kernels.bags import DEVICE, DOTS, FMS, LOOKUPS, close, make, outside, packed, pairs, pooled
from tests.kernels.interpreter import GPU, elsewhere, passes, runs

FP8 = GPU and torch.cuda.get_device_capability() >= (8, 9)
FORMS = ("int8", "int4")
ABLE = [
    (name, form)
    for form in FORMS
    for name, case in LOOKUPS.items()
    if all(dim % (4 if form == "int8" else 8) == 0 for dim in case.dims)
]
pytestmark = pytest.mark.usefixtures("poisoned")


@runs
@pytest.mark.parametrize(("name", "form"), ABLE)
def test_lookup(name: str, form: str) -> None:
    a, exact, sizes = packed(make(LOOKUPS[name], torch.float32), form)
    out, bad = lookup.register()(*a.values())
    assert out.dtype == torch.float16 and bad.item() == outside(exact)
    close(out, torch.cat(pooled(exact), 1), torch.cat(pooled(sizes, absolute=True), 1))


@runs
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ABLE if name in DOTS])
def test_bag_dot(name: str, form: str) -> None:
    a, exact, sizes = packed(make(DOTS[name], torch.float32), form)
    dense = torch.randn(DOTS[name].batch, a["dims"][0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, bad = bag_dot.register()(
        a["arena"], a["ids"], a["offsets"], a["weights"], dense, a["bases"], a["rows"], a["dims"][0], a["lengths"],
        a["pooling"], a["padding"], False, False, True, a["packing"],
    )  # fmt: skip
    assert out.dtype == torch.float16 and bad.item() == outside(exact)
    assert torch.equal(out[:, : a["dims"][0]], dense.half())
    nodes = torch.stack([dense.double().cpu(), *pooled(exact)], 1)
    bound = torch.stack([dense.double().cpu().abs(), *pooled(sizes, absolute=True)], 1)
    close(out[:, a["dims"][0] :], pairs(nodes, False, False), pairs(bound, False, False), rounds=4.0)


@runs
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ABLE if name in FMS])
def test_bag_fm(name: str, form: str) -> None:
    a, exact, sizes = packed(make(FMS[name], torch.float32), form)
    weight = torch.randn(exact["arena"].shape[0], 1, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    given = (a["arena"], weight, a["ids"], a["bases"], a["rows"], a["dims"][0], a["padding"], a["packing"])
    flat, fm, bad = bag_fm.register()(*given)
    assert bad.item() == outside(exact)
    rows = torch.stack(pooled(exact), 1)
    most = torch.stack(pooled(sizes), 1)
    close(flat, rows.flatten(1), most.flatten(1))
    terms = torch.cat(pooled({**exact, "arena": weight, "dims": [1, 1, 1]}), 1)
    want = 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1)).sum(1, keepdim=True) + terms.sum(1, keepdim=True)
    bound = (most.sum(1) ** 2 + (most**2).sum(1)).sum(1, keepdim=True) + terms.abs().sum(1, keepdim=True)
    close(fm, want, bound)


def test_takes_rows_of_one_format_and_of_whole_words() -> None:
    arena = torch.zeros(1024, dtype=torch.uint8)
    assert shared.able(arena, [8, 12], packing(["int8", "int8"], [0, 64]))
    assert not shared.able(arena, [8, 8], packing(["int8", "int4"], [0, 64]))
    assert not shared.able(arena, [6], packing(["int8"], [0]))
    assert not shared.able(arena, [12], packing(["int4"], [0]))
    assert not shared.able(arena, [8], packing(["fp16"], [0]))


def operands(m: tuple[int, ...], n: int, k: int, form: str, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(*m, k, generator=g), torch.randn(n, k, generator=g) / k**0.5
    x = x.clamp(min=-0.2) * torch.rand(*m, 1, generator=g) * 3  # rows of different sizes, most of them above zero
    return x, weight, torch.randn(n, generator=g) if bias else None


SIZES = [((1,), 17, 33), ((5,), 64, 512), ((3, 10), 130, 96), ((65,), 70, 300), ((1030,), 40, 64), ((0,), 8, 16)]


@runs
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=str)
def test_scaled_linear(m: tuple[int, ...], n: int, k: int, form: str) -> None:
    if form == "fp8" and not FP8:
        pytest.skip("fp8 products need a GPU of sm_89 or later: Triton's interpreter has none")
    x, weight, bias = operands(m, n, k, form, bias=n != 70)
    steps, size, shift = (None if t is None else t.to(DEVICE) for t in rows_in_8_bits(x, form))
    own = [None if t is None else t.to(DEVICE) for t in weight_in_8_bits(weight, form)]
    given = (steps, size, shift, *own, None if bias is None else bias.to(DEVICE))
    got, exact = scaled_linear.register()(*given).cpu(), SCALED_LINEAR.reference(*given).cpu()
    assert got.shape == (*m, n) and got.dtype == torch.float16
    if not got.numel():
        return
    # Sums of int8 are exact: what is left is one rounding to float16. The tensor cores add fp8 products in fewer bits.
    rounding = (exact.float().abs() * 2.0**-10).clamp(min=2.0**-20)
    allowed = rounding if form == "int8" else rounding + 2.0**-11 * exact.float().abs().max()
    assert ((got.float() - exact.float()).abs() <= allowed).all()
    # What the search expects of a layer in this format.
    expected = simulated(x, rounded(weight, form), bias, form)
    assert (got.float() - expected).abs().max() <= 2e-3 * expected.abs().max()


@runs
def test_a_row_that_is_no_number_gives_none_and_spoils_no_other() -> None:
    x, weight, _bias = operands((4,), 24, 48, "int8")
    x[1, 5], x[3, 7] = float("nan"), float("inf")
    steps, size, shift = (t.to(DEVICE) for t in rows_in_8_bits(x, "int8") if t is not None)
    own = [t.to(DEVICE) for t in weight_in_8_bits(weight, "int8") if t is not None]
    got = scaled_linear.register()(steps, size, shift, *own, None).cpu()
    assert got[[1, 3]].isnan().all() and got[[0, 2]].isfinite().all()


@elsewhere
def test_in_the_interpreter() -> None:
    passes(__file__, 100)
