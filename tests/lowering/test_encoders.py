"""Transformer layers over a few steps: which become one call, that their weights are packed as the kernel reads them, and
that the kernel compiles. Its answers are compared where there is a GPU."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import grc
from grc.compiler import optimise
from grc.errors import InputError
from grc.graph.capture import capture
from grc.graph.model_file import from_module
from grc.kernels import encoder, nvrtc
from grc.kernels.attention import SILU, SOFTMAX
from grc.kernels.encoder import ACROSS, CHUNK, DOWN, TILE, WARPS, Form, Layer
from grc.kernels.packed_linear.activations import GELU, RELU
from grc.lowering.encoders import called, takes_encoders, with_encoders
from grc.lowering.epilogue import with_small_linears
from grc.lowering.twins import with_twins
from grc.options import Options
from grc.progress import Silent

STEPS = 5
ACTIVATION = {GELU: functional.gelu, RELU: torch.relu}


def form(**changes: object) -> Form:
    given = {
        "dtype": torch.float16, "steps": STEPS, "width": 256, "heads": 4, "hidden": 512, "scale": 0.125, "gain": 1.0,
        "kind": SOFTMAX, "causal": False, "activation": GELU, "eps": 1e-5,
    }  # fmt: skip
    return Form(**(given | changes))  # type: ignore[arg-type]


def layer(f: Form, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, mean: float = 0.0, std: float = 0.1) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std + mean).to(f.dtype)

    def weight(columns: int, depth: int) -> Tensor:
        return random(columns, depth, std=1 / math.sqrt(depth))

    w, h = f.width, f.hidden
    heads, biases = (tuple(make() for _ in range(3)) for make in (lambda: weight(w, w), lambda: random(w)))
    return Layer(
        random(w, mean=1.0), random(w), heads, biases, weight(w, w), random(w), random(w, mean=1.0), random(w),
        weight(h, w), random(h), weight(w, h), random(w),
    )  # fmt: skip


def widened(one: Layer) -> Layer:
    return Layer(*(tuple(t.double() for t in v) if isinstance(v, tuple) else v.double() for v in vars(one).values()))


class Encoder(nn.Module):
    """What the packed weights say, read as the kernel's threads do, in float64."""

    def __init__(self, weights: Tensor, vectors: Tensor, f: Form):
        super().__init__()
        self.weights, self.vectors, self.form = weights.double(), vectors.double(), f
        self.slice, self.part = f.width // f.cluster, f.hidden // f.cluster

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.weights.shape[1]):
            x = self.layer(x.double(), self.weights[:, number], self.vectors[:, number])
        return x

    def layer(self, x: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
        f, tiles, up_tiles = self.form, self.slice // TILE // ACROSS, self.part // TILE // ACROSS
        chunks = f.width // DOWN // CHUNK
        sizes = [chunks * 3 * tiles, chunks * tiles, chunks * up_tiles, self.part // CHUNK * (f.width // TILE // WARPS)]
        heads, out, up, down = weights.split(sizes, 1)
        names = [self.slice] * 8 + [self.part] * 2
        *sums, q_bias, k_bias, v_bias, out_bias, down_bias, up_sum, up_bias = (
            part.flatten() for part in vectors.split(names, 1)
        )
        which = heads.unflatten(1, (chunks, 3, tiles)).unbind(2)
        made = [self.normed(x, *of) for of in zip(which, sums, (q_bias, k_bias, v_bias), strict=True)]
        q, k, v = (t.unflatten(-1, (f.heads, -1)) for t in made)
        mixed = encoder.attention(q, k, v, None, None, f.scale, f.gain, f.kind, f.causal)
        x = x + self.wide(mixed, out.unflatten(1, (chunks, tiles))) + out_bias
        hidden = self.normed(x, up.unflatten(1, (chunks, up_tiles)), up_sum, up_bias)
        return x + self.narrow(ACTIVATION[f.activation](hidden), down) + down_bias

    def normed(self, x: Tensor, pieces: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + self.form.eps).sqrt()
        return (self.wide(x, pieces) - x.mean(-1, keepdim=True) * sums) / deviation + bias

    def wide(self, rows: Tensor, pieces: Tensor) -> Tensor:
        """rows @ W.T for W [blocks * ACROSS * tiles * TILE, width] in pieces [blocks, chunks, tiles, threads, 8]."""
        blocks, chunks, tiles = pieces.shape[:3]
        threads = pieces.reshape(blocks, chunks, tiles, DOWN, ACROSS, TILE, 4, 8)
        return rows @ threads.permute(0, 4, 2, 5, 3, 1, 6, 7).reshape(-1, rows.shape[-1]).t()

    def narrow(self, rows: Tensor, pieces: Tensor) -> Tensor:
        last = self.form.width // TILE // WARPS
        threads = pieces.reshape(self.form.cluster, -1, last, WARPS, 4, 2, 4, 8)
        return rows @ threads.permute(3, 4, 2, 5, 0, 1, 6, 7).reshape(self.form.width, -1).t()


@pytest.mark.parametrize(
    "f",
    [form(), form(width=512, heads=8, hidden=1024, causal=True), form(heads=8, kind=SILU, gain=0.2, activation=RELU)],
)
def test_packed_weights_are_the_layers(f: Form) -> None:
    layers = [layer(f, seed) for seed in range(2)]
    weights, vectors = encoder.pack(layers, f)
    assert weights.dtype is f.dtype and vectors.dtype is torch.float32
    x = torch.randn(3, STEPS, f.width, generator=torch.Generator().manual_seed(9)).to(f.dtype)
    want = encoder.reference(x.double(), [widened(one) for one in layers], f)
    torch.testing.assert_close(Encoder(weights, vectors, f)(x), want, atol=4e-3, rtol=0)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")
@pytest.mark.parametrize(
    "f",
    [
        form(), form(width=512, heads=8, hidden=2048, steps=10), form(dtype=torch.bfloat16, causal=True, steps=16),
        form(heads=8, kind=SILU, activation=RELU, steps=1), form(heads=1, hidden=2048), form(width=512, hidden=4096),
    ],
)  # fmt: skip
def test_the_kernel_compiles(f: Form) -> None:
    assert f.able()
    assert nvrtc.build(encoder.HERE / "cuda.cu", f.macros(), "sm_90").read_bytes()[:4] == b"\x7fELF"


def test_what_the_kernel_can_not_take() -> None:
    changes = [
        {"steps": 17}, {"width": 128, "heads": 2}, {"dtype": torch.float32}, {"heads": 16}, {"hidden": 520}, {"hidden": 4096},
        {"activation": 0},
    ]  # fmt: skip
    assert not any(form(**change).able() for change in changes)


def test_missing_says_which_gpu_it_needs() -> None:
    assert "sm_90 or newer, not sm_80" in str(encoder.missing("sm_80"))


class Model(nn.Module):
    """Two pre-norm layers of torch's own between two others."""

    def __init__(self, layers: int = 2, norm_first: bool = True, width: int = 256):
        super().__init__()
        one = nn.TransformerEncoderLayer(width, 4, 512, activation="gelu", batch_first=True, norm_first=norm_first)
        self.first, self.last = nn.Linear(24, width), nn.Linear(width, 40)
        self.encoder = nn.TransformerEncoder(one, layers, enable_nested_tensor=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x)).mean(1))


class Separate(nn.Module):
    """Layers whose queries, keys and values are layers of their own, and what lies between two of them is an output too."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(6))
        self.up, self.down = (nn.ModuleList(nn.Linear(a, b) for _ in range(3)) for a, b in ((width, 512), (512, width)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = x
        for i, (query, key, value, out) in enumerate(self.layers):  # type: ignore[misc]
            rows = self.norms[2 * i](x)
            q, k, v = (part(rows).unflatten(-1, (4, -1)).transpose(1, 2) for part in (query, key, value))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(-2))
            x = x + self.down[i](torch.relu(self.up[i](self.norms[2 * i + 1](x))))
            between = x if i == 1 else between
        return x, between


def lowered(module: nn.Module, *shape: int) -> fx.GraphModule:
    source = capture(from_module(module.eval().half(), lambda batch: (torch.randn(batch, *shape).half(),)))
    found = optimise(source, Options(), Silent()).graph
    small = with_small_linears(with_twins(found, torch.device("cpu"), False)[0])
    return with_encoders(small)[0] if takes_encoders(found) else small


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if called(node, "encoder")]


def test_layers_in_a_row_are_one_call() -> None:
    graph = lowered(Model(), STEPS, 24)
    (call,) = calls(graph)
    assert call.args[3] == 2 and call.meta["val"].shape[1:] == (STEPS, 256)
    assert sum(called(node, "small_linear") for node in graph.graph.nodes) == 2  # before and after


def test_layers_whose_result_is_read_elsewhere_end_a_call() -> None:
    graph = lowered(Separate(), STEPS, 256)
    assert [call.args[3] for call in calls(graph)] == [2, 1]
    assert not any(called(node, "small_linear") for node in graph.graph.nodes)


@pytest.mark.parametrize("module", [Model(norm_first=False), Model(width=128)])
def test_other_layers_stay(module: nn.Module) -> None:
    assert not calls(lowered(module, STEPS, 24))


class Deep(nn.Module):
    """Layers whose rows have a mean far from zero, and large numbers, as the residual of a trained model may."""

    def __init__(self, width: int, hidden: int, heads: int, activation: str):
        super().__init__()
        one = nn.TransformerEncoderLayer(width, heads, hidden, activation=activation, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(one, 3, enable_nested_tensor=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x * 4 + 10)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "steps, width, hidden, heads, activation",
    [(10, 512, 2048, 8, "gelu"), (16, 256, 512, 8, "relu"), (2, 256, 2048, 1, "gelu"), (3, 512, 4096, 16, "relu")],
)
@torch.no_grad()
def test_answers_on_a_gpu(
    steps: int, width: int, hidden: int, heads: int, activation: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Deep(width, hidden, heads, activation).eval().to(dtype)
    oracle = copy.deepcopy(model).double()

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(batch)).to(dtype),)

    options = Options(tmp_path / "m.grc", "cuda", "inductor-encoder", buckets=(1, 4, 16), max_batch=16, streams=2)
    grc.compile(model, inputs, options)
    program = grc.load(tmp_path / "m.grc")
    kept = {}
    for batch in (1, 3, 16):
        (x,) = inputs(batch)
        want, eager = oracle(x.double()), model.cuda()(x.cuda()).cpu()
        found = kept[batch] = program(x)
        bound = 2 * (eager - want).abs().max() + 1e-3
        assert (found - want).abs().max() < bound
        model.cpu()
    with ThreadPoolExecutor(4) as threads:  # clusters of several requests side by side, with answers that differ
        again = list(threads.map(lambda i: (i, program(*inputs(i))), [1, 16, 3] * 200))
    assert all(torch.equal(found, kept[batch]) for batch, found in again)
    (x,) = inputs(3)
    x[1, 0, 0] = torch.nan
    with pytest.raises(InputError, match="nan"):
        program(x)
