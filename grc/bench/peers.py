"""Peers: what a user would run without grc, each at its best; where two settings may win, both are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from grc.bench.contender import Contender
from grc.bench.peer_aoti import build_aoti
from grc.bench.peer_onnxruntime import build_onnxruntime
from grc.bench.peer_torch import build_compile, build_eager
from grc.bench.requests import Request
from grc.bench.subject import BenchError, Subject

Build = Callable[[Subject, Request, int], Iterator[Contender]]

PEERS: dict[str, Build] = {
    "eager": build_eager,
    "compile": build_compile,
    "aoti": build_aoti,
    "onnxruntime": build_onnxruntime,
}


LOWERED = ("onnxruntime",)  # peers that quantise a model by themselves


def known(names: Sequence[str], precision: str = "fp32") -> list[str]:
    """The names, in the order of PEERS. Raises BenchError for one that is no peer, or has no form of a precision."""
    for name in names:
        if name not in PEERS:
            raise BenchError(f"there is no peer {name}", f"choose from {', '.join(PEERS)}")
        if precision != "fp32" and name not in LOWERED:
            raise BenchError(
                f"{name} has no form of precision {precision}", f"compare with --against {','.join(LOWERED)}"
            )
    return [name for name in PEERS if name in names]
