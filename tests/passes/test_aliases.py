"""Other names of operators: every way of writing ends in the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grc.passes.aliases import ALIASES, COMPOSITE
from grc.passes.normalise import Normalise
from tests.passes.small import graph_of, rows, run

PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "concat": (lambda x, w: torch.concat([x, x * 2], 1), lambda x, w: torch.cat([x, x * 2], 1)),
    "concatenate": (lambda x, w: torch.concatenate([x, x * 2], 1), lambda x, w: torch.cat([x, x * 2], 1)),
    "hstack": (lambda x, w: torch.hstack([x, x * 2]), lambda x, w: torch.cat([x, x * 2], 1)),
    "column_stack": (lambda x, w: torch.column_stack([x, x * 2]), lambda x, w: torch.cat([x, x * 2], 1)),
    "vstack": (lambda x, w: torch.vstack([x, x * 2]), lambda x, w: torch.cat([x, x * 2], 0)),
    "subtract": (lambda x, w: torch.subtract(x.sin(), x), lambda x, w: x.sin() - x),
    "multiply": (lambda x, w: torch.multiply(x.sin(), x), lambda x, w: x.sin() * x),
    "divide": (lambda x, w: torch.divide(x, x.exp()), lambda x, w: x / x.exp()),
    "rounded divide": (lambda x, w: torch.divide(x, 3, rounding_mode="floor"), lambda x, w: torch.floor_divide(x, 3)),
    "absolute": (lambda x, w: torch.absolute(torch.negative(x)), lambda x, w: torch.abs(-x)),
    "clip": (lambda x, w: torch.clip(x, min=0.5), lambda x, w: torch.clamp(x, min=0.5)),
    "expit": (lambda x, w: torch.special.expit(x), lambda x, w: torch.sigmoid(x)),
    "not_equal": (lambda x, w: torch.not_equal(x, 0.5), lambda x, w: x != 0.5),
    "inner": (lambda x, w: torch.inner(x, w), lambda x, w: torch.nn.functional.linear(x, w)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([1], [1])), lambda x, w: torch.nn.functional.linear(x, w)),
    "tensordot of rows": (lambda x, w: torch.tensordot(x, w.t(), dims=1), lambda x, w: x @ w.t()),
    "vecdot": (lambda x, w: torch.linalg.vecdot(x, x.sin()), lambda x, w: (x * x.sin()).sum(-1)),
    "swapaxes": (lambda x, w: x.swapaxes(0, 1), lambda x, w: x.transpose(0, 1)),
}


def normalised(function: Callable[..., Tensor]) -> tuple[list[str], Tensor]:
    """The operators of a model after the pass, and its answer."""
    inputs = (rows(4, 6),)
    graph = graph_of(lambda self, x: function(x, self.layer.weight), *inputs, layer=nn.Linear(6, 5))
    run(graph, [Normalise()], inputs)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return names, graph(*inputs)[0]


@pytest.mark.parametrize("name", PAIRS)
def test_another_name_is_the_same_graph(name: str) -> None:
    torch.manual_seed(0)
    other, usual = PAIRS[name]
    names, answer = normalised(other)
    wanted, expected = normalised(usual)
    if name != "rounded divide":
        assert names == wanted
    assert not any(str(alias).removeprefix("aten.") in n for alias in (*ALIASES, *COMPOSITE) for n in names)
    assert answer.shape == expected.shape


def test_aliases_take_the_arguments_of_what_they_stand_for() -> None:
    for alias, packet in ALIASES.items():
        both = [name for name in alias.overloads() if name in packet.overloads() and "out" not in name]
        assert both, alias
        for name in both:
            taken, wanted = (arguments(getattr(p, name)) for p in (alias, packet))
            assert taken == wanted, (alias, name)


def arguments(overload: Any) -> list[tuple[str, str]]:
    return [(str(argument.type), str(argument.default_value)) for argument in overload._schema.arguments]
