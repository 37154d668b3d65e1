"""Budgets as they are written, and metrics against what their definitions give."""

from __future__ import annotations

import math

import pytest
import torch

from grc.errors import GrcError
from grc.precision.quality import Limit, Truth, auc, budget, integers_error, ndcg, overlap, worst


def test_budgets_are_read_as_they_are_written() -> None:
    assert budget(["max-error=0.01", "topk-overlap@100=0.99", "auc-drop=1e-3", "ndcg-drop@10=0.005"]) == (
        Limit("max-error", None, 0.01),
        Limit("topk-overlap", 100, 0.99),
        Limit("auc-drop", None, 0.001),
        Limit("ndcg-drop", 10, 0.005),
    )
    assert budget([]) == (Limit("max-error", None, 0.02),)
    assert [str(limit) for limit in budget(["ndcg-drop@10=0.005"])] == ["ndcg-drop@10=0.005"]


NO_LIMITS = (
    *("", "max-error", "max-error=", "max-error=x", "max-error=-1", "max-error=2", "max-error=nan", "max-error@5=0.1"),
    *("topk-overlap=0.9", "auc-drop@3=0.1", "recall@5=0.1", "topk-overlap@0=0.5", "ndcg-drop@0=0.1"),
)


@pytest.mark.parametrize("text", NO_LIMITS)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(GrcError) as refused:
        budget([text])
    assert refused.value.message == f"{text!r} is no limit of quality"
    assert refused.value.hint is not None and refused.value.hint.startswith("write --budget max-error=0.02")


def test_what_is_lost_is_a_share_of_what_may_be() -> None:
    assert Limit("max-error", None, 0.02).lost(0.005) == pytest.approx(0.25)
    assert Limit("topk-overlap", 10, 0.9).lost(0.95) == pytest.approx(0.5)
    assert Limit("auc-drop", None, 0.001).lost(-0.1) == 0.0
    assert Limit("max-error", None, 0.0).lost(1e-9) == math.inf
    assert not Limit("max-error", None, 0.02).inside(math.nan)


def test_auc_counts_pairs_and_halves_ties() -> None:
    scores, labels = torch.randint(0, 9, (60,)).double(), torch.randint(0, 2, (60,))
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    want = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    assert auc(scores, labels) == pytest.approx(float(want))
    with pytest.raises(GrcError, match="the labels of the calibration data are all alike"):
        auc(scores, torch.ones(60))


def test_ndcg_is_the_discount_of_the_one_relevant_item() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9], [0.2, 0.3, 0.1]]).double()
    assert ndcg(scores, torch.tensor([0, 0, 0]), 2) == pytest.approx((1 + 0 + 1 / math.log2(3)) / 3)


@pytest.mark.parametrize("label", [3.0, -1.0, 0.5, float("nan")])
def test_ndcg_takes_numbers_of_items(label: float) -> None:
    with pytest.raises(GrcError, match="ndcg-drop takes items, 0 to 2"):
        ndcg(torch.rand(2, 3), torch.tensor([0.0, label]), 2)


def test_overlap_is_of_the_ranking_that_changed_most() -> None:
    truth = [[torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[7, 8, 9]])]]
    same, swapped = [[torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[8, 7, 1]])]], [[truth[0][0], truth[0][1]]]
    assert overlap(truth, swapped, 2) == 1.0
    assert overlap(truth, same, 2) == 1.0 and overlap(truth, same, 3) == pytest.approx(2 / 3)
    with pytest.raises(GrcError, match="no output ranks 9 items"):
        overlap(truth, same, 9)


@pytest.mark.parametrize("limit", ["auc-drop=0.1", "ndcg-drop@2=0.1"])
def test_every_row_needs_a_label(limit: str) -> None:
    truth = Truth([[torch.zeros(3, 5), torch.zeros(3)]], [torch.tensor([0, 1])])
    with pytest.raises(GrcError, match="the calibration data has 2 labels for 3 rows"):
        truth.measure(truth.answers, budget([limit]))


def test_errors_are_relative_to_each_output_and_nan_is_never_inside() -> None:
    truth = Truth([[torch.tensor([0.001, 0.002]), torch.tensor([100.0])]])
    (limit,) = budget([])
    assert truth.one(limit, [[torch.tensor([0.001, 0.0021]), torch.tensor([100.0])]]) == pytest.approx(0.05, rel=1e-4)
    assert truth.one(limit, [[torch.tensor([0.001, torch.nan]), torch.tensor([100.0])]]) == math.inf


def test_scores_beside_items_masked_with_infinity_are_held_to_the_largest_of_them() -> None:
    truth = Truth([[torch.tensor([[0.01, 0.02, -torch.inf], [0.01, torch.nan, 0.0]])]])
    (limit,) = budget([])
    moved = torch.tensor([[0.01, 0.021, -torch.inf], [0.01, torch.nan, 0.0]])
    assert truth.one(limit, [[moved]]) == pytest.approx(0.05, rel=1e-4)


def test_metrics_that_no_output_has_are_named() -> None:
    truth = Truth([[torch.zeros(3, 5)]], [torch.tensor([1, 0, 1])])
    with pytest.raises(GrcError, match="no output holds one score a row, which auc-drop is about"):
        truth.measure(truth.answers, budget(["auc-drop=0.1"]))


def error(got: list, want: list, *limits: str) -> float:
    """max-error of one output of whole numbers, in a budget."""
    truth = Truth([[torch.tensor(want)]])
    return truth.measure([[torch.tensor(got)]], budget(["max-error=0.02", *limits]))["max-error"]


def test_ranked_ids_that_are_lost_or_change_places_are_errors() -> None:
    assert error([[7, 8, 9]], [[7, 8, 9]]) == 0.0
    assert error([[7, 8, 1]], [[7, 8, 9]]) == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert error([[8, 7, 9]], [[7, 8, 9]]) == pytest.approx(
        (1 + 0 + 0) / 3
    )  # all the same ids: a sort is an output too
    assert error([[9, 7, 8]], [[7, 8, 9]]) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert error([[1, 2, 3], [7, 8, 9]], [[4, 5, 6], [7, 8, 9]]) == 0.5
    # where topk-overlap is about them it alone is, and it is not about fewer than K
    assert error([[1, 2, 3]], [[7, 8, 9]], "topk-overlap@3=0.5") == 0.0
    batch = [[torch.tensor([[1, 2, 3]]), torch.rand(1, 9)]]
    assert integers_error(batch, [[torch.tensor([[7, 8, 9]]), batch[0][1]]], 9) == 1.0


def test_ranked_ids_are_compared_as_the_definition_has_it() -> None:
    make = torch.Generator().manual_seed(3)
    a, t = (torch.stack([torch.randperm(30, generator=make)[:12] for _ in range(8)]) for _ in range(2))
    want = [1 - len(set(a[b, :k].tolist()) & set(t[b, :k].tolist())) / k for b in range(8) for k in range(1, 13)]
    assert integers_error([[a]], [[t]]) == pytest.approx(sum(want) / len(want))
    assert integers_error([[t]], [[t]]) == 0.0


def test_other_whole_numbers_are_errors_where_they_differ() -> None:
    assert error([3, 1, 2, 2], [3, 1, 2, 0]) == 0.25
    assert error([[0, 1, 0, 1]], [[1, 0, 1, 0]]) == 1.0
    assert error([[True, False]], [[True, True]]) == 0.5


def test_ndcg_finds_a_label_by_its_id_where_ids_are_beside_scores() -> None:
    """The scores of a top-k fall in every row: by their columns alone nothing could be lost."""
    values, labels = torch.tensor([[0.9, 0.5], [0.8, 0.1]]), [torch.tensor([70, 40])]
    truth = Truth([[values, torch.tensor([[70, 3], [5, 40]])]], labels)
    (limit,) = budget(["ndcg-drop@2=0.1"])
    assert truth.one(limit, truth.answers) == 0.0
    lost = truth.one(limit, [[values, torch.tensor([[3, 70], [5, 6]])]])
    assert lost == pytest.approx((1 - 1 / math.log2(3) + 1 / math.log2(3)) / 2)
    assert truth.unbounded([limit]) == []
    told = "ndcg-drop@2=0.1 bounds nothing: no label is among the 2 best of its row"
    assert Truth(truth.answers, [torch.tensor([1, 2])]).unbounded([limit]) == [told]
    with pytest.raises(GrcError, match="has the label -1; ndcg-drop takes ids of items"):
        Truth(truth.answers, [torch.tensor([-1, 2])]).one(limit, truth.answers)


def test_no_metric_takes_nan_for_a_score() -> None:
    truth = Truth([[torch.tensor([[0.9, 0.5], [0.8, 0.1]])]], [torch.tensor([0, 1])])
    limits = budget(["ndcg-drop@1=0.1", "topk-overlap@1=0.5"])
    found = truth.measure([[torch.full((2, 2), torch.nan)]], limits)
    assert found == {"ndcg-drop@1": math.inf, "topk-overlap@1": 0.0}


def test_the_worst_of_engines_is_taken_limit_by_limit() -> None:
    limits = budget(["auc-drop=0.1", "topk-overlap@1=0.5"])
    engines = [{"auc-drop": -0.2, "topk-overlap@1": 0.9}, {"auc-drop": -0.1, "topk-overlap@1": 1.0}]
    assert worst(limits, engines) == {"auc-drop": -0.1, "topk-overlap@1": 0.9}
