"""Linear layers of one input become one product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from grc.passes.merge_linears import MergeLinears
from grc.passes.normalise import Normalise
from tests.graph.filecheck import check
from tests.passes.small import graph_of, rows, run


def merged(function, *inputs, **modules):
    """The graph, proven, with nothing left for a second run, and what was merged."""
    torch.manual_seed(0)
    graph = graph_of(function, *inputs, **modules)
    changes = run(graph, [Normalise(), MergeLinears()], inputs)
    assert MergeLinears().run(graph) == []
    return graph, [change.what for change in changes if "linear layers" in change.what]


def layers(*widths, bias=True):
    return nn.ModuleList(nn.Linear(3, width, bias=bias) for width in widths)


@pytest.mark.parametrize(
    "activation", [lambda x: x, torch.relu, functional.gelu, torch.tanh], ids=["none", "relu", "gelu", "tanh"]
)
def test_experts_and_their_activations(activation):
    graph, made = merged(
        lambda self, x: torch.cat([activation(layer(x)) for layer in self.layers], 1).sum(1),
        rows(4, 3),
        layers=layers(5, 5, 2),
    )
    assert made == ["3 linear layers -> 1"]
    check(
        graph,
        "CHECK: aten.linear(%inputs_0, %layers_0_weight_and_2_more, %layers_0_weight_and_2_more_bias)\nCHECK-NOT: aten.linear",
    )


def test_layers_with_and_without_a_bias():
    graph, made = merged(
        lambda self, x: self.q(x).exp() + self.k(x).exp() + self.v(x).exp(), rows(4, 3),
        q=nn.Linear(3, 8), k=nn.Linear(3, 8, bias=False), v=nn.Linear(3, 8),
    )  # fmt: skip
    assert made == ["3 linear layers -> 1"]
    check(graph, "CHECK: %linear{{.*}} : float32[{{.*}}, 24] = aten.linear(\nCHECK-NOT: aten.linear")


def test_layers_over_steps_stay():
    made = merged(lambda self, x: [layer(x).exp() for layer in self.layers], rows(4, 6, 3), layers=layers(5, 5))[1]
    assert made == []


def test_layers_without_any_bias():
    graph, _ = merged(
        lambda self, x: [layer(x).exp() for layer in self.layers], rows(4, 3), layers=layers(5, 2, bias=False)
    )
    check(graph, "CHECK: aten.linear(%inputs_0, %layers_0_weight_and_1_more, None)")


def test_gates_beside_experts_are_a_product_of_their_own():
    """Softmax is no activation that a product ends with."""
    graph, made = merged(
        lambda self, x: [*(self.experts[i](x).relu() for i in (0, 1)), *(self.gates[i](x).softmax(1) for i in (0, 1))],
        rows(4, 3), experts=layers(5, 5), gates=layers(2, 2),
    )  # fmt: skip
    assert made == ["2 linear layers -> 1"] * 2
    check(graph, "CHECK-COUNT-2: aten.linear(")


KEPT = {
    "other inputs": lambda self, x: (self.layers[0](x).exp(), self.layers[1](x * 2).exp()),
    "other activations": lambda self, x: (self.layers[0](x).relu(), self.layers[1](x).tanh()),
    "sums as epilogues": lambda self, x: (self.layers[0](x) + x[:, :1], self.layers[1](x) * x[:, :1]),
    "a gate and what it gates": lambda self, x: self.layers[0](x) * self.layers[1](x).sigmoid(),
}


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_leaves(function):
    assert merged(function, rows(4, 3), layers=layers(5, 5))[1] == []


def test_layers_of_pairs_of_fields():
    """FiBiNET's bilinear interactions: of every two fields, and once more of the same fields weighed."""

    def forward(self, x):
        fields = [*x.split(1, 1)], [*(x * 2).split(1, 1)]
        pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
        return torch.cat([self.layers[at](e[i]) * e[j] for e in fields for at, (i, j) in enumerate(pairs)], 1)

    graph, made = merged(forward, rows(4, 5, 3), layers=layers(*[3] * 10))
    assert made == ["4 linear layers -> 1"] * 2, "of fewer layers the products with others are worth more"
    check(
        graph,
        "CHECK-COUNT-2: %layers_0_weight_and_3_more, %layers_0_weight_and_3_more_bias)\nCHECK-COUNT-14: aten.linear(",
    )


def test_a_large_weight_is_not_stored_twice(monkeypatch):
    def forward(self, x):
        return self.layers[0](x).exp(), self.layers[0](x + 1), self.layers[1](x).exp()

    assert merged(forward, rows(4, 3), layers=layers(5, 5))[1] == ["2 linear layers -> 1"]
    monkeypatch.setattr("grc.passes.merge_linears.SHARED", 14)
    assert merged(forward, rows(4, 3), layers=layers(5, 5))[1] == []


def test_wide_layers_stay(monkeypatch):
    monkeypatch.setattr("grc.passes.merge_linears.WIDEST", 4)
    assert merged(lambda self, x: [layer(x).exp() for layer in self.layers], rows(4, 3), layers=layers(5, 5))[1] == []


def test_a_layer_after_another_of_the_same_input_is_no_circle():
    _, made = merged(
        lambda self, x: self.layers[1](x).exp() * (first := self.layers[0](x).exp()).sum() + first,
        rows(4, 3),
        layers=layers(5, 5),
    )
    assert made == ["2 linear layers -> 1"]
