"""The encoder's kernel, thread by thread on a CPU: its answers against float64, and the same bits in every order of events,
and a model that was lowered to it."""

from __future__ import annotations

import copy
import ctypes
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grc.compiler import optimise
from grc.graph.capture import capture
from grc.graph.model_file import from_module
from grc.kernels import encoder, nvrtc
from grc.kernels.attention import SILU, SOFTMAX
from grc.kernels.encoder import Form, Layer
from grc.kernels.packed_linear.activations import GELU, GELU_TANH, RELU
from grc.kernels.packed_linear.activations import SILU as SILU_ACTIVATION
from grc.lowering.encoders import called, with_encoders
from grc.lowering.epilogue import with_small_linears
from grc.lowering.twins import with_twins
from grc.options import Options
from grc.progress import Silent
from tests.kernels.emulate import emulate


def form(**changes: object) -> Form:
    given = {
        "dtype": torch.float16, "steps": 5, "width": 256, "heads": 4, "hidden": 256, "scale": 0.125, "gain": 1.0,
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


@functools.cache
def emulated(f: Form, cluster: int) -> ctypes.CDLL:
    """The kernel for a form, compiled for a CPU."""
    found = emulate("encoder", encoder.HERE, f.macros(cluster))
    found.encode.restype = ctypes.c_char_p
    return found


def encode(x: Tensor, layers: list[Layer], f: Form, cluster: int, seed: int) -> Tensor:
    weights, vectors = encoder.pack(layers, f)
    return encode_packed(x, weights, vectors, len(layers), f, cluster, seed)


def encode_packed(
    x: Tensor, weights: Tensor, vectors: Tensor, layers: int, f: Form, cluster: int, seed: int = 0
) -> Tensor:
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    tensors = [t.contiguous() for t in (x, y, weights, vectors)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    fault = emulated(f, cluster).encode(*pointers, layers, x.shape[0], seed)
    assert fault is None, fault.decode()
    return y


FORMS = [
    form(),
    form(steps=10, hidden=512, causal=True, activation=RELU),
    form(steps=16, heads=8, kind=SILU, gain=0.2, activation=GELU_TANH, dtype=torch.bfloat16),
    form(steps=1, heads=2, hidden=1024, activation=SILU_ACTIVATION),
    form(steps=9, width=512, heads=8, hidden=1024),
    form(steps=12, hidden=512, activation=RELU, post=True),
]
CASES = [
    pytest.param(f, cluster, id=f"{i}-{cluster}") for i, f in enumerate(FORMS) for cluster in sorted(set(f.clusters()))
]


@pytest.mark.parametrize("f, cluster", CASES)
def test_answers_and_bits_in_any_order_of_events(f: Form, cluster: int) -> None:
    layers = [layer(f, seed) for seed in range(3)]
    if f.post:
        layers[0] = replace(
            layers[0], scale1=torch.ones_like(layers[0].scale1), shift1=torch.zeros_like(layers[0].shift1)
        )
    x = (torch.randn(1, f.steps, f.width, generator=torch.Generator().manual_seed(9)) * 3 + 5).to(f.dtype)
    want = encoder.reference(x.double(), [widened(one) for one in layers], f)
    plain = encoder.reference(x, layers, f).double()
    found = encode(x, layers, f, cluster, 0)
    assert (found - want).abs().max() <= 2 * (plain - want).abs().max()
    assert torch.equal(encode(x, layers, f, cluster, 1), found)


def test_nan_stays_with_its_user() -> None:
    f = form()
    layers = [layer(f, 0)]
    x = torch.randn(2, f.steps, f.width).to(f.dtype)
    clean = encode(x, layers, f, 8, 0)
    x[0, 1, 2] = torch.nan
    found = encode(x, layers, f, 8, 0)
    assert found[0].isnan().all() and torch.equal(found[1], clean[1])


class Model(nn.Module):
    """Torch's own layers, with another of their form whose queries, keys and values are layers of their own."""

    def __init__(self, pre: bool, width: int = 256):
        super().__init__()
        one = nn.TransformerEncoderLayer(width, 4, 256, activation="gelu", batch_first=True, norm_first=pre)
        self.encoder = nn.TransformerEncoder(one, 3, enable_nested_tensor=False)
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 256), nn.Linear(256, width)
        self.pre = pre
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        rows = self.norms[0](x) if self.pre else x
        q, k, v = (part(rows).unflatten(-1, (4, -1)).transpose(1, 2) for part in list(self.parts)[:3])
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.parts[3](mixed)
        rows = self.norms[1](x) if self.pre else (x := self.norms[0](x))
        x = x + self.down(functional.gelu(self.up(rows)))
        return x if self.pre else self.norms[1](x)


@pytest.mark.parametrize("pre", [True, False])
@torch.no_grad()
def test_a_model_lowered_to_the_kernel_answers_as_before(pre: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    model = Model(pre).eval()
    source = capture(from_module(copy.deepcopy(model).half(), lambda batch: (torch.randn(batch, 5, 256).half(),)))
    graph = with_twins(optimise(source, Options(), Silent()).graph, torch.device("cpu"), False)[0]
    lowered, f = with_encoders(with_small_linears(graph))
    (call,) = [node for node in lowered.graph.nodes if called(node, "encoder")]
    assert call.args[3] == 4
    call.target = functools.partial(encode_packed, f=f, cluster=f.slices)
    call.target.__name__ = "encode"
    lowered.recompile()
    (x,) = source.inputs(2)
    (found,), want, plain = lowered(x), model.double()(x.double()), source.graph(x)[0].double()
    assert (found - want).abs().max() <= 2 * (plain - want).abs().max()


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")
@pytest.mark.parametrize("f", [*FORMS, form(width=512, heads=8, hidden=2048, steps=10), form(width=512, hidden=4096)])
def test_the_kernel_compiles_for_a_gpu(f: Form) -> None:
    assert f.able()
    for cluster in f.clusters():
        assert nvrtc.build(encoder.HERE / "cuda.cu", f.macros(cluster), "sm_90").read_bytes()[:4] == b"\x7fELF"


def test_what_the_kernel_can_not_take() -> None:
    changes = [
        {"steps": 17}, {"width": 128, "heads": 2}, {"dtype": torch.float32}, {"heads": 16}, {"hidden": 520}, {"hidden": 4096},
        {"activation": 0},
    ]  # fmt: skip
    assert not any(form(**change).able() for change in changes)


def test_missing_says_which_gpu_it_needs() -> None:
    assert "sm_90 or newer, not sm_80" in str(nvrtc.missing_for_clusters("sm_80"))
