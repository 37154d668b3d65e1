"""Kernels that Inductor generates wait as our own do (`grc.kernels.dependent`), and are named so that the runtime knows it.

Inductor can make kernels wait by itself, but leaves that out where one reads nothing of the kernel before it: memory that it
uses once more may then be written to while that kernel still reads it. Here every kernel waits before it does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grc.errors import LoweringError
from grc.lowering.replaced import replaced

NAMED = "aot_inductor.model_name_for_generated_files"  # what Inductor lets the names of kernels begin with
WAIT = "    tl.extra.cuda.gdc_launch_dependents()\n    tl.extra.cuda.gdc_wait()\n"


@contextmanager
def dependent_kernels() -> Iterator[None]:
    """Triton kernels that Inductor generates within this block begin with grc_ and wait, where GPUs have such launches."""
    from grc.kernels.dependent import hopper

    if not hopper():
        yield
        return
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonScheduling

    define = TritonScheduling.define_kernel

    def define_dependent(self: Any, source: str, *rest: Any) -> str:
        with config.patch({NAMED: "grc"}):
            return str(define(self, with_wait(source), *rest))

    with replaced(TritonScheduling, "define_kernel", define_dependent):
        yield


def with_wait(source: str) -> str:
    """The source of a Triton kernel, still without a name, which waits before anything else.

    Raises LoweringError where it has no signature on one line.
    """
    from torch._inductor.utils import Placeholder

    lines = source.splitlines(keepends=True)
    name = f"def {Placeholder.KERNEL_NAME}("
    at = next((i for i, line in enumerate(lines) if line.startswith(name) and line.endswith("):\n")), None)
    if at is None:
        raise LoweringError("Inductor generates Triton kernels of a form that grc does not know", "use an older torch")
    return "".join([*lines[: at + 1], WAIT, *lines[at + 1 :]])
