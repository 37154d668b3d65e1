"""`grc_cuda::tower`: the dense layers of a ranking model one after the other, all in one launch of a kernel in CUDA C++.

The kernel is compiled for one tower and two numbers of rows, and the cubins go into the package behind a C function. It reads
weights that are packed in the order of its threads, a copy of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels import nvrtc
from grc.kernels.packed_linear.activations import ACTIVATIONS, PRELU

HERE = Path(__file__).parent
SCHEMA = "tower(Tensor x, Tensor? add, Tensor weights, Tensor vectors, int columns, int kernel) -> Tensor"
DOWN = 4  # warps of a block that share the depth of a layer
STRIP, CHUNK = 16, 32  # columns that a warp finishes at once; numbers of a row that it reads at once
ROWS = (16, 32)  # of a cluster
CLUSTERS = (8, 16)  # blocks: more of them are slower, and fewer clusters of them find room at once
MEMORY = 227 << 10  # bytes of a block: all that there is
BATCH = 4  # units of the weights' stream that find room at least, for 16 rows
BARRIER = 16  # bytes


class Dense(NamedTuple):
    """The form of a layer: `activation` is a place in ACTIVATIONS, or PRELU. A cross layer has as many columns as depth."""

    depth: int
    columns: int
    activation: int
    cross: bool = False


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for: `final` is the activation of the answer, after what is added to it, and `cluster` the
    number of blocks that share the columns of a layer."""

    dtype: torch.dtype
    layers: tuple[Dense, ...]
    final: int
    cluster: int

    def strips(self, at: int) -> int:
        """Strips of a layer's columns: those that fill the next layer's last chunk are zeros."""
        last = at + 1 == len(self.layers)
        return math.ceil(self.layers[at].columns / STRIP) if last else self.chunks(at + 1) * (CHUNK // STRIP)

    def own(self, at: int) -> int:
        """Those of a block."""
        return math.ceil(self.strips(at) / self.cluster)

    def chunks(self, at: int) -> int:
        return math.ceil(self.layers[at].depth / CHUNK)

    def memory(self, rows: int) -> int:
        """Bytes of shared memory that a block needs at least, as `Shared` in cuda.cu lays them out."""
        count = len(self.layers)
        depths = [self.chunks(at) * CHUNK for at in range(count)]
        matrices = 2 * rows * sum([depths[0], *(max([CHUNK, *depths[first::2]]) for first in (1, 2))])
        vectors = (
            4 * STRIP * sum(self.own(at) * (2 if self.layers[at].activation == PRELU else 1) for at in range(count))
        )
        part = (
            DOWN * max(self.own(at) for at in range(count)) * 1024
        )  # of products of 16 rows, and a unit of the stream
        parts, slots = 2 * part, BATCH * 16 // rows * part
        return matrices + vectors + parts + slots + BARRIER * (count + 34)

    def rows(self) -> list[int]:
        """The rows of a cluster for which there is a kernel."""
        return [rows for rows in ROWS if self.memory(rows) <= MEMORY]

    @classmethod
    def of(cls, dtype: torch.dtype, layers: Sequence[Dense], final: int) -> Form | None:
        """The form of these layers with as few blocks as have room for them, or None where the kernel does not take them."""
        forms = (cls(dtype, tuple(layers), final, cluster) for cluster in CLUSTERS)
        return next((form for form in forms if form.able()), None)

    def able(self) -> bool:
        """Whether the kernel takes such layers: they fit together, and a block has room for its part of them."""
        first = self.layers[0].depth
        fits = all(a.columns == b.depth for a, b in zip(self.layers, self.layers[1:], strict=False))
        fits &= all(layer.depth == layer.columns == first for layer in self.layers if layer.cross)
        return fits and self.dtype in (torch.float16, torch.bfloat16) and bool(self.rows())

    def macros(self, rows: int) -> dict[str, str]:
        layers = ",".join("{" + ",".join(str(int(n)) for n in layer) + "}" for layer in self.layers)
        numbers = {"ROWS": rows, "CLUSTER": self.cluster, "FINAL": self.final}
        numbers["BF16"] = self.dtype is torch.bfloat16
        return {"GRC_LAYERS": layers} | {f"GRC_{name}": str(int(number)) for name, number in numbers.items()}


class Layer(NamedTuple):
    """The parameters of a layer: weight [columns, depth], bias and slopes of a PReLU [columns], of any dtype."""

    weight: Tensor
    bias: Tensor | None
    slope: Tensor | None = None


def reference(x: Tensor, layers: Sequence[Layer], form: Form, add: Tensor | None = None) -> Tensor:
    """[..., columns of the last layer]: x [..., depth of the first] through all layers, final(it + add).

    A layer is activation(x @ weight.T + bias), and a cross layer x0 * that + x, with x0 what the tower reads.
    """
    functions, x0 = list(ACTIVATIONS.values()), x
    for layer, dense in zip(layers, form.layers, strict=True):
        made = functional.linear(x, layer.weight, layer.bias)
        made = functional.prelu(made, layer.slope) if dense.activation == PRELU else functions[dense.activation](made)  # type: ignore[arg-type]
        x = x0 * made + x if dense.cross else made
    return functions[form.final](x if add is None else x + add)


def pack(layers: Sequence[Layer], form: Form) -> tuple[Tensor, Tensor]:
    """Weights and vectors as the kernel reads them: of each layer [blocks, chunks, strips, halves, threads of a warp, 8] in the
    model's dtype, and [blocks, numbers of all layers] in float32.

    A thread is (column, quad), and has of each eight numbers of the column's depth those at 2 * quad and the next one.
    """
    weights: list[Tensor] = []
    vectors: list[Tensor] = []
    for at, layer in enumerate(layers):
        chunks, own = form.chunks(at), form.own(at)
        short, shallow = form.cluster * own * STRIP - layer.weight.shape[0], chunks * CHUNK - layer.weight.shape[1]
        lying = functional.pad(layer.weight, (0, shallow, 0, short)).reshape(form.cluster, own, 2, 8, chunks, 4, 4, 2)
        weights.append(lying.permute(0, 4, 1, 2, 3, 6, 5, 7).flatten())
        bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
        for vector in (bias, layer.slope):
            if vector is not None:
                whole = functional.pad(vector.float(), (0, short))
                vectors.append(whole.reshape(form.cluster, own * STRIP))
    return torch.cat(weights), torch.cat(vectors, 1)


@functools.cache
def register() -> torch._ops.OpOverload:
    """Define the operator, which only packages can run: its kernel depends on the form of the tower."""
    torch.library.define("grc_cuda::tower", SCHEMA.removeprefix("tower"), tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake("grc_cuda::tower")(
        lambda x, add, weights, vectors, columns, kernel: x.new_empty(*x.shape[:-1], columns)
    )
    return torch.ops.grc_cuda.tower.default


def build(forms: Sequence[Form], arch: str) -> Path:
    """The object with the kernels for these forms, and the C function of the operator that launches them by their numbers.

    Raises LoweringError with the compilers' words.
    """
    cubins = [
        (number, rows, form.cluster, nvrtc.build(HERE / "cuda.cu", form.macros(rows), arch))
        for number, form in enumerate(forms)
        for rows in form.rows()
    ]
    kernels = " ".join(f'KERNEL({", ".join(map(str, numbers))}, "{path}")' for *numbers, path in cubins)
    return nvrtc.compile_launcher(HERE / "shim.cpp", [f"-DGRC_KERNELS={kernels}"])
