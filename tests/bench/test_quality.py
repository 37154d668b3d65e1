"""Which answers may have a time."""

from __future__ import annotations

import torch

from grc.bench.quality import Quality, fault, judge

SCORES = torch.randn(3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXACT = Quality(1e-7, 1.0)


def test_a_right_answer_has_no_fault():
    quality = judge([SCORES.float()], [SCORES])
    assert quality.max_error < 1e-6
    assert quality.overlap100 == 1.0
    assert fault(quality, EXACT) is None


def test_a_wrong_answer_is_refused_with_its_error():
    quality = judge([SCORES.float() + 0.1], [SCORES])
    assert quality.overlap100 == 1.0
    assert "error" in (fault(quality, EXACT) or "")


def test_an_answer_of_another_shape_is_refused():
    quality = judge([SCORES[:2]], [SCORES])
    assert quality.max_error == float("inf")
    assert fault(quality, EXACT)


def test_wrong_ids_are_refused_though_the_scores_agree():
    best = torch.topk(SCORES, 100)
    shifted = (best.indices + 400) % 800
    quality = judge([best.values, shifted], [best.values, best.indices])
    assert quality.max_error == 0
    assert quality.overlap100 == 0
    assert fault(quality, EXACT) == "shares 0% of the best ids"


def test_the_order_of_ids_is_free_but_not_which_they_are():
    best = torch.topk(SCORES, 100)
    quality = judge([best.values, best.indices.flip(1)], [best.values, best.indices])
    assert quality.overlap100 == 1.0
    one_lost = best.indices.clone()
    one_lost[:, 99] = 1000
    quality = judge([best.values, one_lost], [best.values, best.indices])
    assert abs((quality.overlap100 or 0) - 0.99) < 1e-9
    assert fault(quality, EXACT) is None


def test_overlap_is_none_without_scores_or_ids():
    click = torch.rand(5, dtype=torch.float64)
    assert judge([click.float()], [click]).overlap100 is None


def test_flags_are_held_to_equality():
    flags = torch.tensor([True, False, True, True])
    assert fault(judge([flags], [flags]), EXACT) is None
    assert "integers differ" in (fault(judge([~flags], [flags]), EXACT) or "")
