"""The Triton kernels of layers, attention and top-k against fp64: on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from grc.errors import LoweringError
from grc.kernels.activation_unit import ACTIVATION_UNIT
from grc.kernels.activation_unit import cases as unit_cases
from grc.kernels.activation_unit import triton as activation_unit
from grc.kernels.attention import ATTENTION
from grc.kernels.attention import triton as attention
from grc.kernels.attention.cases import arguments, padding, relative, share
from grc.kernels.cross import CROSS
from grc.kernels.cross import triton as cross
from grc.kernels.fusion import Case
from grc.kernels.packed_linear import ACTIVATIONS
from grc.kernels.packed_linear.activations import DICE, NONE, SIGMOID
from grc.kernels.score_topk import cases as topk_cases
from grc.kernels.score_topk import triton as score_topk
from grc.kernels.small_linear import attention_linear
from grc.kernels.small_linear import attention_reference as attention_linear_reference
from grc.kernels.small_linear import reference as small_linear_reference
from grc.kernels.small_linear import triton as small_linear
from tests.kernels.interpreter import GPU, INTERPRETED, crossed, elsewhere, passes, runs

DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="too large for the interpreter: needs a GPU")
DTYPES = (torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("poisoned")


def placed(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if their bits were integers")
    halved = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in halved]


def leave_to_a_gpu(case: Case) -> None:
    if INTERPRETED and "large batch" in case.name:
        pytest.skip("too large for the interpreter: needs a GPU")


def wide(args: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def check(module: Any, reference: Any, args: list[Any]) -> None:
    """The error against fp64 is at most twice that of plain torch, give or take the rounding of the result."""
    got, plain, exact = module.register()(*args), reference(*args), reference(*wide(args))
    assert got.shape == exact.shape and got.dtype == args[0].dtype and got.is_contiguous()
    assert torch.equal(got.isnan(), exact.isnan())
    here = ~exact.isnan()
    if here.any():
        error, theirs = ((t.double() - exact)[here].abs().max().item() for t in (got, plain))
        assert error <= 2 * theirs + torch.finfo(got.dtype).eps * exact[here].abs().max().item(), (error, theirs)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CROSS.cases, ids=lambda case: case.name)
def test_cross(case: Case, dtype: torch.dtype) -> None:
    check(cross, CROSS.reference, placed(case.build(1), dtype))


def cross_arguments(batch: int, width: int, rank: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(batch)
    x0, x = (torch.randn(batch, width + 3, generator=make)[:, 1 : width + 1] for _ in range(2))
    y = x if rank == width else torch.randn(rank, batch, generator=make).t()
    return [x0, y, torch.randn(width, rank, generator=make) / rank**0.5, torch.randn(width, generator=make), x]


@runs
@pytest.mark.parametrize(("batch", "width", "rank"), [(17, 33, 33), (3, 70, 130), (40, 16, 5)])
def test_cross_takes_views_and_remainders_of_every_tile(batch: int, width: int, rank: int) -> None:
    check(cross, CROSS.reference, placed(cross_arguments(batch, width, rank), torch.float16))


@gpu
@pytest.mark.parametrize("batch", [cross.FEW_ROWS, cross.FEW_ROWS + 1, cross.SOME_ROWS, 5000])
@pytest.mark.parametrize("width", [624, 625])
def test_cross_takes_few_rows_and_many(batch: int, width: int) -> None:
    check(cross, CROSS.reference, placed(cross_arguments(batch, width, width), torch.float16))


@runs
@pytest.mark.parametrize("some", [0, 1 << 20])
def test_the_larger_tiles_of_cross_are_right(some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "FEW_ROWS", 0)
    monkeypatch.setattr(cross, "SOME_ROWS", some)
    check(cross, CROSS.reference, placed(cross_arguments(130, 40, 40), torch.float16))


def layer_arguments(shape: tuple[int, ...], columns: int, mul: bool, add: bool, activation: int) -> list[Any]:
    make = torch.Generator().manual_seed(columns)
    depth = shape[-1]
    first, last = (torch.randn(*shape[:-1], columns, generator=make) if given else None for given in (mul, add))
    weight = torch.randn(columns, depth, generator=make) / depth**0.5
    return [torch.randn(*shape, generator=make), weight, torch.randn(columns, generator=make), first, last, activation]


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize(
    ("shape", "columns", "mul", "add"),
    [
        ((1, 40), 9, False, True), ((2, 1100), 5, True, False), ((5, 16), 33, True, True), ((0, 8), 6, False, False),
        ((3, 2, 130), 20, False, False), ((9, 72), 17, True, True), ((2, 7, 40), 6, True, True),
        ((1, 4, 1100), 9, True, True), ((2, 9, 2048), 8, False, True), ((1, 2, 2100), 5, False, False),
        ((21, 72), 40, True, True), ((2, 17, 512), 33, False, True), ((18, 2100), 9, True, False),
        ((1, 20, 8), 65, False, False),
    ],
    ids=str,
)  # fmt: skip
def test_small_linear(shape: tuple[int, ...], columns: int, mul: bool, add: bool, dtype: torch.dtype) -> None:
    for activation in (0, 1) if mul else (2, 5):
        args = placed(layer_arguments(shape, columns, mul, add, activation), dtype)
        if activation == 5:
            args[2] = None
        check(small_linear, small_linear_reference, args)


@runs
@pytest.mark.parametrize(
    ("shape", "dtype", "given"),
    crossed(
        [(3, 40), (1, 10, 72), (2, 10, 72), (3, 7, 128), (3, 7, 130), (1, 4, 1100), (17, 1100)],
        [torch.float32, *DTYPES],
        [(True, True), (True, False), (False, False)],
    ),
    ids=str,
)
def test_small_linear_normalises_rows(shape: tuple[int, ...], dtype: torch.dtype, given: tuple[bool, bool]) -> None:
    x, *rest = layer_arguments(shape, 19, given[0], given[1], 2)
    parameters = [torch.randn(shape[-1]).add(1) if one else None for one in given]
    check(small_linear, small_linear_reference, [*placed([x * 3 + 5, *rest, *parameters], dtype), 1e-5])


def test_small_linear_normalises_no_row_that_it_would_read_in_blocks() -> None:
    x, weight = torch.zeros(1, small_linear.DEPTH + 1), torch.zeros(2, small_linear.DEPTH + 1)
    with pytest.raises(LoweringError, match="normalises no rows of 2049 numbers"):
        small_linear.small_linear(x, weight, None, None, None, 0, eps=1e-5)


@runs
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_small_linear_has_every_activation_and_keeps_nan(activation: int) -> None:
    args = placed(layer_arguments((4, 24), 8, False, True, activation), torch.float32)
    args[0][1, 3], args[0][2] = float("nan"), args[0][2] * 40
    check(small_linear, small_linear_reference, args)


@runs
def test_small_linear_takes_views() -> None:
    x, *rest = placed(layer_arguments((6, 40), 12, True, True, 1), torch.float16)
    rest[2] = rest[2].t().contiguous().t()
    check(small_linear, small_linear_reference, [x.t().contiguous().t(), *rest])
    check(small_linear, small_linear_reference, [torch.cat([x, x], 1)[:, 3:43], *rest])


@runs
@pytest.mark.parametrize("users", [3, attention_linear.MOST_USERS + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "widths", "kind", "causal", "add"),
    [
        (10, 10, 8, (64, 64), 0, False, True), (7, 7, 3, (20, 12), 1, True, False), (16, 16, 1, (32, 48), 2, True, True),
        (1, 9, 2, (16, 16), 2, False, False), (5, 16, 4, (8, 8), 0, False, True),
    ],
    ids=str,
)  # fmt: skip
def test_attention_with_the_layer_behind_it(
    queries: int, keys: int, heads: int, widths: tuple[int, int], kind: int, causal: bool, add: bool, dtype: torch.dtype,
    users: int,
) -> None:  # fmt: skip
    d, w = widths
    whole = torch.randn(users, max(queries, keys), heads, 2 * d + w)
    q, k, v = (part[:, :steps] for part, steps in zip(whole.split([d, d, w], 3), (queries, keys, keys), strict=True))
    weight, bias = torch.randn(36, heads * w) / (heads * w) ** 0.5, torch.randn(36)
    residual = torch.randn(users, queries, 36) if add else None
    args = placed([q, k, v, d**-0.5, 1.5, kind, causal, weight, bias if add else None, residual, 1], dtype)
    assert attention_linear.able(*args[:3], None, None)
    check(attention_linear, attention_linear_reference, args)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION.cases, ids=lambda case: case.name)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    leave_to_a_gpu(case)
    args = placed(case.build(7), dtype)
    if len(args[0]) == 0:  # torch's own attention fails on a GPU then
        assert attention.register()(*args).shape == (0, args[0].shape[1], args[0].shape[2] * args[2].shape[3])
        return
    check(attention, ATTENTION.reference, args)


@runs
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 37, 16), (13, 5, 33), (70, 70, 8), (5, 130, 3)])
def test_attention_of_every_remainder_of_a_block(kind: int, queries: int, keys: int, width: int) -> None:
    factor = share if kind == 2 else None
    for causal, mask in ((True, relative), (False, padding)):
        args = arguments(5, 2, queries, 2, width, keys, width + 1, mask, factor, kind, causal)
        check(attention, ATTENTION.reference, placed(args, torch.float16))


@runs
@pytest.mark.parametrize("dtype", activation_unit.DTYPES, ids=str)
@pytest.mark.parametrize("case", ACTIVATION_UNIT.cases, ids=lambda case: case.name)
def test_activation_unit(case: Case, dtype: torch.dtype) -> None:
    args = placed(case.build(4), dtype)
    if not activation_unit.able(*args):
        pytest.skip("the kernel leaves this case to plain torch")
    check(activation_unit, ACTIVATION_UNIT.reference, args)


@runs
@pytest.mark.parametrize("activation", range(NONE, DICE + 1))
def test_every_activation_of_a_unit(activation: int) -> None:
    for n2 in (3, None):
        args = unit_cases.arguments(activation, 3, 19, 5, 19, n2, (activation, activation))
        check(activation_unit, ACTIVATION_UNIT.reference, placed(args, torch.float16))


@runs
def test_what_is_infinite_stays_in_its_own_step() -> None:
    args = placed(unit_cases.arguments(1, 2, 19, 5, 19, 3, (SIGMOID, SIGMOID)), torch.float32)
    args[0][:, 2], args[3][5 + 2], args[1][0, 3, 2] = 1.0, args[3][2], torch.inf  # no infinity less another
    found, exact = activation_unit.register()(*args), ACTIVATION_UNIT.reference(*wide(args))
    assert exact.isfinite().all() and (found - exact).abs().max() < 1e-5


def popular_first(seed: int) -> tuple[Any, ...]:
    """The best items are neighbours: all of them lie in a few groups."""
    x, weight, _, k = topk_cases.arguments(seed, (2, 24), 3001, 40)
    return x, weight, torch.linspace(20, -20, 3001), k


TOPK = [
    *topk_cases.CASES,
    Case("many groups", lambda seed: topk_cases.arguments(seed, (19, 64), 5003, 20, bias=True)),
    Case("many wanted", lambda seed: topk_cases.arguments(seed, (1, 16), 4400, 270)),
    Case("popular first", popular_first),
]


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TOPK, ids=lambda case: case.name)
def test_score_topk(case: Case, dtype: torch.dtype) -> None:
    leave_to_a_gpu(case)
    args = placed(case.build(3), dtype)
    if not score_topk.able(*args):
        pytest.skip("the kernel leaves this case to plain torch")
    check_topk(args)


def check_topk(args: list[Any]) -> None:
    x, weight, bias, k = args
    values, items = score_topk.register()(*args)
    assert values.shape == items.shape == (*x.shape[:-1], k) and values.dtype == x.dtype and items.dtype == torch.int64
    if values.numel() == 0:
        return
    exact = torch.nn.functional.linear(*wide((x, weight, bias)))
    allowed = torch.finfo(x.dtype).eps * exact[exact.isfinite()].abs().max() + 1e-6
    best = exact.topk(k).values
    finite = best.isfinite()
    assert torch.equal(values[~finite].double(), best[~finite])
    for claimed in (best, exact.gather(-1, items)):
        assert (values.double() - claimed)[finite].abs().max() <= allowed
    assert (values.diff() <= 0)[finite[..., 1:]].all()
    assert (items.sort().values.diff() > 0).all() and items.min() >= 0 and items.max() < len(weight)


@runs
def test_equal_scores_come_in_the_order_of_their_items_and_nan_comes_first() -> None:
    x = torch.ones(2, 16, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(400, 16, dtype=torch.float16, device=DEVICE)
    weight[[7, 300, 301]] = torch.tensor([1.0, torch.nan, 2.0], dtype=torch.float16, device=DEVICE)[:, None]
    values, items = score_topk.register()(x, weight, None, 5)
    assert items[0, :3].tolist() == [300, 301, 7] and items[0, 3] < items[0, 4]
    assert values[1, 0].isnan() and values[1, 1:].tolist() == [32.0, 16.0, 0.0, 0.0]
    weight[:] = -1e-8  # a score that is -0.0 in float16 is as large as one that is 0
    weight[9] = 0
    assert score_topk.register()(x, weight, None, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


@runs
def test_scores_that_are_all_equal() -> None:
    x, weight = placed([torch.ones(2, 16), torch.full((900, 16), -1.5)], torch.float16)
    check_topk([x, weight, None, 20])


def test_what_the_kernels_leave_to_others() -> None:
    half, single = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 8)
    assert cross.able(half, half, half, None, half) and not cross.able(single, single, single, None, single)
    assert not cross.able(half, half, half, torch.zeros(4), half)
    heads = torch.zeros(1, 2, 1, 200, dtype=torch.float16)
    assert not attention.able(heads, heads, heads, None, None)
    assert attention.able(*[heads[..., :128]] * 3, None, None)
    unit = [t.half() if isinstance(t, Tensor) else t for t in unit_cases.arguments(0, 2, 5, 32, 80, 40)]
    assert activation_unit.able(*unit) and not activation_unit.able(unit[0].float(), *unit[1:])
    assert not activation_unit.able(*(t.double() if isinstance(t, Tensor) else t for t in unit))
    assert not score_topk.able(half, half, None, 1), "4 items have no groups"
    assert score_topk.able(half, torch.zeros(64, 8, dtype=torch.float16), None, 4)
    catalogue = torch.zeros(1, 8, dtype=torch.float16).expand(10_000_000, 8)
    assert score_topk.able(half, catalogue[:1_000_000], None, 1000)
    assert not score_topk.able(half, catalogue, None, 100), "its groups do not fit into registers"


@elsewhere
def test_in_the_interpreter() -> None:
    passes(__file__, 20)
