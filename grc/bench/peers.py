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
ON_GPU = ("eager", "compile", "aoti")  # of a lower precision they run the model in 16 bits


def usual(precision: str = "fp32", device: str = "cpu") -> list[str]:
    """The peers that run on a device and have a form of a precision."""
    if device == "cuda":
        return list(ON_GPU)
    return list(PEERS) if precision == "fp32" else list(LOWERED)


def known(names: Sequence[str], precision: str = "fp32", device: str = "cpu") -> list[str]:
    """The names, in the order of PEERS. Raises BenchError for one that is no peer, or has no form of a precision."""
    able = usual(precision, device)
    for name in names:
        if name not in PEERS:
            raise BenchError(f"there is no peer {name}", f"choose from {', '.join(able)}")
        if name not in able:
            reason = "is not measured on a GPU" if device == "cuda" else f"has no form of precision {precision}"
            raise BenchError(f"{name} {reason}", f"compare with --against {','.join(able)}")
    return [name for name in PEERS if name in names]
