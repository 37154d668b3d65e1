"""The factorisation machine against its contract."""

from __future__ import annotations

import pytest
import torch

from grc.errors import LoweringError
from grc.kernels import cpp
from grc.kernels.bag_fm import BAG_FM
from tests.kernels.contract import Contract, arguments


class TestBagFm(Contract):
    op = BAG_FM
    refused = "deepfm"


def test_second_order_term_is_the_sum_over_pairs() -> None:
    values = arguments(BAG_FM, next(case for case in BAG_FM.cases if case.name == "no linear term"))
    rows, fm = cpp.call(BAG_FM, *values.values())
    rows = rows.view(rows.shape[0], len(values["rows"]), values["dim"]).double()
    pairs = (rows @ rows.transpose(1, 2)).triu(1).sum((1, 2))
    torch.testing.assert_close(fm[:, 0].double(), pairs, rtol=1e-5, atol=1e-5)


def test_bi_interaction_adds_up_to_the_second_order_term() -> None:
    values = arguments(BAG_FM, next(case for case in BAG_FM.cases if case.name == "bi-interaction"))
    kept, wide = cpp.call(BAG_FM, *values.values())
    rows, fm = cpp.call(BAG_FM, *{**values, "summed": True}.values())
    unread, same = cpp.call(BAG_FM, *{**values, "keep": False}.values())
    assert torch.equal(kept, rows) and unread.shape == (len(rows), 0) and torch.equal(same, wide)
    torch.testing.assert_close(wide.sum(1, keepdim=True), fm, rtol=1e-5, atol=1e-4)


def test_refuses_linear_weights_beside_bi_interaction() -> None:
    values = {**arguments(BAG_FM, BAG_FM.cases[0]), "summed": False}
    with pytest.raises(RuntimeError, match="a linear term belongs to the sum over the width"):
        cpp.call(BAG_FM, *values.values())
    with pytest.raises(LoweringError, match="a linear term belongs to the sum over the width"):
        BAG_FM.reference(*values.values())


def test_refuses_linear_weights_that_do_not_fit() -> None:
    values = arguments(BAG_FM, BAG_FM.cases[0])
    with pytest.raises(RuntimeError) as refused:
        cpp.call(BAG_FM, *{**values, "linear": torch.zeros(5)}.values())
    assert str(refused.value) == "linear is [R] or [R, 1]"
