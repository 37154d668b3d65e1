"""Batch norms in eval mode go into the linear layers beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grc.graph.match import aten, is_op
from grc.passes.normalise import Normalise
from tests.graph.filecheck import check
from tests.passes.small import graph_of, rows, run


def norm(width, **options):
    """A batch norm whose numbers are no ones and zeros."""
    made = nn.BatchNorm1d(width, **options)
    generator = torch.Generator().manual_seed(width)
    for tensor in (made.weight, made.bias, made.running_mean):
        if tensor is not None:
            tensor.data.normal_(generator=generator)
    made.running_var.uniform_(0.5, 2, generator=generator)
    return made


def folded(function, *inputs, **modules):
    """The graph after normalise, proven to answer as before."""
    torch.manual_seed(0)
    graph = graph_of(function, *inputs, **modules)
    run(graph, [Normalise()], inputs)
    return graph


def count(graph, *ops):
    return sum(is_op(node, *ops) for node in graph.graph.nodes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_after_a_layer_is_in_its_weights(bias, affine):
    graph = folded(
        lambda self, x: self.norm(self.layer(x)).relu(), rows(4, 3),
        layer=nn.Linear(3, 5, bias=bias), norm=norm(5, affine=affine),
    )  # fmt: skip
    check(
        graph, "CHECK: aten.linear(%inputs_0, %layer_normed_weight, %layer_normed_bias)\nCHECK-NEXT: aten.relu(%linear"
    )
    assert count(graph, aten._native_batch_norm_legit_no_training) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_before_layers_is_in_their_weights(bias):
    graph = folded(
        lambda self, x: self.a(y := self.norm(x)) * self.b(y), rows(4, 3),
        norm=norm(3), a=nn.Linear(3, 5, bias=bias), b=nn.Linear(3, 5),
    )  # fmt: skip
    check(
        graph,
        """
        CHECK: aten.linear(%inputs_0, %a_normed_weight, %a_normed_bias)
        CHECK: aten.linear(%inputs_0, %b_normed_weight, %b_normed_bias)
        CHECK-NOT: batch_norm
        """,
    )


def test_norms_on_both_sides_of_a_layer():
    graph = folded(
        lambda self, x: self.two(self.layer(self.one(x))), rows(4, 3), one=norm(3), layer=nn.Linear(3, 5), two=norm(5)
    )
    check(graph, "CHECK: aten.linear(%inputs_0, %layer_normed_weight\nCHECK-NOT: batch_norm")


def test_a_norm_over_the_steps_of_a_history_as_rows():
    """DIN's layers over each step are often written on `[B * S, D]`."""
    graph = folded(
        lambda self, x: self.norm(self.layer(x).view(-1, 5)).view(-1, 2, 5),
        rows(4, 2, 3),
        layer=nn.Linear(3, 5),
        norm=norm(5),
    )
    check(graph, "CHECK: aten.linear(%inputs_0, %layer_normed_weight\nCHECK-NOT: batch_norm")


KEPT = {
    "read before its norm too": lambda self, x: self.norm(y := self.layer(x)).sigmoid() * y,
    "a layer used twice": lambda self, x: self.norm(self.layer(x)) + self.layer(x + 1),
    "read by others than layers": lambda self, x: self.layer(y := self.before(x)).sum(1) + y.sum(1),
    "channels of three dimensions": lambda self, x: self.norm(self.layer(x).unsqueeze(2).expand(-1, -1, 3)),
}


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_a_norm_that_others_depend_on_stays(function):
    graph = folded(function, rows(4, 3), before=norm(3), layer=nn.Linear(3, 5), norm=norm(5))
    assert count(graph, aten._native_batch_norm_legit_no_training) == 1


def test_weights_that_would_overflow_stay():
    layer, after = nn.Linear(3, 5).half(), norm(5).half()
    layer.weight.data.fill_(60000.0)
    after.weight.data.fill_(100.0)
    graph = folded(lambda self, x: self.norm(self.layer(x)), rows(4, 3).half() * 1e-6, layer=layer, norm=after)
    assert count(graph, aten._native_batch_norm_legit_no_training) == 1
