"""CUDA graphs without a GPU: the operators of a capture on a tape, run again at every replay into the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grc.runtime import buckets


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph. What a capture runs is not run again by Python, as on a GPU."""

    def __init__(self, keep_graph: bool = False) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    """Stands in for torch.cuda.Stream: everything has happened when a call returns."""

    def synchronize(self) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...


@contextlib.contextmanager
def capturing(graph: Tape, **settings: Any) -> Iterator[None]:
    with graph:
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the lanes of grc.runtime.buckets run on the CPU."""
    monkeypatch.setattr(buckets, "here", lambda: torch.device("cpu"))
    monkeypatch.setattr(buckets, "pinned", lambda count: torch.empty(count, dtype=torch.uint8))
    monkeypatch.setattr(buckets, "mapped", lambda host: host)
    monkeypatch.setattr(buckets, "on", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(buckets, "instantiate", lambda graph, early: 0)
    monkeypatch.setattr(buckets, "launcher", lambda graph, stream: graph.replay)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
