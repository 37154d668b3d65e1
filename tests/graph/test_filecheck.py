"""The checker itself: each directive accepts what it should and refuses what it should."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tests.graph.filecheck import check


@pytest.fixture
def graph() -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: torch.relu(torch.relu(x) + 1))


@pytest.mark.parametrize(
    "text",
    [
        "CHECK: relu(%x)\nCHECK: add(%relu, 1)\nCHECK: return",
        "CHECK: relu(%x)\nCHECK-NEXT: add(%relu",
        "CHECK: %{{[a-z]+}} : NoneType = add",
        "CHECK-COUNT-2: = relu(",
        "CHECK: relu(%x)\nCHECK-NOT: relu\nCHECK: add(",
        "CHECK-NOT: sigmoid",
    ],
)
def test_accepts(graph: fx.GraphModule, text: str) -> None:
    check(graph, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CHECK: add(\nCHECK: relu(%x)", "does not stand after line"),
        ("CHECK: relu(%x)\nCHECK-NEXT: return", "in the next line"),
        ("CHECK-COUNT-3: = relu(", "stands 2 times"),
        ("CHECK: %x\nCHECK-NOT: add\nCHECK: return", "should not stand"),
        ("CHECK-NOT: relu", "should not stand"),
        ("CHEK: relu", "is no CHECK line"),
    ],
)
def test_refuses(graph: fx.GraphModule, text: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check(graph, text)
