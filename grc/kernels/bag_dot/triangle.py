"""Where the products of pairs lie in an answer of `bag_dot`, for its Triton kernels."""

from __future__ import annotations

from grc.kernels.rows import tl, triton


@triton.jit
def triangle(n, N: tl.constexpr, UPPER: tl.constexpr, DIAGONAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The place of the product of rows n[i] and n[j] among the pairs of N rows, and whether it is one of the triangle."""
    i = n[:, None]
    j = n[None, :]
    if UPPER:
        shift = i * (2 * N - i + 1) // 2 - i if DIAGONAL else i * (2 * N - i - 1) // 2 - i - 1
        chosen = (j >= i if DIAGONAL else j > i) & (j < N)
    else:
        shift = i * (i + 1) // 2 if DIAGONAL else i * (i - 1) // 2
        chosen = (j <= i if DIAGONAL else j < i) & (i < N)
    return shift + j, chosen


@triton.jit
def write(line, pair, chosen, products, END: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the triangle of `products` in a row of the answer, and zeros from END, where it ends, to WIDTH."""
    tl.store(line + pair, products.to(line.dtype.element_ty), mask=chosen)
    if REST > 0:
        beyond = tl.arange(0, REST)
        tl.store(line + END + beyond, tl.zeros([REST], line.dtype.element_ty), mask=beyond < WIDTH - END)
