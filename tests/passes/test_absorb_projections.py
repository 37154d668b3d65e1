"""One query over a history: the projections of every step move to the query and to the result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grc.graph.match import is_op, shape
from grc.kernels import FUSIONS
from grc.passes.absorb_projections import AbsorbProjections
from grc.passes.fuse import Fuse
from grc.passes.needed_rows import NeededRows
from grc.passes.normalise import Normalise
from tests.passes.small import graph_of, rows, run

STEPS, WIDTH, HIDDEN = 40, 12, 16
PASSES = [Normalise(), Fuse(FUSIONS), NeededRows(), AbsorbProjections()]


def absorbed(function: Any, *inputs: Tensor, **modules: Any) -> tuple[list[tuple[int, int]], list[str], list[str]]:
    """Queries and heads of every attention, the layers that are still applied to all steps, and why one stayed."""
    torch.manual_seed(0)
    for module in modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    graph = graph_of(function, *inputs, **modules)
    changes = [change for change in run(graph, PASSES, inputs) if change.what == "absorbed projections"]
    calls = [tuple(shape(n.args[0])[1:3]) for n in graph.graph.nodes if is_op(n, torch.ops.grc.attention)]
    over = [n.name for n in graph.graph.nodes if is_op(n, torch.ops.aten.linear) and STEPS in shape(n)]
    return calls, over, [change.missed for change in changes if change.missed is not None]


def layers(bias: bool = False, out: bool = True) -> dict[str, nn.Module]:
    made = {name: nn.Linear(WIDTH, HIDDEN, bias=bias) for name in ("q", "k", "v")}
    return made | ({"o": nn.Linear(HIDDEN, WIDTH, bias=bias)} if out else {})


def attend(self: Any, target: Tensor, history: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head target attention as FuxiCTR writes it."""
    split = (target.shape[0], -1, heads, HIDDEN // heads)
    q, k, v = (f(x).view(split).transpose(1, 2) for f, x in ((self.q, target), (self.k, history), (self.v, history)))
    scores = q @ k.transpose(-1, -2) / (HIDDEN // heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, HIDDEN)


def seen(batch: int, *sizes: int) -> Tensor:
    return (rows(batch, *sizes) > -0.5).float()


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("heads", [1, 4])
def test_target_attention(heads: int, bias: bool) -> None:
    calls, over, missed = absorbed(
        lambda self, t, h, m: self.o(attend(self, t, h, heads, m[:, None, None])),
        rows(3, WIDTH), rows(3, STEPS, WIDTH), seen(3, STEPS), **layers(bias),
    )  # fmt: skip
    assert (calls, over, missed) == ([(heads, 1)], [], [])


def test_masks_of_heads_are_masks_of_queries() -> None:
    calls, over, _ = absorbed(
        lambda self, t, h, m: self.o(attend(self, t, h, 4, m)),
        rows(3, WIDTH), rows(3, STEPS, WIDTH), seen(3, 4, 1, STEPS), **layers(),
    )  # fmt: skip
    assert (calls, over) == ([(4, 1)], [])


def test_a_query_that_is_no_layer_and_a_result_that_many_read() -> None:
    calls, over, _ = absorbed(
        lambda self, t, h: (lambda y: torch.cat([y, y.relu()], 1))(
            attend(SimpleNamespace(q=torch.sin, k=self.k, v=self.v), t, h, 2)
        ),
        rows(3, HIDDEN), rows(3, STEPS, WIDTH), **{name: layers(True)[name] for name in ("k", "v")},
    )  # fmt: skip
    assert (calls, over) == ([(2, 1)], [])


def test_the_last_step_of_a_transformer_layer() -> None:
    def last(self: Any, x: Tensor) -> Tensor:
        return (x + self.attention(x, x, x, need_weights=False)[0])[:, -1]

    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    calls, over, missed = absorbed(last, rows(3, STEPS, WIDTH), attention=attention)
    assert (calls, over, missed) == ([(2, 1)], [], [])


def test_a_bias_of_values_beside_masks_that_hide_all_keys() -> None:
    def ask(self: Any, t: Tensor, h: Tensor, m: Tensor) -> Tensor:
        split = [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f, x in ((self.q, t), (self.k, h), (self.v, h))]
        return self.o(functional.scaled_dot_product_attention(*split, attn_mask=m > 0).transpose(1, 2).flatten(2))

    inputs = (
        rows(3, 1, WIDTH),
        rows(3, STEPS, WIDTH),
        seen(3, 1, 1, STEPS) * torch.tensor([1.0, 0, 1])[:, None, None, None],
    )
    calls, over, missed = absorbed(ask, *inputs, **layers(True))
    assert calls == [(1, 2)] and len(over) == 2
    assert missed == ["values have a bias, which a query that sees no key does not get"]
    calls, over, missed = absorbed(ask, *inputs, **layers(False))
    assert (calls, over, missed) == ([(2, 1)], [], [])


@pytest.mark.parametrize("way", ["many queries", "few steps", "keys read elsewhere"])
def test_what_gains_nothing_stays(way: str) -> None:
    steps = 2 if way == "few steps" else STEPS

    def ask(self: Any, t: Tensor, h: Tensor) -> Tensor:
        split = [f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f, x in ((self.q, t), (self.k, h), (self.v, h))]
        made = self.o(functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return made + self.k(h).sum() if way == "keys read elsewhere" else made

    target = rows(3, 9 if way == "many queries" else 1, WIDTH)
    calls, _, missed = absorbed(ask, target, rows(3, steps, WIDTH), **layers())
    assert calls[0][1] == 4 and missed == []
