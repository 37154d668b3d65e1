"""score_topk: the kernel against fp64 and, on whole numbers, against a stable sort; the fusion and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grc.graph.capture import Source, capture
from grc.graph.model_file import from_module
from grc.graph.rewrite import copy_graph
from grc.kernels import FUSIONS, cpp
from grc.kernels.fusion import Case
from grc.kernels.quantised_linear import QUANTISED_LINEAR
from grc.kernels.score_topk import PACKED_SCORE_TOPK, SCORE_TOPK
from grc.kernels.score_topk.cases import arguments, packed
from grc.lowering.engine import Lowerable, Target
from grc.lowering.inductor import Inductor
from grc.lowering.pack import pack_linears
from grc.options import Options
from grc.passes.fuse import Fuse
from grc.passes.manager import Proof, Record, run_passes
from grc.passes.pipeline import pipeline
from tests.kernels.contract import ISAS, results

INF = torch.inf


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def answer(values: tuple[Any, ...], isa: str | None = None) -> tuple[Tensor, Tensor]:
    """The kernel's answer to score_topk's arguments, from memory that last held NaN."""
    shape = (*values[0].shape[:-1], values[3])
    for dtype in (torch.float32, torch.float64):  # freed at once: the allocator hands the blocks out again
        torch.full(shape, torch.nan, dtype=dtype)
    got, items = cpp.call(PACKED_SCORE_TOPK, *packed(values, isa), isa=isa)
    assert got.shape == items.shape == shape and got.is_contiguous() and items.is_contiguous()
    assert got.dtype == torch.float32 and items.dtype == torch.int64
    return got, items


def check(values: tuple[Any, ...], isa: str | None = None) -> None:
    """At most twice the error of torch's own scores, in each place and against the true score of the item there."""
    got, items = answer(values, isa)
    if not got.numel():
        return
    x, weight, bias, k = values
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    error = (nn.functional.linear(x, weight, bias) - exact).abs()
    allowed = 2 * error[error.isfinite()].max() + 2**-24 * exact[exact.isfinite()].abs().max()
    best = exact.topk(k).values
    finite = best.isfinite()
    assert torch.equal(got[~finite].double(), best[~finite])
    for claimed in (best, exact.gather(-1, items)):
        assert (got.double() - claimed)[finite].abs().max() <= allowed
    assert (got.diff() <= 0)[finite[..., 1:]].all()
    assert (items.sort().values.diff() > 0).all() and items.min() >= 0 and items.max() < len(weight)


def whole_numbers(seed: int, rows: int, width: int, items: int, k: int) -> tuple[Any, ...]:
    """Arguments whose scores are small whole numbers: exact in any order of summation, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-2, 3, size, generator=generator).float() for size in ((rows, width), (items, width)))
    return x, weight, torch.randint(-3, 4, (items,), generator=generator).float(), k


def check_order(values: tuple[Any, ...], isa: str | None = None) -> None:
    """Falling scores, NaN first, and of equal scores the lowest item first: exactly."""
    x, weight, bias, k = values
    scores, items = nn.functional.linear(x, weight, bias).sort(descending=True, stable=True)
    got, chosen = answer(values, isa)
    assert torch.equal(chosen, items[:, :k])
    torch.testing.assert_close(got, scores[:, :k], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SCORE_TOPK.cases, ids=lambda case: case.name)
def test_answers(case: Case, isa: str) -> None:
    check(tuple(case.build(7)), isa)


def test_every_remainder_of_a_tile(isa: str) -> None:
    for rows, width, items in itertools.product((1, 2, 7), (1, 33), (1, 3, 4, 5, 17, 64, 65, 257, 511)):
        for k in {1, items // 2, items}:
            check_order(whole_numbers(rows + items, rows, width, items, k), isa)


@pytest.mark.parametrize(("rows", "items", "k"), [(1, 20_000, 100), (5, 9000, 600), (49, 3000, 10), (250, 1500, 100)])
def test_splits_over_threads(isa: str, threads: int, rows: int, items: int, k: int) -> None:
    check_order(whole_numbers(rows, rows, 29, items, k), isa)


def test_scores_that_only_rise_or_never_change(isa: str) -> None:
    rising, one = torch.arange(5000.0)[:, None], torch.ones(1, 1)
    for weight in (rising, rising.flip(0), torch.zeros(5000, 1), rising % 7):
        check_order((one, weight, None, 40), isa)


def test_nan_is_largest_and_infinities_keep_their_place(isa: str) -> None:
    for count in (1, 30, 2500):
        x, weight, bias, k = whole_numbers(3, 4, 20, 2500, 60)
        place = torch.randperm(2500, generator=torch.Generator().manual_seed(count))
        bias[place[:count]] = torch.nan
        bias[place[count : count + 50]] = INF
        bias[place[count + 50 : count + 2400]] = -INF
        check_order((x, weight, bias, k), isa)
        check_order((x, weight, bias, 2500), isa)
    x[2] = torch.nan
    check_order((x, weight, None, k), isa)


def test_zeros_of_both_signs_are_equal(isa: str) -> None:
    weight = torch.tensor([0.0, -0.0, 0.0, -0.0, -0.0, 1.0, 0.0])[:, None]
    assert answer((torch.ones(1, 1), weight, None, 5), isa)[1].tolist() == [[5, 0, 1, 2, 3]]


def test_hidden_items_come_last(isa: str) -> None:
    x, weight, bias, _ = arguments(0, (3, 12), 400, 0, masked=390)
    values, items = answer((x, weight, bias, 30), isa)
    assert (items[:, :10] >= 390).all() and values[:, :10].isfinite().all()
    assert torch.equal(items[:, 10:], torch.arange(20).expand(3, 20)) and (values[:, 10:] == -INF).all()


def test_views_are_read_where_they_are(isa: str) -> None:
    wide, weight, *_ = arguments(0, (6, 4, 50), 300, 9)
    weight = weight[:, :33]
    turned = wide[0, :, :33].t().contiguous().t()
    for view in (wide[::2, 1, 9:42], wide[:, :, 9:42], wide.transpose(0, 1)[:, :, 9:42], turned):
        check((view, weight, None, 9), isa)
    check((wide[:1, 0, :33].expand(5, 33), weight, None, 9), isa)


def test_refuses_what_does_not_fit(isa: str) -> None:
    x, weight, _, bias, items, k = packed(arguments(0, (6, 33), 75, 5, bias=True), isa)
    scale = torch.ones(2 * items)
    for args, reason in (
        ((x.double(), weight, None, bias, items, k), "x is not float32"),
        ((x, weight, None, None, 200, k), "does not fit"),
        ((x[:, :9], weight, None, bias, items, k), "does not fit"),
        ((x, torch.zeros(3, 33, 24), None, bias, items, k), "another ISA"),
        ((x, weight.transpose(0, 1), None, bias, items, k), "not contiguous"),
        ((x, weight, None, bias[:9], items, k), "bias"),
        ((x, weight, None, bias, items, 76), "k is 0 to out_features"),
        ((x, weight, None, bias, items, -1), "k is 0 to out_features"),
        ((x, weight, scale, bias, items, k), "a weight of int8 has a scale"),
        ((x, weight.char(), None, bias, items, k), "a weight of int8 has a scale"),
        ((x, weight.half(), None, bias, items, k), "another dtype"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            cpp.call(PACKED_SCORE_TOPK, *args, isa=isa)


def test_both_references_agree() -> None:
    for plain, over_panels in zip(
        SCORE_TOPK.cases, PACKED_SCORE_TOPK.cases, strict=False
    ):  # those of float32 come first
        theirs = results(PACKED_SCORE_TOPK.reference(*over_panels.build(1)))
        for ours, other in zip(results(SCORE_TOPK.reference(*plain.build(1))), theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCORE_TOPK.cases, ids=lambda case: case.name)
def test_items_of_fewer_bits_score_as_a_quantised_linear_does(case: Case, dtype: torch.dtype, isa: str) -> None:
    given = packed(case.build(7), isa, dtype)
    x, weight, scale, bias, count, k = given
    got, items = cpp.call(PACKED_SCORE_TOPK, *given, isa=isa)
    scores = QUANTISED_LINEAR.reference(x, weight, scale, bias, None, None, count, 0)
    assert got.shape == items.shape == (*x.shape[:-1], k)
    torch.testing.assert_close(got, scores.topk(k).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, scores.gather(-1, items), rtol=1e-5, atol=1e-5)
    assert (items.sort().values.diff() > 0).all()


def test_a_row_of_nan_ranks_nan_in_fewer_bits_too(isa: str) -> None:
    x, *rest = arguments(0, (3, 12), 400, 4)
    x[1, 5] = torch.nan
    values, items = cpp.call(PACKED_SCORE_TOPK, *packed((x, *rest), isa, torch.int8), isa=isa)
    assert values.isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4] and items[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("rows", "items", "k"), [(1, 20_000, 100), (49, 3000, 10)])
def test_items_of_int8_split_over_threads(isa: str, threads: int, rows: int, items: int, k: int) -> None:
    """Scores are exact, ties among them: 127 at the end of every row of both makes each step a whole number."""
    x, weight, bias, k = whole_numbers(rows, rows, 29, items, k)
    weight[:, 0], x[:, 0], x[:, 1] = 127.0, 127.0, -128.0
    scores, order = nn.functional.linear(x, weight, bias).sort(descending=True, stable=True)
    got, chosen = cpp.call(PACKED_SCORE_TOPK, *packed((x, weight, bias, k), isa, torch.int8), isa=isa)
    assert torch.equal(chosen, order[:, :k]) and torch.equal(got, scores[:, :k])


def test_cost_counts_each_operand_once() -> None:
    values = arguments(0, (2, 3, 10), 20, 4, bias=True)
    for counted in (SCORE_TOPK.cost(*values), PACKED_SCORE_TOPK.cost(*packed(values))):  # type: ignore[misc]
        assert counted.flops == 2 * 6 * 10 * 20
        assert counted.bytes == 4 * (6 * 10 + 10 * 20 + 20 + 6 * 4) + 8 * 6 * 4


def test_schema_and_kernel_agree_on_the_c_signature() -> None:
    source = " ".join(PACKED_SCORE_TOPK.cpu.read_text().split())  # type: ignore[union-attr]
    assert " ".join(cpp.declaration(PACKED_SCORE_TOPK.schema).split()) in source


class Retrieval(nn.Module):
    """Scores of all items, `change`d, and the best five: the table is read by a look-up too."""

    def __init__(self, change: Callable[..., Tensor], best: Callable[[Tensor], Any] = lambda s: s.topk(5)) -> None:
        super().__init__()
        self.items = nn.Embedding(60, 8)
        self.change, self.best = change, best
        self.register_buffer("hidden", torch.arange(60) % 9 == 0)

    def forward(self, ids: Tensor) -> Any:
        user = self.items(ids).mean(1)
        return tuple(self.best(self.change(self, user @ self.items.weight.t(), user)))


def history(batch: int) -> tuple[Tensor]:
    return (torch.randint(0, 60, (batch, 4), generator=torch.Generator().manual_seed(batch)),)


def traced(model: nn.Module) -> Source:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        nn.init.normal_(model.items.weight)
    return capture(from_module(model.eval(), history))


def optimised(source: Source) -> tuple[torch.fx.GraphModule, Record]:
    proof = Proof([source.inputs(batch) for batch in source.proof_batches()]).prepare(source.graph)
    graph, records = run_passes(source.graph, pipeline(Options(), FUSIONS), proof, strict=True)
    return graph, next(record for record in records if record.name == "fuse")


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def set_column(_: Any, scores: Tensor, user: Tensor) -> Tensor:
    scores[:, 0] = -INF
    return scores


def set_columns(_: Any, scores: Tensor, user: Tensor) -> Tensor:
    scores[:, [0, 7]] = -INF
    return scores


CHANGES: dict[str, Callable[..., Tensor]] = {
    "as they are": lambda m, s, u: s,
    "masked_fill": lambda m, s, u: s.masked_fill(m.hidden, -INF),
    "where": lambda m, s, u: torch.where(~m.hidden, s, -INF),
    "added": lambda m, s, u: s + torch.where(m.hidden, -INF, 0.0),
    "cat": lambda m, s, u: torch.cat([torch.full_like(s[:, :2], -INF), s[:, 2:]], 1),
    "column": set_column,
    "columns": set_columns,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fuses_once(change: Callable[..., Tensor]) -> None:
    source = traced(Retrieval(change))
    graph, record = optimised(source)
    assert [c.what for c in record.made] == ["score-topk"] and not record.missed
    assert record.made[0].where.startswith("test_score_topk.py:")
    assert calls(graph).count("grc.score_topk.default") == 1
    assert not {"aten.topk.default", "aten.linear.default"} & set(calls(graph))
    assert Fuse(FUSIONS).run(copy_graph(graph)) == []
    for target in ("avx512", "avx2"):
        lowered = calls(pack_linears(graph, target))
        assert lowered.count("grc.packed_score_topk.default") == 1 and "grc.score_topk.default" not in lowered
    inputs = source.inputs(6)
    for ours, theirs in zip(pack_linears(graph, cpp.target_isa())(*inputs), source.graph(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Unseen(nn.Module):
    """Retrieval of what is not in the request's own history, hidden in one of the usual ways."""

    def __init__(self, hide: Callable[[Tensor, Tensor], Tensor], k: int):
        super().__init__()
        self.items, self.hide, self.k = nn.Embedding(60, 12), hide, k

    def forward(self, ids: Tensor) -> Any:
        return tuple(self.hide(self.items(ids).mean(1) @ self.items.weight.t(), ids).topk(self.k))


def put(scores: Tensor, ids: Tensor) -> Tensor:
    scores[torch.arange(len(ids)).unsqueeze(1), ids] = -INF
    return scores


def padding_too(scores: Tensor, ids: Tensor) -> Tensor:
    scores[:, 0] = -INF
    return scores.scatter(-1, ids, -INF)


HIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scatter": lambda s, ids: s.scatter(1, ids, -INF),
    "in place": lambda s, ids: s.scatter_(1, ids, torch.finfo(s.dtype).min),
    "a source": lambda s, ids: s.scatter(1, ids, torch.full_like(ids, -INF, dtype=s.dtype)),
    "index": put,
    "padding too": padding_too,
}


@pytest.mark.parametrize("k", [10, 55])
@pytest.mark.parametrize("hide", HIDES.values(), ids=HIDES)
def test_what_the_user_has_seen_is_left_out(hide: Callable[[Tensor, Tensor], Tensor], k: int) -> None:
    source = traced(Unseen(hide, k))
    graph, record = optimised(source)
    assert [c.what for c in record.made if c.what == "score-topk"] == ["score-topk"]
    assert not {"aten.scatter.value", "aten.index_put.default", "aten.linear.default"} & set(calls(graph))
    for batch in (1, 6):
        (values, items), (wanted, places) = graph(*source.inputs(batch)), source.graph(*source.inputs(batch))
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(items, places)


def test_only_ids_are_read() -> None:
    class Ids(Unseen):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)[1]

    source = traced(Ids(HIDES["scatter"], 5))
    graph, _ = optimised(source)
    assert calls(graph).count("grc.score_topk.default") == 1
    assert torch.equal(graph(*source.inputs(6))[0], source.graph(*source.inputs(6))[0])


def plain(m: Any, s: Tensor, u: Tensor) -> Tensor:
    return s


MISSES = {
    "the items are not a constant of the model": Retrieval(
        lambda m, s, u: nn.functional.linear(u, m.items.weight * u.mean())
    ),
    "the scores are changed by more than -inf for fixed items": Retrieval(
        lambda m, s, u: s.masked_fill(m.hidden, -9.0)
    ),
    "which items are hidden depends on the request": Retrieval(lambda m, s, u: torch.where(u[:, :1] > 0, s, -INF)),
    "items of the request are not hidden by -inf, which alone no score is below": Retrieval(
        lambda m, s, u: s.scatter(1, (u[:, :1] > 0).long(), -9.0)
    ),
    "of 60 items 56 may be left to show, fewer than 57": Unseen(HIDES["scatter"], 57),
    "aten.scatter_add.default stands between the scores and the top-k": Retrieval(
        lambda m, s, u: s.scatter_add(1, (u[:, :1] > 0).long(), u[:, :1])
    ),
    "aten.sigmoid.default stands between the scores and the top-k": Retrieval(lambda m, s, u: s.sigmoid()),
    "the scores are read outside of the top-k too": Retrieval(plain, lambda s: (*s.topk(5), s.logsumexp(1))),
    "the top-k takes the smallest scores": Retrieval(plain, lambda s: s.topk(5, largest=False)),
    "the top-k is along dimension 0, not along the items": Retrieval(plain, lambda s: s.topk(1, dim=0)),
    "the top-k leaves its result unsorted: only the order of sorted=True is defined": Retrieval(
        plain, lambda s: s.topk(60, sorted=False)
    ),
}


@pytest.mark.parametrize("reason", MISSES)
def test_says_why_not(reason: str) -> None:
    graph, record = optimised(traced(MISSES[reason]))
    assert [c.missed for c in record.missed if c.what == "score-topk"] == [reason]
    assert "aten.topk.default" in calls(graph) and not record.made


@pytest.mark.engine
def test_answers_inside_a_package(tmp_path: Path) -> None:
    source = traced(Retrieval(set_column))
    graph, _ = optimised(source)
    lowerable = Lowerable(graph, source.inputs(5), source.shapes())
    built = Inductor(packed=True).build(lowerable, Target("cpu", cpp.target_isa(), 2), tmp_path)
    loader = torch._C._aoti.AOTIModelPackageLoader(str(tmp_path / built.file), "model", False, 1, -1)
    loader.load_constants(built.constants, False, False, True)
    for batch in (1, 3, 70):
        values, items = loader.boxed_run(source.inputs(batch))
        expected, theirs = source.graph(*source.inputs(batch))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(items, theirs)
