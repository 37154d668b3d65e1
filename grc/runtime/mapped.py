"""Mapped memory: pinned host memory as the device sees it, for kernels that read and write it in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Bytes up to which a kernel moves a request faster than the copy engine does, whose start and end a graph waits for: see
# benchmarks/gpu_call.py.
BY_KERNEL = 2 << 20
TOLD = 16  # numbers: a constant of up to eight would be written into the code by Inductor, and never be read
SMALL = 16 << 10  # bytes that one block copies before a second launch would have
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
    """Copy every source into its target: small ones in one launch, of which each takes 64 KB with one block, for which
    host memory is too far away; others by as many blocks as they fill. Targets are contiguous."""
    pairs = [(target, source.contiguous()) for target, source in zip(targets, sources, strict=True) if target.numel()]
    small = [pair for pair in pairs if pair[0].nbytes <= SMALL]
    alone = pairs if len(small) == 1 else [pair for pair in pairs if pair[0].nbytes > SMALL]
    for target, source in alone:
        words = widest([target, source])
        torch.bitwise_or(as_words(source, words), 0, out=as_words(target, words))
    if len(small) > 1:
        words = widest([tensor for pair in small for tensor in pair])
        torch._foreach_copy_(*([as_words(tensor, words) for tensor in side] for side in zip(*small, strict=True)))


def widest(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest words that all of these are made of."""
    return next(w for w in WHOLE if all(t.nbytes % w.itemsize == t.data_ptr() % w.itemsize == 0 for t in tensors))


def as_words(tensor: torch.Tensor, words: torch.dtype) -> torch.Tensor:
    return tensor.view(-1).view(words)
