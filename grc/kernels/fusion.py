"""How a fused op is declared: one schema, one reference in plain aten, a C++ and a Triton kernel, and its cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One set of arguments that every test of a fused op runs: `build(seed)` gives the op's arguments."""

    name: str
    build: Callable[[int], Sequence[Any]]


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes: the roofline in the report. Bytes counts every row read and written once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class FusedOp:
    """A fused operator `grc::NAME`.

    The reference doubles as fp64 oracle, fake implementation, portable CPU code and ONNX form. The schema is the one
    source of the operator's signature: the dispatcher's, and the C shim's that AOTInductor calls.
    """

    schema: str  # "bag_dot(Tensor arena, Tensor ids, ...) -> Tensor"
    reference: Callable[..., Any]
    cpu: Path | None  # C++ source, `aoti_torch_cpu_NAME`
    cost: Callable[..., Cost] | None = None
    cases: Sequence[Case] = field(default_factory=tuple)
    only_float32: bool = False  # of the C++ kernel: calls on other dtypes are the reference's

    @property
    def name(self) -> str:
        return self.schema.split("(")[0]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.grc, self.name).default


class Fusion:
    """A declared rewrite: where a fused op may begin, and how the graph around it becomes one call.

    `anchors` are the operators at whose nodes `fuse` is tried. `fuse` returns the node whose value was replaced, None where
    the pattern does not stand, and raises Miss where it stands but for one reason.
    """

    name: str
    op: FusedOp
    anchors: tuple[Any, ...]

    def fuse(self, edit: Any, node: Any) -> Fused | None:
        raise NotImplementedError


@dataclass(frozen=True)
class Fused:
    """What a fusion replaced: the node that is gone, and what the rewrite saves."""

    old: Any
    new: Any
    saves: str
