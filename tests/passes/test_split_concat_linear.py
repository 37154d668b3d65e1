"""Target attention's first layer, split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from grc.compiler import as_model, optimise, traced
from grc.graph.match import aten, is_op
from grc.options import Options
from grc.passes.normalise import Normalise
from grc.passes.split_concat_linear import SplitConcatLinear
from grc.progress import Silent

STEPS, WIDTH = 5, 8


class Layer(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.join = join
        self.linear = nn.Linear(width, 12, dtype=dtype)

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        return self.linear(self.join(history, target).to(self.linear.weight.dtype)).float()


def split(
    join: Callable[[Tensor, Tensor], Tensor], width: int, **options: torch.dtype
) -> tuple[fx.GraphModule, list, list]:
    """The graph, what was split, and why what wasn't; proven, and with nothing left for a second run."""

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        make = torch.Generator().manual_seed(batch)
        return torch.randn(batch, STEPS, WIDTH, generator=make), torch.randn(batch, WIDTH, generator=make)

    torch.manual_seed(0)
    source = traced(as_model(Layer(join, width, **options).eval(), inputs), Silent())
    passes = [Normalise(), SplitConcatLinear(), SplitConcatLinear()]
    done = optimise(source, Options(strict=True), Silent(), passes)
    _, first, second = done.records
    assert not second.made
    return done.graph, [c.saves for c in first.made], [c.missed for c in first.missed]


def widths(graph: fx.GraphModule) -> list[int]:
    return [n.args[0].meta["val"].shape[-1] for n in graph.graph.nodes if is_op(n, aten.linear)]


def din(history: Tensor, target: Tensor) -> Tensor:
    t = target.unsqueeze(1).expand_as(history)
    return torch.cat([t, history, t - history, t * history], -1)


def deepctr(history: Tensor, target: Tensor) -> Tensor:
    t = target.unsqueeze(1).repeat(1, STEPS, 1)
    return torch.cat([history, t, history - t, history * t], -1)


def two_towers(history: Tensor, target: Tensor) -> Tensor:
    user = history.sum(1)
    return torch.cat([user, target, user - target, user * target], -1)


def test_splits_target_attention() -> None:
    graph, saved, missed = split(din, 4 * WIDTH)
    assert (saved, missed) == (["16 of 32 columns"], [])
    assert sorted(widths(graph)) == [8, 16]
    assert any(is_op(n, aten.linear) and n.meta["val"].shape[1] == 1 for n in graph.graph.nodes)


def test_splits_what_is_not_broadcast() -> None:
    graph, saved, _ = split(two_towers, 4 * WIDTH)
    assert saved == ["8 of 32 columns"] and widths(graph) == [24]


def test_splits_a_difference_that_broadcasts() -> None:
    graph, saved, _ = split(lambda h, t: torch.cat([h, t.unsqueeze(1) - h, -h], -1), 3 * WIDTH)
    assert saved == ["16 of 24 columns"] and sorted(widths(graph)) == [8, 8]


@pytest.mark.parametrize(
    "join",
    [
        lambda h, t: torch.cat([h, h * t.unsqueeze(1)], -1),
        lambda h, t: torch.cat([h.sum(1), h.sum(1) - t], -1),
    ],
)
def test_leaves_what_is_there_once(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert split(join, 2 * WIDTH)[1:] == ([], [])


def test_splits_layers_in_bfloat16() -> None:
    def narrow(history: Tensor, target: Tensor) -> Tensor:
        return din(history.bfloat16(), target.bfloat16())

    graph, saved, missed = split(narrow, 4 * WIDTH, dtype=torch.bfloat16)
    assert (saved, missed) == (["16 of 32 columns"], [])
    kept = [n.meta["val"].dtype for n in graph.graph.nodes if is_op(n, aten.linear)]
    assert kept == [torch.bfloat16] * 2


def test_splits_steps_that_are_written_as_rows() -> None:
    graph, saved, missed = split(lambda h, t: din(h, t).view(-1, 4 * WIDTH), 4 * WIDTH)
    assert (saved, missed) == (["16 of 32 columns"], []) and sorted(widths(graph)) == [8, 16]


def test_repeated_targets_are_multiplied_once() -> None:
    graph, saved, _ = split(deepctr, 4 * WIDTH)
    assert saved and sorted(widths(graph)) == [8, 16]


def test_splits_differences_of_rows_that_are_repeated_flat() -> None:
    def flat(history: Tensor, target: Tensor) -> Tensor:
        t, h = target.repeat_interleave(STEPS, 0), history.reshape(-1, WIDTH)
        return torch.cat([h, t - h, t * h], -1)

    graph, saved, missed = split(flat, 3 * WIDTH)
    assert (saved, missed) == (["8 of 24 columns"], []) and sorted(widths(graph)) == [8, 16]


@pytest.mark.parametrize(
    "repeated",
    [
        lambda one: one.expand(-1, STEPS, WIDTH),
        lambda one: one.expand(-1, STEPS, -1).expand(-1, -1, WIDTH),
        lambda one: one.expand(-1, STEPS, WIDTH).reshape(-1, WIDTH),
    ],
    ids=["at once", "steps first", "flat"],
)
def test_leaves_a_number_that_is_repeated_along_the_width(repeated: Callable[[Tensor], Tensor]) -> None:
    def join(history: Tensor, target: Tensor) -> Tensor:
        t = repeated(target[:, None, :1])
        return torch.cat([t, history.view(*t.shape)], -1)

    assert split(join, 2 * WIDTH)[1:] == ([], [])
