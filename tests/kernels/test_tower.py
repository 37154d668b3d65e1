"""The tower's kernel, thread by thread on a CPU: its answers against float64, and the same bits in every order of events."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grc.kernels import nvrtc, tower
from grc.kernels.packed_linear.activations import GELU, NONE, PRELU, RELU, SIGMOID, SILU, TANH
from grc.kernels.tower import Dense, Form, Layer
from tests.kernels.emulate import emulate


def form(*layers: Dense, final: int = NONE, dtype: torch.dtype = torch.float16) -> Form:
    found = Form.of(dtype, layers, final)
    assert found is not None
    return found


def parameters(f: Form) -> list[Layer]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(f.dtype)

    return [
        Layer(
            random(dense.columns, dense.depth, std=1 / math.sqrt(dense.depth)),
            None if dense.activation == GELU else random(dense.columns, std=0.3),
            random(dense.columns, std=0.3) if dense.activation == PRELU else None,
        )
        for dense in f.layers
    ]


@functools.cache
def emulated(f: Form, rows: int) -> ctypes.CDLL:
    found = emulate("tower", tower.HERE, f.macros(rows))
    found.climb_tower.restype = ctypes.c_char_p
    return found


def climb(
    x: Tensor, layers: list[Layer], f: Form, rows: int, add: Tensor | None = None, seed: int = 0
) -> Tensor:  # fmt: skip
    y = torch.full((x.shape[0], f.layers[-1].columns), torch.nan, dtype=x.dtype)
    weights, vectors = tower.pack(layers, f)

    def at(t: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    def step(t: Tensor | None) -> ctypes.c_longlong:
        return ctypes.c_longlong(0 if t is None else t.stride(0))

    fault = emulated(f, rows).climb_tower(
        at(x), step(x), at(add), step(add), at(y), at(weights), at(vectors), len(x), seed
    )
    assert fault is None, fault.decode()
    return y


FORMS = {
    "deepfm": form(Dense(624, 400, RELU), Dense(400, 400, RELU), Dense(400, 1, NONE), final=SIGMOID),
    "dcn": form(
        Dense(200, 200, NONE, True), Dense(200, 200, NONE, True), Dense(200, 136, RELU), Dense(136, 3, SIGMOID)
    ),
    "din": form(Dense(96, 200, PRELU), Dense(200, 80, PRELU), Dense(80, 1, NONE), dtype=torch.bfloat16),
    "narrow": form(Dense(13, 40, GELU), Dense(40, 8, TANH)),
    "wide": form(Dense(32, 1024, SILU), Dense(1024, 300, RELU), Dense(300, 260, NONE)),
}
CASES = [pytest.param(f, rows, id=f"{name}-{rows}") for name, f in FORMS.items() for rows in f.rows()]
CASES.append(pytest.param(replace(FORMS["dcn"], cluster=16), 16, id="dcn-16-16"))


@pytest.mark.parametrize("f, rows", CASES)
def test_answers_and_bits_in_any_order_of_events(f: Form, rows: int) -> None:
    layers = parameters(f)
    x = torch.randn(rows + 3, f.layers[0].depth, generator=torch.Generator().manual_seed(2)).to(f.dtype)
    add = torch.randn(len(x), f.layers[-1].columns, generator=torch.Generator().manual_seed(3)).to(f.dtype)
    wide = [Layer(*(None if t is None else t.double() for t in layer)) for layer in layers]
    for more in (None, add):
        want = tower.reference(x.double(), wide, f, None if more is None else more.double())
        plain = tower.reference(x, layers, f, more).double()
        found = climb(x, layers, f, rows, more)
        assert (found - want).abs().max() <= 2 * (plain - want).abs().max()
    assert torch.equal(climb(x, layers, f, rows, add, seed=1), found)


def test_rows_that_do_not_lie_side_by_side_and_rows_of_others() -> None:
    f = FORMS["narrow"]
    layers = parameters(f)
    wide = torch.randn(20, 40, generator=torch.Generator().manual_seed(2)).half()
    x = wide[:, :13]
    clean = climb(x.contiguous(), layers, f, 16)
    assert torch.equal(climb(x, layers, f, 16), clean)
    wide[:, 13:] = torch.nan
    x[3, 5] = torch.inf
    found = climb(x, layers, f, 16)
    assert torch.equal(found[4:], clean[4:]) and torch.equal(found[:3], clean[:3])
    want = tower.reference(
        x[3:4].double(), [Layer(*(None if t is None else t.double() for t in one)) for one in layers], f
    )
    assert torch.equal(found[3].isnan(), want[0].isnan())


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")
@pytest.mark.parametrize("f, rows", CASES)
def test_the_kernel_compiles_for_a_gpu(f: Form, rows: int) -> None:
    assert f.able()
    assert nvrtc.build(tower.HERE / "cuda.cu", f.macros(rows), "sm_90").read_bytes()[:4] == b"\x7fELF"


def test_what_the_kernel_can_not_take() -> None:
    relu = Dense(64, 64, RELU)
    refused = [
        [relu, Dense(32, 64, RELU)],
        [Dense(64, 32, NONE, True), Dense(32, 1, NONE)],
        [Dense(8192, 8192, RELU), Dense(8192, 64, RELU)],
    ]
    assert not any(Form.of(torch.float16, layers, NONE) for layers in refused)
    assert Form.of(torch.float16, [relu, relu], NONE) and not Form.of(torch.float32, [relu, relu], NONE)


def test_more_blocks_only_where_fewer_have_no_room() -> None:
    assert form(Dense(64, 64, RELU), Dense(64, 64, RELU)).cluster == 8
    assert form(Dense(624, 1024, RELU), Dense(1024, 1024, RELU), Dense(1024, 512, RELU)).cluster == 16
