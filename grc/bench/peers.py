"""Peers: what a user would run without grc, each at its best; where two settings may win, both are measured."""

from __future__ import annotations

from collections.abc import Sequence

from grc.bench.subject import BenchError

# Where their builders are: `build(subject, example, batch)` yields a contender for each form.
PEERS = {
    "eager": "grc.bench.peer_torch:build_eager",
    "compile": "grc.bench.peer_torch:build_compile",
    "aoti": "grc.bench.peer_aoti:build_aoti",
    "onnxruntime": "grc.bench.peer_onnxruntime:build_onnxruntime",
}
GRC = "grc.bench.contender:build_grc"
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
