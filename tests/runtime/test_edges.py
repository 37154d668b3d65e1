"""Kernels that begin early in a CUDA graph, and the same answers as without."""

from __future__ import annotations

import pytest
import torch

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
        assert edges.faster(*graphs), "a third of a small kernel's time"
    for turn in range(2000):
        x.copy_(torch.randn(1, SIZE, device="cuda"))
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(*answers), f"other bits at turn {turn}"
