"""Dependent launches: a kernel begins while the one before it still runs, and waits where it reads what that one writes.

Every kernel here lets the next one begin at once, and is `ready` itself when those before it have ended; what it loads
until then is constant. It takes effect on Hopper and later, between kernels of one CUDA graph, and only there:
`grc.runtime.edges` knows these kernels by their names, which begin with grc_.
"""

from __future__ import annotations

import torch

from grc.kernels.rows import INTERPRETED, tl, triton

# A pure function to the compilers, since torch can't tell what a kernel writes to that has any other assembly. What depends
# on its answer comes after it, and ptxas moves no access to memory across it.
READY = tl.constexpr("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;")


def hopper() -> bool:
    """Whether kernels are compiled for a GPU that has dependent launches. Where there is none, they are only looked at."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


DEPENDENT = tl.constexpr(not INTERPRETED and hopper())


@triton.jit
def ready(program):  # type: ignore[no-untyped-def]
    """The number of a program, int32, once all kernels before this one have ended and what they wrote is seen."""
    if DEPENDENT:
        return tl.inline_asm_elementwise(READY, "=r,r", [program], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return program
