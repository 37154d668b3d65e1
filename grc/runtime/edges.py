"""Edges of a CUDA graph: where a kernel waits by itself for those before it, the graph lets it begin while they still run.

Kernels of grc wait where they first touch what others write (`grc.kernels.dependent`), those that Inductor generates for it
before anything else (`grc.lowering.dependent`), and the names of both begin with PREFIX. AOTInductor launches kernels one after
another's end, so a capture orders them so; here the edges into such kernels become programmatic (CUDA driver API,
CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC). A launch is most of a small kernel's time, but large ones can stand in each other's way:
each bucket is measured both ways.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Callable

import torch

from grc.errors import ArtifactError

PREFIX = b"grc_"
TURNS = 15  # of the replays that decide
KERNEL, PROGRAMMATIC = 0, 1  # of CUgraphNodeType; of CUgraphDependencyType, and the port of a kernel with its name


class Edge(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte), ("reserved", ctypes.c_ubyte * 5),
    )  # fmt: skip


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2: the kernel is a function of a context, or else one of a library."""

    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_void_p), ("extra", ctypes.c_void_p), ("kernel", ctypes.c_void_p), ("context", ctypes.c_void_p),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """CUDA's driver."""
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def driver() -> ctypes.CDLL | None:
    """CUDA's driver, or None where it or the GPU has no such edges."""
    found = library()
    known = all(hasattr(found, name) for name in ("cuGraphGetEdges_v2", "cuGraphAddDependencies_v2", "cuFuncGetName"))
    return found if known and torch.cuda.get_device_capability() >= (9, 0) else None


def call(name: str, *arguments: object) -> None:
    found = driver()
    assert found is not None
    result = getattr(found, name)(*arguments)
    if result:
        raise ArtifactError(f"a captured graph can't be edited: {name} answers {result}", "update the GPU's driver")


def instantiate(graph: torch.cuda.CUDAGraph, early: bool) -> int:
    """Make a captured graph, one that was kept, ready to be replayed. Answers with how many of its kernels begin early.

    Raises ArtifactError when the driver refuses to edit it.
    """
    count = begin_early(graph.raw_cuda_graph()) if early and driver() else 0
    graph.instantiate()
    return count


def launcher(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Callable[[], None]:
    """Launches a graph on a stream. Torch's own replay looks for random numbers first, which takes as long as the launch."""
    start = library().cuGraphLaunch
    handles = ctypes.c_void_p(graph.raw_cuda_graph_exec()), ctypes.c_void_p(stream.cuda_stream)

    def launch() -> None:
        if start(*handles):  # torch gives a thread its first context, and raises where anything else is amiss
            with torch.cuda.stream(stream):
                graph.replay()

    return launch


def faster(one: torch.cuda.CUDAGraph, other: torch.cuda.CUDAGraph) -> bool:
    """Whether one graph is the faster of two, replayed in turns on the current stream."""
    times: list[list[float]] = [[], []]
    for turn in range(TURNS + 2):
        for graph, measured in zip((one, other), times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                measured.append(begin.elapsed_time(end))
    return statistics.median(times[0]) < statistics.median(times[1])


def begin_early(graph: int) -> int:
    """Let every kernel of a graph (cudaGraph_t) that waits by itself begin before the one it follows has ended."""
    handle, count = ctypes.c_void_p(graph), ctypes.c_size_t()
    call("cuGraphGetEdges_v2", handle, None, None, None, ctypes.byref(count))
    begins, ends = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    edges = (Edge * count.value)()
    call("cuGraphGetEdges_v2", handle, begins, ends, edges, ctypes.byref(count))
    early = 0
    for begin, end, edge in zip(begins, ends, edges, strict=True):
        if edge.type or not is_kernel(begin) or not is_kernel(end) or not kernel_name(end).startswith(PREFIX):
            continue
        ends_of = handle, ctypes.byref(ctypes.c_void_p(begin)), ctypes.byref(ctypes.c_void_p(end))
        call("cuGraphRemoveDependencies_v2", *ends_of, ctypes.byref(edge), ctypes.c_size_t(1))
        new = Edge(PROGRAMMATIC, 0, PROGRAMMATIC)
        call("cuGraphAddDependencies_v2", *ends_of, ctypes.byref(new), ctypes.c_size_t(1))
        early += 1
    return early


def is_kernel(node: int) -> bool:
    kind = ctypes.c_int()
    call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
    return kind.value == KERNEL


def kernel_name(node: int) -> bytes:
    held, name = KernelNode(), ctypes.c_char_p()
    call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(held))
    if held.function:
        call("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(held.function))
    else:
        call("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(held.kernel))
    return name.value or b""
