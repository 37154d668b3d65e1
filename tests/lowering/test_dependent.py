"""Kernels that Inductor generates: they wait first, and their names say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from grc.errors import LoweringError
from grc.lowering.dependent import WAIT, dependent_kernels, with_wait

pytest.importorskip("torch._inductor.codegen.triton", reason="Inductor's Triton code generator is not importable here")
NAME = "Placeholder.KERNEL_NAME"
HELPER = "@triton.jit\ndef _triton_helper_fn0(arg0, arg1):\n    return arg0 + arg1\n"
KERNEL = f"@triton.jit\ndef {NAME}(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):\n"
BODY = "    xnumel = 20\n"


def test_a_kernel_waits_before_its_first_line_and_its_helpers_do_not() -> None:
    assert with_wait(HELPER + KERNEL + BODY) == HELPER + KERNEL + WAIT + BODY


def test_a_kernel_of_another_form_is_refused() -> None:
    with pytest.raises(LoweringError, match="of a form that grc does not know"):
        with_wait(HELPER + f"def {NAME}(\n    in_ptr0,\n):\n" + BODY)


def test_inductor_generates_such_kernels_only_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codegen.triton import TritonScheduling

    before = TritonScheduling.define_kernel
    with dependent_kernels():
        assert TritonScheduling.define_kernel is not before
    assert TritonScheduling.define_kernel is before
    monkeypatch.setattr("grc.kernels.dependent.hopper", lambda: False)
    with dependent_kernels():
        assert TritonScheduling.define_kernel is before


class Norms(nn.Module):
    """Kernels of Inductor's alone, one of them with a scan, for which it writes a helper."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:]).cumsum(-1)
        return torch.nn.functional.layer_norm(y.roll(1, 0) * x, x.shape[-1:])


@pytest.mark.gpu
def test_a_package_of_such_kernels_answers_alike_early_and_late(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from grc.kernels.dependent import hopper
    from grc.lowering.inductor import package, settings
    from grc.runtime import edges

    if not hopper() or edges.driver() is None:
        pytest.skip("this GPU or its driver has no dependent launches")
    x, stream = torch.randn(64, 96, device="cuda"), torch.cuda.Stream()
    with torch.no_grad():
        program = torch.export.export(Norms(), (x,))
    with dependent_kernels():
        package(program, tmp_path / "norms.pt2", settings([]))
    run = torch._C._aoti.AOTIModelPackageLoader(str(tmp_path / "norms.pt2"), "model", True, 1, -1).boxed_run
    with torch.cuda.stream(stream):
        run([x])
    torch.cuda.synchronize()
    graphs, answers, early = [], [], []
    for begins in (True, False):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            answers.append(run([x])[0])
        early.append(edges.instantiate(graph, begins))
        graphs.append(graph)
    assert early[0] >= 1 and early[1] == 0
    for turn in range(500):
        x.copy_(torch.randn(64, 96, device="cuda"))
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(*answers), f"other bits at turn {turn}"
    assert torch.allclose(answers[0], Norms()(x), atol=1e-4)
