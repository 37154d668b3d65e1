"""`grc_cuda::encoder`: Transformer layers over users of a few steps, all in one launch of a kernel in CUDA C++.

The kernel is compiled for one form of layer, and its cubin goes into the package behind a C function. It reads weights that
are packed in the order of its threads: a copy of them, in which the scales of both norms are folded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels import nvrtc
from grc.kernels.attention import SILU
from grc.kernels.attention import reference as attention
from grc.kernels.packed_linear.activations import ACTIVATIONS, GELU, GELU_TANH, RELU
from grc.kernels.packed_linear.activations import SILU as SILU_ACTIVATION

HERE = Path(__file__).parent
SCHEMA = "encoder(Tensor x, Tensor weights, Tensor vectors, int layers) -> Tensor"
SLICES = {256: 8, 512: 16}  # of a user's row, by its columns: a cluster has a block for each, or for two of them
WIDEST = 256  # hidden columns of a block
MOST_STEPS = 16  # rows of a product of the tensor cores
KNOWN = (RELU, GELU, GELU_TANH, SILU_ACTIVATION)
# of the kernel: warps that share columns and depth, columns and depth that a thread's 16 bytes belong to
WARPS, ACROSS, DOWN, TILE, CHUNK = 16, 4, 4, 8, 32


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for: `post` for layers whose norms come last. `kind` is the attention's, `activation` a place
    in ACTIVATIONS."""

    dtype: torch.dtype
    steps: int
    width: int
    heads: int
    hidden: int
    scale: float
    gain: float
    kind: int
    causal: bool
    activation: int
    eps: float
    post: bool = False

    @property
    def slices(self) -> int:
        return SLICES[self.width]

    def clusters(self) -> tuple[int, int]:
        """Blocks of a user: as many as there are slices, and half of them where a block has room for two."""
        room = 2 * self.hidden // self.slices <= WIDEST
        return self.slices, self.slices // 2 if room else self.slices

    def able(self) -> bool:
        """Whether the kernel takes such layers: blocks and warps need whole tiles of them, and shared memory holds a part."""
        if self.width not in SLICES or self.width % self.heads or self.dtype not in (torch.float16, torch.bfloat16):
            return False
        part, odd = divmod(self.hidden, self.slices)
        head = self.width // self.heads
        whole = odd == 0 and part % (TILE * ACROSS) == 0 and head % CHUNK == 0 and self.width % head == 0
        return whole and 0 < part <= WIDEST and 0 < self.steps <= MOST_STEPS and self.activation in KNOWN

    def macros(self, cluster: int) -> dict[str, str]:
        numbers = {"SCALE": self.scale, "GAIN": self.gain, "EPS": self.eps}
        flags = {"SOFTMAX": self.kind != SILU, "CAUSAL": self.causal, "BF16": self.dtype is torch.bfloat16}
        flags["POST"] = self.post
        sizes = {
            "WIDTH": self.width, "HEAD": self.width // self.heads, "HIDDEN": self.hidden, "STEPS": self.steps,
            "CLUSTER": cluster, "ACTIVATION": self.activation,
        }  # fmt: skip
        given = {name: str(int(n)) for name, n in (sizes | flags).items()}
        return {f"GRC_{name}": text for name, text in (given | {k: f"{v!r}f" for k, v in numbers.items()}).items()}


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer: weights [columns, depth], biases and vectors of norms [columns].

    The norms are those that the heads and `up` read. In post-norm layers the first is the layer's before, and what the first
    layer of all reads has none: ones and zeros.
    """

    scale1: Tensor
    shift1: Tensor
    heads: tuple[Tensor, Tensor, Tensor]  # of queries, keys and values, [width, width]
    heads_bias: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    out_bias: Tensor
    scale2: Tensor
    shift2: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def reference(x: Tensor, layers: list[Layer], form: Form) -> Tensor:
    """[users, steps, width]: x + out(attention(norm1(x))), and that plus down(activation(up(norm2(it)))), for every layer.

    Pre-norm encoder layers; in post-norm ones each sum begins with the norm, not with what it is of, and the norm of the answer
    is left to the caller (both in Xiong et al. 2020). Attention as in `grc.kernels.attention.reference`, without masks.
    """
    activation = list(ACTIVATIONS.values())[form.activation]

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.layer_norm(x, [form.width], scale, shift, form.eps)

    for number, layer in enumerate(layers):
        rows = x if form.post and number == 0 else norm(x, layer.scale1, layer.shift1)
        q, k, v = (
            functional.linear(rows, weight, bias).unflatten(-1, (form.heads, -1))
            for weight, bias in zip(layer.heads, layer.heads_bias, strict=True)
        )
        mixed = attention(q, k, v, None, None, form.scale, form.gain, form.kind, form.causal)
        x = (rows if form.post else x) + functional.linear(mixed, layer.out, layer.out_bias)
        rows = norm(x, layer.scale2, layer.shift2)
        hidden = activation(functional.linear(rows, layer.up, layer.up_bias))
        x = (rows if form.post else x) + functional.linear(hidden, layer.down, layer.down_bias)
    return x


def folded(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer after a norm as one of the rows themselves: its weight, the sums of that, which belong to the mean, its bias."""
    exact = weight.double()
    rounded = (exact * scale.double()).to(weight.dtype)
    return rounded, rounded.double().sum(1), bias.double() + exact @ shift.double()


def pack(layers: list[Layer], form: Form) -> tuple[Tensor, Tensor]:
    """Weights and vectors as the kernel reads them: [slices, layers, pieces, threads, 8] in the model's dtype, and
    [slices, layers, numbers] in float32, in the order of `Vectors` in cuda.cu.

    A thread of the kernel is (down, across, row, quad), and has 8 numbers of a depth in each piece.
    """
    slices, width = form.slices, form.width

    def lying(weight: Tensor, tiles: int) -> Tensor:
        """[columns, width] as [slices, chunks, tiles, threads, 8]."""
        cut = weight.reshape(slices, ACROSS, tiles, TILE, DOWN, width // DOWN // CHUNK, 4, 8)
        return cut.permute(0, 5, 2, 4, 1, 3, 6, 7).reshape(slices, -1, tiles, WARPS * 32, 8)

    tiles, up_tiles = (columns // slices // TILE // ACROSS for columns in (width, form.hidden))
    last = width // TILE // WARPS  # tiles of a warp, whose columns are such that a thread has neighbours of all
    weights, vectors = [], []
    for layer in layers:
        norm1, norm2 = (layer.scale1, layer.shift1), (layer.scale2, layer.shift2)
        heads = [folded(w, b, *norm1) for w, b in zip(layer.heads, layer.heads_bias, strict=True)]
        up, up_sum, up_bias = folded(layer.up, layer.up_bias, *norm2)
        down = layer.down.reshape(WARPS, 4, last, 2, slices, form.hidden // slices // CHUNK, 4, 8)
        pieces = [
            torch.stack([lying(weight, tiles) for weight, _, _ in heads], 2),
            lying(layer.out, tiles),
            lying(up, up_tiles),
            down.permute(4, 5, 2, 0, 1, 3, 6, 7),
        ]
        weights.append(torch.cat([piece.reshape(slices, -1, WARPS * 32, 8) for piece in pieces], 1))
        _, sums, biases = zip(*heads, strict=True)
        numbers = [*sums, *biases, layer.out_bias, layer.down_bias, up_sum, up_bias]
        if form.post:
            numbers += [layer.scale1, layer.scale2, layer.shift1, layer.shift2]
        vectors.append(torch.cat([vector.float().reshape(slices, -1) for vector in numbers], 1))
    return torch.stack(weights, 1), torch.stack(vectors, 1)


@functools.cache
def register() -> torch._ops.OpOverload:
    """Define the operator, which only packages can run: its kernel depends on the form of the layers."""
    torch.library.define("grc_cuda::encoder", SCHEMA.removeprefix("encoder"), tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake("grc_cuda::encoder")(lambda x, weights, vectors, layers: torch.empty_like(x))
    return torch.ops.grc_cuda.encoder.default


def build(form: Form, arch: str) -> Path:
    """The object with the kernel for layers of one form, and the C function of the operator that launches it.

    Raises LoweringError with the compilers' words.
    """
    wide, half = form.clusters()
    flags = [f"-DGRC_WIDE={wide}", f"-DGRC_HALF={half}"]
    for name, cluster in (("WIDE", wide), ("HALF", half)):
        cubin = nvrtc.build(HERE / "cuda.cu", form.macros(cluster), arch)
        flags.append(f'-DGRC_{name}_CUBIN="{cubin}"')
    return nvrtc.compile_launcher(HERE / "shim.cpp", flags)
