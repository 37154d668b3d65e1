"""The attention kernel against its contract, and the fusion on the ways in which attention is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from grc.compiler import as_model, optimise, traced
from grc.errors import LoweringError
from grc.kernels import cpp
from grc.kernels.attention import ATTENTION, SILU, SOFTMAX, STRICT_SOFTMAX
from grc.kernels.attention.cases import arguments, padding, relative, share
from grc.kernels.attention.pattern import Attention
from grc.lowering.engine import Lowerable, Target
from grc.lowering.inductor import Inductor
from grc.options import Options
from grc.passes.fuse import Fuse
from grc.passes.normalise import Normalise
from grc.progress import Silent
from grc.runtime.engines import load_part
from tests.kernels.contract import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def answer(args: tuple[Any, ...], isa: str | None = None) -> Tensor:
    """The kernel's answer, in memory that held NaN before."""
    torch.full_like(ATTENTION.reference(*args), torch.nan)
    return cpp.call(ATTENTION, *args, isa=isa)


def check(args: tuple[Any, ...], isa: str | None = None) -> None:
    """The error against fp64 is at most twice that of torch's own float32, give or take the last bit; NaN stays."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    got, plain, exact = answer(args, isa), ATTENTION.reference(*args), ATTENTION.reference(*wide)
    assert got.shape == exact.shape and got.dtype == torch.float32 and got.is_contiguous()
    assert torch.equal(got.isnan(), exact.isnan())
    here = ~exact.isnan()
    if here.any():
        error, theirs = (got - exact)[here].abs().max().item(), (plain - exact)[here].abs().max().item()
        assert error <= 2 * theirs + torch.finfo(torch.float32).eps * exact[here].abs().max().item(), (error, theirs)


@pytest.mark.parametrize("case", ATTENTION.cases, ids=lambda case: case.name)
def test_cases(case: Any, isa: str, threads: int) -> None:
    check(tuple(case.build(7)), isa)


@pytest.mark.parametrize("kind", [SOFTMAX, STRICT_SOFTMAX, SILU])
def test_every_remainder_of_a_tile(isa: str, kind: int) -> None:
    sizes = itertools.product((1, 5, 7, 13), (1, 16, 37), (3, 16, 33))
    for seed, (queries, keys, width) in enumerate(sizes):
        causal = seed % 2 == 0
        check(arguments(seed, 2, queries, 2, width, keys, 2 * width + 1, relative, kind=kind, causal=causal), isa)


def test_threads_do_not_change_the_answer() -> None:
    before = torch.get_num_threads()
    try:
        for batch, steps in ((1, 200), (33, 41)):
            args = arguments(1, batch, steps, 1, 64, causal=True)
            torch.set_num_threads(1)
            one = answer(args)
            torch.set_num_threads(2)
            assert torch.equal(answer(args), one)
    finally:
        torch.set_num_threads(before)


def test_views_are_read_where_they_are(isa: str) -> None:
    for args in (arguments(3, 2, 19, 4, 20, bias=relative), arguments(3, 2, 19, 4, 20, 23, bias=padding, kind=SILU)):
        for d in range(3):
            spread = list(args)
            spread[d] = torch.stack([args[d], args[d] - 1], -1)[..., 0]  # no dimension is contiguous
            check(tuple(spread), isa)
            spread[d] = args[d].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
            check(tuple(spread), isa)
            spread[d] = args[d][:, :, :1].expand(args[d].shape)  # heads that share one
            check(tuple(spread), isa)
        mask = args[3]
        check((*args[:3], torch.stack([mask, mask], -1)[..., 0], *args[4:]), isa)
        check((*args[:3], mask[..., :1], *args[4:]), isa)


def test_a_query_that_sees_no_key() -> None:
    for kind, wanted in ((SOFTMAX, 0.0), (STRICT_SOFTMAX, math.nan), (SILU, 0.0)):
        args = arguments(5, 3, 20, 2, 16, bias=padding, kind=kind, causal=True)
        assert torch.equal(answer(args)[0], torch.full((20, 32), wanted)) or math.isnan(wanted)
        assert answer(args)[0].isnan().all() == math.isnan(wanted)


def test_large_scores_stay_finite(isa: str) -> None:
    q, k, v, *rest = arguments(2, 2, 30, 2, 16, bias=relative)
    for scale in (50.0, 1e4):
        check((q * scale, k * scale, v, *rest), isa)
        check((q * scale, k, v, rest[0], None, 1.0, 0.5, SILU, False), isa)


def test_nan_and_infinity_go_through(isa: str) -> None:
    for kind in (SOFTMAX, SILU):
        args = arguments(2, 2, 30, 2, 16, kind=kind, causal=True)
        args[2][0, 0, 0, 3] = math.inf
        args[0][1, 5, 1, 2] = math.nan
        got = answer(args, isa)
        assert got[0, :, 3].isinf().all() and got[0, :, 4:].isfinite().all()
        assert got[1, 5, 16:].isnan().all() and got[1, :5].isfinite().all() and got[1, 6:].isfinite().all()


def test_refuses_what_does_not_fit(isa: str) -> None:
    q, k, v, _, _, *rest = arguments(0, 2, 6, 2, 16)
    for args, reason in (
        ((q.double(), k, v, None, None), "q is not float32"),
        ((q[0], k, v, None, None), r"q is not \[batch, length, heads, width\]"),
        ((q, k[:1], v, None, None), "k does not fit q"),
        ((q, k, v[:, :5], None, None), "v does not fit q and k"),
        ((q, k, v, torch.zeros(5, 6), None), "bias does not broadcast"),
        ((q, k, v, torch.zeros(1, 1, 1, 1, 6), None), "bias has more than 4 dimensions"),
        ((q, k, v, torch.zeros(6, 6, dtype=torch.int64), None), "bias is neither float32 nor bool"),
        ((q, k, v, None, torch.zeros(6, 6)), "factor belongs to silu"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            cpp.call(ATTENTION, *args, *rest, isa=isa)
    with pytest.raises(RuntimeError, match="kind is 0 to 2"):
        cpp.call(ATTENTION, q, k, v, None, None, 1.0, 1.0, 3, False, isa=isa)
    with pytest.raises(LoweringError, match="no kind 3"):
        ATTENTION.reference(q, k, v, None, None, 1.0, 1.0, 3, False)
    with pytest.raises(LoweringError, match="takes no factor"):
        ATTENTION.reference(q, k, v, None, q, 1.0, 1.0, SOFTMAX, False)


@pytest.mark.parametrize("kind", [SOFTMAX, STRICT_SOFTMAX, SILU])
def test_reference_traces_with_any_batch(kind: int) -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ATTENTION.reference(q, k, v, bias, None, 0.25, 1.0, kind, True)

    *qkv, bias, _, _, _, _, _ = arguments(0, 4, 6, 2, 16, bias=relative)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), tuple(qkv), dynamic_shapes=({0: batch},) * 3, strict=False)
    other = [t[1:] for t in qkv]
    assert torch.equal(program.module()(*other), Module()(*other))


def test_cost_halves_what_causal_skips() -> None:
    assert ATTENTION.cost is not None
    whole = ATTENTION.cost(*arguments(0, 2, 6, 3, 16))
    assert whole.flops == 2 * 2 * 3 * 36 * 32 and whole.bytes == 4 * 4 * 2 * 6 * 3 * 16
    assert ATTENTION.cost(*arguments(0, 2, 6, 3, 16, causal=True)).flops == whole.flops // 2


def test_schema_and_kernel_agree_on_the_c_signature() -> None:
    assert ATTENTION.cpu is not None
    source = " ".join(ATTENTION.cpu.read_text().split())
    assert " ".join(cpp.declaration(ATTENTION.schema).split()) in source


STEPS, HEADS, WIDTH = 6, 2, 16


def fuse(module: nn.Module, *more: Callable[[int], Tensor]) -> tuple[fx.Graph, list[str], list[str | None]]:
    """The graph, what was fused, and why what wasn't; proven, and with nothing left for a second run."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, STEPS, WIDTH, generator=torch.Generator().manual_seed(batch))
        return (x, *(make(batch) for make in more))

    source = traced(as_model(module.eval(), inputs), Silent())
    done = optimise(source, Options(strict=True), Silent(), [Normalise(), Fuse((Attention(),)), Fuse((Attention(),))])
    _, fused, again = done.records
    assert not again.made
    return done.graph.graph, [c.what for c in fused.made], [c.missed for c in fused.missed]


def call_of(module: nn.Module, *more: Callable[[int], Tensor]) -> tuple[set[str], tuple[Any, ...]]:
    """The operators that are left, and the arguments of the one fused call."""
    graph, made, missed = fuse(module, *more)
    assert made == ["attention"] and not missed, (made, missed)
    (call,) = [n for n in graph.nodes if n.target is ATTENTION.overload]
    left = {n.target.overloadpacket.__name__ for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    return left, call.args


def is_causal(args: tuple[Any, ...], bias: bool = False, factor: bool = False) -> bool:
    assert (args[3] is not None, args[4] is not None) == (bias, factor)
    return args[8]


def real(batch: int) -> Tensor:
    """True where a step is padding, never the first."""
    made = torch.rand(batch, STEPS, generator=torch.Generator().manual_seed(batch)) < 0.4
    made[:, 0] = False
    return made


def steps(batch: int) -> Tensor:
    return torch.randn(batch, STEPS, generator=torch.Generator().manual_seed(batch))


class Wrapped(nn.Module):
    """A model of one projection to q, k and v, and a function of it."""

    def __init__(self, attend: Callable[..., Tensor], width: int = 3 * WIDTH):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, width)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attend = attend
        self.register_buffer("causal", torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        return self.out(self.attend(self, self.qkv(x), *masks))


def split(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.view(x.shape[0], STEPS, HEADS, -1).transpose(1, 2) for t in x.chunk(3, -1))


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], STEPS, WIDTH)


def sdpa(m: Wrapped, x: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*split(x), is_causal=True))


def sdpa_per_head(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = x.view(x.shape[0], STEPS, HEADS, -1).chunk(3, -1)
    return merged(F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))


def sdpa_unbound(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = x.view(x.shape[0], STEPS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return merged(F.scaled_dot_product_attention(q, k, v))


def by_matmul(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    q, k, v = split(x)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
    scores = scores.masked_fill(m.causal | pad[:, None, None], -torch.inf)
    return merged(torch.matmul(torch.softmax(scores, -1), v))


def by_large_number(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    q, k, v = split(x)
    scores = q * 0.3 @ k.transpose(-1, -2) + pad[:, None, None].float() * -1e9
    return merged(scores.softmax(-1) @ v)


def by_einsum(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = (t.view(x.shape[0], STEPS, HEADS, -1) for t in x.chunk(3, -1))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(m.causal, -1e9).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def by_bmm(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, STEPS, WIDTH // HEADS) for t in split(x))
    added = torch.zeros(STEPS, STEPS).masked_fill(m.causal, -torch.inf)
    scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=0.25)
    return merged(torch.bmm(scores.softmax(-1), v).view(x.shape[0], HEADS, STEPS, -1))


def by_shifted_softmax(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    scores = q @ k.transpose(-1, -2) * 0.25
    return merged((scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v)


def by_shift_over_queries(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    scores = q @ k.transpose(-1, -2) * 0.25
    return merged((scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v)


def one_head(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, -1)
    return torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v


def heads_first(m: Wrapped, x: Tensor, *bias: Tensor) -> Tensor:
    """As AutoInt stacks its heads: [H, B, L, D]."""
    q, k, v = (torch.stack(t.split(WIDTH // HEADS, 2)) for t in x.chunk(3, -1))
    weights = torch.einsum("bnik,bnjk->bnij", q, k)
    weights = F.softmax(weights + bias[0][:, None] if bias else weights, -1)
    return torch.cat(torch.split(torch.einsum("bnij,bnjk->bnik", weights, v), 1), -1).squeeze(0)


def hstu(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    q, k, v = (t.view(x.shape[0], STEPS, HEADS, -1) for t in F.silu(x).chunk(3, -1))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + m.out.weight[:STEPS, :STEPS]
    weights = F.silu(scores) / STEPS * ((~m.causal).float() * (~pad).float()[:, None, None])
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


VIEWS = {"transpose", "permute", "reshape", "select", "contiguous"}
OTHERS = {"matmul", "bmm", "baddbmm", "einsum", "softmax", "masked_fill", "scaled_dot_product_attention"}


def test_encoder_layer_loses_its_transpositions() -> None:
    left, _ = call_of(nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, norm_first=True))
    assert not left & (VIEWS | OTHERS)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool) -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            causal = torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1)
            return self.attention(x * 2, x, x, attn_mask=causal, key_padding_mask=pad, need_weights=need_weights)[0]

    left, args = call_of(Attend(), real)
    assert is_causal(args, bias=True)
    assert not left & ((VIEWS | OTHERS) - {"reshape", "masked_fill"})


@pytest.mark.parametrize("attend", [sdpa, sdpa_per_head, sdpa_unbound, by_einsum, by_bmm, by_shifted_softmax, one_head])
def test_fuses(attend: Callable[..., Tensor]) -> None:
    left, args = call_of(Wrapped(attend))
    assert not left & (VIEWS | OTHERS)
    assert is_causal(args) == (attend in (sdpa, by_einsum, by_bmm))


def test_fuses_heads_that_come_first() -> None:
    left, args = call_of(Wrapped(heads_first))
    assert not left & OTHERS and not is_causal(args)


def test_fuses_a_bias_that_all_heads_share() -> None:
    """rectools' HSTU adds a bias for positions to one for times, [B, N, M], and then both to the scores of every head."""

    def biased(m: nn.Module, x: Tensor, times: Tensor) -> Tensor:
        q, k, v = (t.view(x.shape[0], STEPS, HEADS, -1) for t in F.silu(x).chunk(3, -1))
        bias = (times[:, :, None] - times[:, None, :]).abs() + m.out.weight[:STEPS, :STEPS].unsqueeze(0)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + bias.unsqueeze(1)
        return torch.einsum("bhnm,bmhd->bnhd", F.silu(scores) / STEPS * (~m.causal).float(), v).flatten(2)

    left, args = call_of(Wrapped(biased), lambda batch: torch.rand(batch, STEPS))
    assert not left & OTHERS and args[7] == SILU


@pytest.mark.parametrize("attend", [by_matmul, by_large_number, hstu])
def test_fuses_masks(attend: Callable[..., Tensor]) -> None:
    left, args = call_of(Wrapped(attend), real)
    assert not left & ((VIEWS | OTHERS) - {"reshape"})
    assert is_causal(args, bias=True, factor=attend is hstu) == (attend is not by_large_number)
    assert args[7] == (SILU if attend is hstu else STRICT_SOFTMAX)


def shared_keys(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    return merged(F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True))


def active_dropout(m: Wrapped, x: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*split(x), dropout_p=1e-7))


def shallow_mask(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    return merged((q @ k.transpose(-1, -2)).masked_fill(m.causal, -100.0).softmax(-1) @ v)


def read_weights(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return merged(weights @ v) + weights.sum((1, 2, 3))[:, None, None]


def scaled_mask(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    q, k, v = split(x)
    return merged(((q @ k.transpose(-1, -2) + pad[:, None, None].float()) * 0.3).softmax(-1) @ v)


def masked_softmax(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    q, k, v = split(x)
    return merged(((q @ k.transpose(-1, -2)).softmax(-1) * pad[:, None, None].float()) @ v)


def capped(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    """As Gemma 2 does."""
    q, k, v = split(x)
    scores = torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 50.0) * 50.0
    return merged(scores.masked_fill(pad[:, None, None], -torch.inf).softmax(-1) @ v)


def with_sink(m: Wrapped, x: Tensor, pad: Tensor) -> Tensor:
    """As gpt-oss does: a logit of each head takes its share of the weights, and has no value."""
    q, k, v = split(x)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(pad[:, None, None], -torch.inf)
    sink = m.out.bias[:HEADS].view(1, -1, 1, 1).expand(x.shape[0], -1, STEPS, 1)
    scores = torch.cat([scores, sink], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return merged(scores.softmax(-1)[..., :-1] @ v)


def sink_first(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    sink = m.out.bias[:HEADS].view(1, -1, 1, 1).expand(x.shape[0], -1, STEPS, 1)
    return merged(torch.cat([sink, q @ k.transpose(-1, -2)], -1).softmax(-1)[..., 1:] @ v)


def fewer_values(m: Wrapped, x: Tensor) -> Tensor:
    q, k, v = split(x)
    return merged((q @ k.transpose(-1, -2)).softmax(-1)[..., 1:] @ v[:, :, 1:])


def double_precision(m: Wrapped, x: Tensor) -> Tensor:
    return sdpa(m, x.double()).float()


@pytest.mark.parametrize(
    ("attend", "masks", "reason"),
    [
        (shared_keys, (), "queries share keys in groups"),
        (active_dropout, (), "dropout of 1e-07 is active"),
        (shallow_mask, (), "hidden scores are set to -100.0, not to -inf or to -1e+09 or less"),
        (read_weights, (), "the attention weights are read outside of the attention too"),
        (scaled_mask, (real,), "the mask is multiplied by a number"),
        (masked_softmax, (real,), "what softmax gives is multiplied by a mask"),
        (capped, (real,), "the scores are capped by tanh"),
        (with_sink, (real,), "other logits, as a sink's, are joined to the scores"),
        (sink_first, (), "other logits, as a sink's, are joined to the scores"),
        (fewer_values, (), "the weights of some keys are left out"),
        (double_precision, (), "values are float64"),
        (heads_first, (steps,), "a mask is added to scores whose first dimension are the heads"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_says_why_not(attend: Callable[..., Tensor], masks: tuple[Callable[[int], Tensor], ...], reason: str) -> None:
    _, made, missed = fuse(Wrapped(attend), *masks)
    assert not made and reason in missed


def test_what_differs_from_key_to_key_is_no_shift() -> None:
    _, made, missed = fuse(Wrapped(by_shift_over_queries))
    assert not made and not missed


def test_other_products_are_not_attention() -> None:
    def pooled(m: Wrapped, x: Tensor) -> Tensor:
        q, k, _ = x.chunk(3, -1)
        return torch.relu(q @ k.transpose(1, 2)) @ k

    assert fuse(Wrapped(pooled))[1:] == ([], [])


def test_factors_belong_to_the_rows_they_came_with() -> None:
    args = arguments(4, 3, 20, 2, 16, factor=share, kind=SILU)
    without = answer((*args[:4], None, *args[5:]))
    assert not torch.allclose(without, answer(args))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.engine
def test_half_precision_fuses_and_is_written_out_for_the_cpu(tmp_path: Any) -> None:
    """The C++ kernel computes in float32; the one for a GPU takes the fused call."""
    torch.manual_seed(0)
    model = Half().half().eval()
    source = traced(as_model(model, lambda batch: (torch.randn(batch, 5, 16).half(),)), Silent())
    graph = optimise(source, Options(), Silent()).graph
    assert [n for n in graph.graph.nodes if n.target is ATTENTION.overload]
    lowerable = Lowerable(graph, source.inputs(7), source.shapes())
    built = Inductor(packed=True).build(lowerable, Target("cpu", cpp.target_isa(), 2), tmp_path)
    run = load_part({"engine": built.engine, "file": built.file}, tmp_path, built.constants)
    (x,) = source.inputs(3)
    torch.testing.assert_close(run([x])[0], model(x).detach(), rtol=1e-2, atol=1e-2)
