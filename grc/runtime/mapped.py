"""Mapped memory: pinned host memory as the device sees it, for kernels that read and write it in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Bytes up to which a kernel moves a request faster than the copy engine does, whose start and end a graph waits for: see
# benchmarks/gpu_call.py.
BY_KERNEL = 2 << 20
TOLD = 16  # numbers: a constant of up to eight would be written into the code by Inductor, and never be read
PIECE = 4 << 10  # bytes that one block copies at once
PIECES = 64, 110  # that one launch of torch's takes, of two lists and of one
WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)  # what is copied is bits, in the widest words that fit


class Memory:
    """Bytes at an address, in the form in which torch takes memory that it does not own."""

    def __init__(self, owner: torch.Tensor):
        self.owner = owner  # as long as torch holds this object, it holds the memory too
        self.__cuda_array_interface__ = {
            "shape": (owner.nbytes,), "typestr": "|u1", "data": (owner.data_ptr(), False), "version": 3,
        }  # fmt: skip


def mapped(host: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in pinned memory, as a tensor of the device over the same memory."""
    if host.numel() == 0:
        return host.to("cuda")
    seen: Any = torch.as_tensor(Memory(host), device="cuda")
    return seen.view(host.dtype).view(host.shape)


def telling(counter: torch.Tensor) -> torch.Tensor:
    """What kernels are given to add to a counter, int64, which need not lie on their device: its address, and the
    complement of it, by which they know that it is one. The rest of TOLD numbers are zeros."""
    address = counter.data_ptr()
    return torch.tensor([address, ~address, *[0] * (TOLD - 2)], dtype=torch.int64)


def copy_by_kernel(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy every source into its target, which is contiguous: all but large ones in one launch, in pieces, each of which
    one block takes; the others by as many blocks as they fill."""
    pairs = [(target, source.contiguous()) for target, source in zip(targets, sources, strict=True) if target.numel()]
    pairs.sort(key=lambda pair: pair[0].nbytes)

    def pieces() -> int:
        return sum(-(-target.nbytes // PIECE) for target, _ in pairs)

    while len(pairs) == 1 or (pieces() > PIECES[0] and pairs[-1][0].nbytes > PIECE):
        target, source = pairs.pop()
        words = widest([target, source])
        torch.bitwise_or(as_words(source, words), 0, out=as_words(target, words))
    if pairs:
        words = widest([tensor for pair in pairs for tensor in pair])
        each = PIECE // words.itemsize
        sides = zip(*pairs, strict=True)
        into, out_of = ([piece for t in side for piece in as_words(t, words).split(each)] for side in sides)
        torch._foreach_copy_(into, out_of)


def find_strange(tensors: Sequence[torch.Tensor], flag: torch.Tensor, one: torch.Tensor) -> None:
    """Set the flag, a float32, to 1 where a number is NaN or infinite as a float32; else it stays. One launch a dtype.

    It is the check of torch's gradient scaler, which writes back what it reads, unchanged for a scale of one, and takes
    neither bfloat16 nor float8.
    """
    tensors = [t if t.dtype in (torch.float32, torch.float16) else t.float() for t in tensors]
    for dtype in {tensor.dtype: None for tensor in tensors}:
        flat = [tensor.contiguous().view(-1) for tensor in tensors if tensor.dtype is dtype]
        left_over = max(1, PIECES[1] - len(flat))  # each tensor may end in a piece that is not whole
        each = max(PIECE // dtype.itemsize, -(-sum(t.numel() for t in flat) // left_over))
        pieces = [piece for tensor in flat for piece in tensor.split(each) if piece.numel()]
        if pieces:
            torch._amp_foreach_non_finite_check_and_unscale_(pieces, flag, one)


def widest(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest words that all of these are made of."""
    return next(w for w in WHOLE if all(t.nbytes % w.itemsize == t.data_ptr() % w.itemsize == 0 for t in tensors))


def as_words(tensor: torch.Tensor, words: torch.dtype) -> torch.Tensor:
    return tensor.view(-1).view(words)
