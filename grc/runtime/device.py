"""Weights on a GPU: each piece of memory is uploaded once, however many parts and views read it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from grc.runtime.mapped import mapped

SMALL = 64 << 20  # bytes: what is no larger is no table, and is read too often to lie anywhere but on the device
RESERVE = 2 << 30  # bytes of the device left to graphs, workspaces and activations
CHUNK = 32 << 20  # bytes: two of them in pinned memory keep the bus busy while the next is read from disk


class DeviceWeights:
    """Constants on one device. Tensors that share memory on the host share it there too.

    A table that does not fit on a GPU stays in the host's memory, pinned, and kernels read its rows from there: at the
    speed of the bus, and of address translation where rows lie far apart.

    What was uploaded is kept, with the host memory that it came from, as long as this object lives.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: set[tuple[int, int]] = set()  # address and bytes of what did not fit
        self.pieces: dict[tuple[int, int], tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, contiguous: a view of an upload where its memory is there already."""
        tensor = tensor.detach()
        if tensor.device == self.device or tensor.numel() == 0:
            return tensor.to(self.device)
        if not tensor.is_contiguous():
            return tensor.to(self.device).contiguous()
        memory = tensor.untyped_storage()
        key = memory.data_ptr(), memory.nbytes()
        if key not in self.pieces:
            self.pieces[key] = memory, self.upload(memory)
        empty = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return empty.set_(self.pieces[key][1], tensor.storage_offset(), tensor.shape, tensor.stride())

    def upload(self, memory: torch.UntypedStorage) -> torch.UntypedStorage:
        source = torch.empty(0, dtype=torch.uint8).set_(memory)  # type: ignore[call-overload]
        if self.device.type == "cuda" and not fits(len(source)):
            self.kept.add((memory.data_ptr(), len(source)))
            return mapped(source.pin_memory()).untyped_storage()
        target = torch.empty(len(source), dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda" and len(source) > CHUNK:
            copy_in_chunks(source, target)
        else:
            target.copy_(source)
        return target.untyped_storage()

    def on_host(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of the host's memory behind these tensors that did not fit on the device."""
        pieces = {(memory.data_ptr(), memory.nbytes()) for memory in (t.untyped_storage() for t in tensors)}
        return sum(count for _, count in pieces & self.kept)

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes() for memory, _ in self.pieces.values())


def fits(count: int) -> bool:
    """Whether this many bytes can be taken of the current GPU's memory."""
    return count <= SMALL or count + RESERVE <= torch.cuda.mem_get_info()[0]


def copy_in_chunks(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy bytes to a GPU through two pinned buffers: one is filled from the file while the other one travels."""
    stages = [(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
    turns = itertools.cycle(stages)
    for part, place in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
        stage, travelled = next(turns)
        travelled.synchronize()
        stage[: len(part)].copy_(part)
        place.copy_(stage[: len(part)], non_blocking=True)
        travelled.record()
    torch.cuda.current_stream().synchronize()
