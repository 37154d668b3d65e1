"""Kernels that begin early in a CUDA graph, and the same answers as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grc.errors import ArtifactError
from grc.runtime import edges

LAYERS = 6
SIZE = 512


@pytest.mark.gpu
def test_kernels_that_wait_begin_early_and_answer_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if edges.driver() is None:
        pytest.skip("this GPU or its driver has no dependent launches")
    from grc.kernels.small_linear.triton import small_linear

    torch.manual_seed(0)
    weights = [torch.randn(SIZE, SIZE, device="cuda").half() / SIZE**0.5 for _ in range(LAYERS)]
    x, stream = torch.zeros(1, SIZE, device="cuda").half(), torch.cuda.Stream()

    def run() -> torch.Tensor:
        y = x * 2  # a kernel of torch's, which does not wait
        for weight in weights:
            y = small_linear(y, weight, None, None, y, 1)
        return y + 1

    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graphs, answers, early = [], [], []
    for begins in (True, False):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            answers.append(run())
        early.append(edges.instantiate(graph, begins))
        graphs.append(graph)
    assert early == [LAYERS, 0], "all but the two kernels of torch's"
    with torch.cuda.stream(stream):
        assert edges.faster(*graphs), "launches are most of their time"
    for turn in range(2000):
        x.copy_(torch.randn(1, SIZE, device="cuda"))
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(*answers), f"other bits at turn {turn}"


class Driver:
    """CUDA's driver over one graph: nodes as (is a kernel, its name or None for one of a library), edges with their types."""

    def __init__(self, nodes: dict[int, tuple[bool, str]], edges: dict[tuple[int, int], int], refuses: bool = False):
        self.nodes, self.edges, self.refuses = nodes, edges, refuses

    def cuGraphGetEdges_v2(self, graph: Any, begins: Any, ends: Any, edges: Any, count: Any) -> int:
        count._obj.value = len(self.edges)
        for i, ((begin, end), kind) in enumerate(self.edges.items() if begins is not None else ()):
            begins[i], ends[i], edges[i].type = begin, end, kind
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = 0 if self.nodes[node.value][0] else 1
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, held: Any) -> int:
        library = node.value % 2 == 0
        held._obj.function, held._obj.kernel = (None, node.value) if library else (node.value, None)
        return 0

    def cuFuncGetName(self, name: Any, function: Any) -> int:
        assert function.value % 2 == 1
        name._obj.value = self.nodes[function.value][1].encode()
        return 0

    def cuKernelGetName(self, name: Any, kernel: Any) -> int:
        assert kernel.value % 2 == 0
        name._obj.value = self.nodes[kernel.value][1].encode()
        return 0

    def cuGraphRemoveDependencies_v2(self, graph: Any, begin: Any, end: Any, edge: Any, count: Any) -> int:
        assert self.edges.pop((begin._obj.value, end._obj.value)) == edge._obj.type
        return 0

    def cuGraphAddDependencies_v2(self, graph: Any, begin: Any, end: Any, edge: Any, count: Any) -> int:
        assert count.value == 1 and edge._obj.from_port == edges.PROGRAMMATIC
        self.edges[begin._obj.value, end._obj.value] = edge._obj.type
        return 1 if self.refuses else 0


NODES = {
    1: (True, "vectorized_copy"), 2: (True, "grc_lookup"), 3: (True, "nvjet_sm90"), 4: (True, "grc_cross"),
    5: (False, "memset"), 7: (True, "grc_attention"), 8: (True, "grc_layer_chain"),
}  # fmt: skip


def test_edges_from_kernels_into_those_that_wait_are_programmatic(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = {(1, 2): 0, (2, 3): 0, (3, 4): 0, (4, 5): 0, (5, 7): 0, (7, 8): 1}
    driver = Driver(NODES, dict(chain))
    monkeypatch.setattr(edges, "driver", lambda: driver)
    assert edges.begin_early(99) == 2
    assert driver.edges == {**chain, (1, 2): 1, (3, 4): 1}


def test_a_driver_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "driver", lambda: Driver(NODES, {(1, 2): 0}, refuses=True))
    with pytest.raises(ArtifactError, match="cuGraphAddDependencies_v2 answers 1"):
        edges.begin_early(99)
