"""where: the line that a user would look at, in a model's own files and in a library's."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn

from grc.graph.capture import capture
from grc.graph.match import aten, is_op, source_text, where
from grc.graph.model_file import from_module
from tests.passes.small import rows

LIBRARY = """\
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def gate(self, x):
        return self.linear(x).sigmoid()

    def forward(self, x):
        return x * self.gate(x)


class Named(Layer):
    def forward(self, **given):
        return self.gate(given["x"])
"""


class Pairs(nn.Module):
    def products(self, t: Tensor) -> Tensor:
        return torch.bmm(t, t.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x.unsqueeze(2)).flatten(1)


class Calling(nn.Module):
    """A user's model around a library's layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return self.layer(x) + 1


@pytest.fixture
def library(tmp_path: Path) -> ModuleType:
    """A module as pip would install it."""
    file = tmp_path / "site-packages" / "layers.py"
    file.parent.mkdir()
    file.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("layers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(model: nn.Module, operator: object, kwargs: bool = False) -> fx.Node:
    """The node of an operator in the graph of a captured model."""
    graph = capture(from_module(model.eval(), lambda b: {"x": rows(b, 3)} if kwargs else (rows(b, 3),))).graph
    (found,) = (node for node in graph.graph.nodes if is_op(node, operator))
    return found


def test_the_method_that_computes_and_not_the_one_that_calls_it() -> None:
    line = inspect.getsourcelines(Pairs.products)[1] + 1
    node = made(Pairs(), aten.bmm)
    assert (where(node), source_text(node)) == (
        f"test_source_lines.py:{line}",
        "return torch.bmm(t, t.transpose(1, 2))",
    )


@pytest.mark.parametrize("operator", [aten.linear, aten.sigmoid, aten.mul])
def test_a_users_line_before_the_lines_of_the_library_it_calls(library: ModuleType, operator: object) -> None:
    line = inspect.getsourcelines(Calling.forward)[1] + 1
    node = made(Calling(library.Layer()), operator)
    assert (where(node), source_text(node)) == (f"test_source_lines.py:{line}", "return self.layer(x) + 1")


@pytest.mark.parametrize(
    ("operator", "line"), [(aten.linear, 10), (aten.sigmoid, 10), (aten.mul, 13)], ids=["linear", "sigmoid", "mul"]
)
def test_a_librarys_own_model_by_its_innermost_line_that_is_not_torchs(
    library: ModuleType, operator: object, line: int
) -> None:
    node = made(library.Layer(), operator)
    assert (where(node), source_text(node)) == (f"layers.py:{line}", LIBRARY.splitlines()[line - 1].strip())


def test_a_model_with_kwargs_has_no_line_of_the_compilers(library: ModuleType) -> None:
    """Such a model is called through a module of the compiler's own."""
    assert where(made(library.Named(), aten.linear, kwargs=True)) == "layers.py:10"


def test_a_model_of_torchs_layers_alone() -> None:
    assert where(made(nn.Sequential(nn.Linear(3, 2)), aten.linear)).startswith("linear.py:")
