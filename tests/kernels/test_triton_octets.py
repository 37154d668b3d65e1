"""The Triton kernels of 8 and 4 bits: look-ups of packed rows and the scaled product, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from grc.kernels import rows as shared
from grc.kernels.bag_dot import triton as bag_dot
from grc.kernels.bag_fm import triton as bag_fm
from grc.kernels.lookup import triton as lookup
from grc.kernels.lookup.row_formats import packing
from grc.kernels.quantised_linear import simulated
from grc.kernels.scaled_linear import SCALED_LINEAR, rows_in_8_bits, weight_in_8_bits
from grc.kernels.scaled_linear import triton as scaled_linear
from tests.kernels.bags import (
    DEVICE,
    DOTS,
    FMS,
    LOOKUPS,
    NO_PADDING,
    Bags,
    close,
    counted,
    make,
    outside,
    packed,
    pairs,
    pooled,
    triangle,
)
from tests.kernels.interpreter import GPU, crossed, elsewhere, passes, runs

FP8 = GPU and torch.cuda.get_device_capability() >= (8, 9)
FORMS = ("int8", "int4")
ABLE = [
    (name, form)
    for form in FORMS
    for name, case in LOOKUPS.items()
    if all(dim % (4 if form == "int8" else 8) == 0 for dim in case.dims)
]
# The dot products take the interpreter longest: there, the formats take turns.
DOTTED = [(name, form) for name, form in ABLE if name in DOTS and (GPU or form == FORMS[list(DOTS).index(name) % 2])]
pytestmark = pytest.mark.usefixtures("poisoned")


@runs
@pytest.mark.parametrize(("name", "form"), ABLE)
def test_lookup(name: str, form: str) -> None:
    a, exact, sizes = packed(make(LOOKUPS[name], torch.float32), form)
    out, bad = counted(lookup.register(), *a.values())
    assert out.dtype == torch.float16 and bad == outside(exact)
    close(out, torch.cat(pooled(exact), 1), torch.cat(pooled(sizes, absolute=True), 1))


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel of integers take any rows, one id a bag."""
    monkeypatch.setattr(bag_dot, "LEAST_ROWS", 1)
    monkeypatch.setattr(bag_dot, "LEAST_COLUMNS", 1)


def run_dot(
    a: dict[str, Any],
    dense: Tensor | None,
    upper: bool = False,
    diagonal: bool = False,
    keep: bool = False,
    width: int = 0,
    tiles: list[int] | None = None,
) -> tuple[Tensor, int]:
    head = (a["arena"], a["ids"], a["offsets"], a["weights"], dense, a["bases"], a["rows"], a["dims"][0], a["lengths"])
    rest = (a["pooling"], a["padding"], upper, diagonal, keep, a["packing"], None)
    return counted(bag_dot.register(), *head, *rest, width=width, tiles=tiles)


def check_dot(name: str, form: str) -> None:
    a, exact, sizes = packed(make(DOTS[name], torch.float32), form)
    dense = torch.randn(DOTS[name].batch, a["dims"][0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, bad = run_dot(a, dense, keep=True)
    assert out.dtype == torch.float16 and bad == outside(exact)
    assert torch.equal(out[:, : a["dims"][0]], dense.half())
    nodes = torch.stack([dense.double().cpu(), *pooled(exact)], 1)
    bound = torch.stack([dense.double().cpu().abs(), *pooled(sizes, absolute=True)], 1)
    close(out[:, a["dims"][0] :], pairs(nodes, False, False), pairs(bound, False, False), rounds=4.0)


@runs
@pytest.mark.parametrize(("name", "form"), DOTTED)
def test_bag_dot(name: str, form: str) -> None:
    check_dot(name, form)


@runs
@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ABLE if name in FMS])
def test_bag_dot_of_integers(name: str, form: str) -> None:
    check_dot(name, form)


def equal_bags(features: int, dim: int, **change: Any) -> Bags:
    rows = tuple(3 + f % 5 for f in range(features))
    case = {"padding": (NO_PADDING,) * features, "batch": 3, **change}
    return Bags(dims=(dim,) * features, lengths=(1,) * features, rows=rows, **case)


def hard_rows(arena: Tensor) -> Tensor:
    """Rows of many scales, whose offsets are up to a thousand times as large as the rest of them, or all of them."""
    g = torch.Generator().manual_seed(4)
    kinds = torch.randint(0, 4, (len(arena), 1), generator=g)
    size = torch.tensor([1.0, 0.02, 0.0, 1e-4])[kinds]
    far = torch.tensor([0.0, 12.0, 12.0, 0.0])[kinds]
    return (size * arena.cpu() + far * torch.randn(len(arena), 1, generator=g).clamp(-1.5, 1.5)).to(arena.device)


def allowed(nodes: Tensor, most: Tensor, dense: bool) -> Tensor:
    """[B, N, N]: what `bag_dot` may lose in products of integers, for rows [B, N, D] of largest sizes [B, N]."""
    lost = bag_dot.INTEGERS * nodes.shape[2] * most[:, :, None] * most[:, None, :]
    if dense:
        steps = 0.52 * bag_dot.FIXED * most[:, :1] * nodes.abs().sum(2)
        lost[:, 0] += steps
        lost[:, :, 0] += steps
    return lost


# Among them 16, 32, 33 and 34 rows, more than one block, half a block, and sums too large for the trick of SMALL.
SHAPES = [
    (26, 128, True),
    (15, 16, True),
    (16, 64, False),
    (31, 64, True),
    (32, 16, False),
    (33, 16, False),
    (20, 200, True),
    (2, 264, True),
    (33, 24, True),
]
PICKS = [(False, False, True), (True, False, False), (False, True, True), (True, True, False)]


@runs
@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize(("shape", "pick"), crossed(SHAPES, PICKS), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_of_integers_keep_their_bound(
    shape: tuple[int, int, bool], form: str, pick: tuple[bool, bool, bool]
) -> None:
    (features, dim, dense), (upper, diagonal, keep) = shape, pick
    a = make(equal_bags(features, dim), torch.float32)
    a["arena"] = hard_rows(a["arena"])
    a, exact, sizes = packed(a, form)
    nodes, most = torch.stack(pooled(exact), 1), torch.stack(pooled(sizes), 1)[:, :, 0] * (1 + 2.0**-9)
    head = None
    if dense:
        head = torch.randn(len(nodes), dim, generator=torch.Generator().manual_seed(1))
        head[0] *= 10.0 ** torch.linspace(-7, 0, dim)
        head[1] = 0.0
        nodes = torch.cat([head.double()[:, None], nodes], 1)
        most = torch.cat([head.double().abs().amax(1, keepdim=True), most], 1)
    out, bad = run_dot(a, None if head is None else head.to(DEVICE), upper, diagonal, keep and dense)
    assert bad == 0
    if head is not None and keep:
        assert torch.equal(out[:, :dim].cpu(), head.half())
        out = out[:, dim:]
    want = pairs(nodes, upper, diagonal)
    error = (out.double().cpu() - want).abs()
    bound = triangle(allowed(nodes, most, dense), upper, diagonal) + 2.0**-11 * want.abs() + 2.0**-24
    assert bool((error <= bound).all()), f"worst {(error / bound).max():.3g} of the bound"


@runs
@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_a_dense_row_that_is_no_number_spoils_its_own_products_only(kind: torch.dtype, form: str) -> None:
    a, exact, sizes = packed(make(equal_bags(18, 64, batch=6), torch.float32), form)
    dense = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(kind)
    dense[0, 3], dense[2, 63], dense[4, 0] = float("nan"), float("inf"), -float("inf")
    dense[5] *= 2.0**-14
    out, _ = run_dot(a, dense.to(DEVICE))
    j = torch.tril_indices(19, 19, -1)[1]
    rows, bound = (pairs(torch.stack(pooled(x), 1), False, False) for x in (exact, sizes))
    close(out[:, j > 0], rows, bound, rounds=4.0)
    beside = out[:, j == 0].cpu()
    assert beside[[0, 2, 4]].isnan().all() and beside[[1, 3, 5]].isfinite().all()
    again, _ = run_dot(a, dense.nan_to_num(1.0, 1.0, 1.0).to(DEVICE))
    assert torch.equal(again[[1, 3, 5]], out[[1, 3, 5]])


@runs
@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("form", FORMS)
def test_products_of_integers_take_no_row_for_a_bad_id_or_a_padded_one(form: str) -> None:
    case = equal_bags(18, 64, batch=6, padding=(*(NO_PADDING,) * 16, 2, 0))
    a, exact, sizes = packed(make(case, torch.float32), form)
    ids = a["ids"]
    ids[0, 0], ids[1, 1], ids[2, 2], ids[3, 0], ids[4, 16] = -1, case.rows[1], 2**40, -(2**40), 1000
    ids[5] = -7
    dense = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    nodes = torch.stack([dense.double(), *pooled(exact)], 1)
    bound = torch.stack([dense.double().abs(), *pooled(sizes, absolute=True)], 1)
    out, bad = run_dot(a, dense.to(DEVICE), width=200)
    assert bad == outside(exact) == 23
    close(out[:, :171], pairs(nodes, False, False), pairs(bound, False, False), rounds=4.0)
    assert not out[:, 171:].any() and not out[5].any()


@runs
@pytest.mark.usefixtures("integers")
def test_products_of_no_rows_at_all() -> None:
    a = packed(make(Bags(dims=(64,) * 3), torch.float32), "int8")[0]
    a["arena"], a["rows"] = a["arena"][:0], [0] * 3
    out, bad = run_dot(a, torch.ones(5, 64, device=DEVICE))
    assert bad == 15 and not out.any()


@runs
@pytest.mark.parametrize("choice", bag_dot.INTEGER_CONFIGS, ids=str)
def test_every_config_of_integers_is_right(choice: bag_dot.Config) -> None:
    a, exact, sizes = packed(make(equal_bags(17, 152), torch.float32), "int8")
    bound = torch.stack(pooled(sizes), 1)
    out, _ = run_dot(a, None, tiles=[0, *choice])
    close(out, pairs(torch.stack(pooled(exact), 1), False, False), pairs(bound, False, False), 4.0)


@runs
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ABLE if name in FMS])
def test_bag_fm(name: str, form: str) -> None:
    a, exact, sizes = packed(make(FMS[name], torch.float32), form)
    weight = torch.randn(exact["arena"].shape[0], 1, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    given = (a["arena"], weight, a["ids"], a["bases"], a["rows"], a["dims"][0], a["padding"], a["packing"])
    (flat, fm), bad = counted(bag_fm.register(), *given)
    assert bad == outside(exact)
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
    expected = torch.cat(list(simulated(x, weight, bias, form)), -1)
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
    passes(__file__, 130)
