"""Sizes and edge cases of attention: every kind, masks of every shape, views of one projection, no query, no row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grc.kernels.fusion import Case

Mask = Callable[[torch.Generator, Sequence[int]], Tensor]


def arguments(
    seed: int,
    batch: int,
    queries: int,
    heads: int,
    width: int,
    keys: int | None = None,
    values: int | None = None,
    bias: Mask | None = None,
    factor: Mask | None = None,
    kind: int = 0,
    causal: bool = False,
) -> tuple[Any, ...]:
    """Arguments for q [batch, queries, heads, width]. Where sizes allow, q, k and v are thirds of one tensor."""
    make = torch.Generator().manual_seed(seed)
    if keys is None and values is None:
        packed = torch.randn(batch, queries, 3, heads, width, generator=make)
        q, k, v = packed.unbind(2)
    else:
        m = queries if keys is None else keys
        q = torch.randn(batch, queries, heads, width, generator=make)
        k = torch.randn(batch, m, heads, width, generator=make)
        v = torch.randn(batch, m, heads, values or width, generator=make)
    shape = (batch, heads, queries, k.shape[1])
    masks = [None if mask is None else mask(make, shape) for mask in (bias, factor)]
    return (q, k, v, *masks, width**-0.5, 1 / max(shape[3], 1) if kind == 2 else 1.0, kind, causal)


def relative(make: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Additive, [N, M]."""
    return torch.randn(*shape[2:], generator=make)


def each_head(make: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Additive, [H, N, M], keys apart."""
    return torch.randn(shape[1], shape[3], shape[2], generator=make).transpose(1, 2)


def padding(make: torch.Generator, shape: Sequence[int]) -> Tensor:
    """True where a key stands, [B, 1, 1, M]; the first user has none."""
    real = torch.rand(shape[0], 1, 1, shape[3], generator=make) < 0.7
    real[0] = False
    return real


def blocked(make: torch.Generator, shape: Sequence[int]) -> Tensor:
    """0 or -inf, [B, 1, N, M], one row all -inf."""
    mask = torch.where(torch.rand(shape[0], 1, *shape[2:], generator=make) < 0.6, 0.0, -torch.inf)
    mask[:, :, shape[2] // 2] = -torch.inf
    return mask


def share(make: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Factors, [B, 1, 1, M]."""
    return torch.rand(shape[0], 1, 1, shape[3], generator=make)


def standing(make: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Factors 0 and 1, [B, H, N, M]."""
    return torch.rand(*shape, generator=make) < 0.5


def case(name: str, batch: int, queries: int, heads: int, width: int, **options: Any) -> Case:
    return Case(name, lambda seed: arguments(seed, batch, queries, heads, width, **options))


CASES = (
    case("one step", 3, 1, 2, 16),
    case("one step, silu", 3, 1, 2, 16, kind=2, causal=True),
    case("no rows", 0, 5, 2, 16),
    case("no steps", 2, 0, 2, 16),
    case("no keys", 2, 3, 2, 16, keys=0),
    case("encoder", 2, 10, 8, 64),
    case("encoder, large batch", 65, 10, 4, 32),
    case("long", 1, 301, 2, 40),
    case("long, causal", 2, 257, 1, 128, causal=True),
    case("odd widths", 2, 19, 3, 17, values=5),
    case("width 1", 2, 9, 2, 1),
    case("cross", 3, 4, 2, 24, keys=33),
    case("causal, more keys", 2, 4, 2, 24, keys=33, causal=True),
    case("causal, fewer keys", 2, 33, 2, 24, keys=4, causal=True),
    case("causal bias", 2, 50, 2, 32, bias=relative, causal=True),
    case("bias of each head", 2, 23, 4, 16, bias=each_head),
    case("padding", 3, 20, 2, 16, bias=padding),
    case("padding, causal", 3, 50, 2, 32, bias=padding, causal=True),
    case("blocked", 2, 18, 2, 16, bias=blocked),
    case("strict", 2, 18, 2, 16, bias=relative, kind=1),
    case("strict, blocked", 2, 18, 2, 16, bias=blocked, kind=1),
    case("silu", 2, 20, 2, 32, bias=relative, kind=2),
    case("silu, causal, large batch", 9, 75, 4, 32, bias=relative, factor=share, kind=2, causal=True),
    case("silu, blocked", 2, 18, 2, 16, bias=blocked, factor=standing, kind=2),
)
