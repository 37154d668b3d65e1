"""Weights on a GPU: each piece of memory is uploaded once, however many parts and views read it."""

from __future__ import annotations

import itertools

import torch

CHUNK = 32 << 20  # bytes: two of them in pinned memory keep the bus busy while the next is read from disk


class DeviceWeights:
    """Constants on one device. Tensors that share memory on the host share it there too.

    What was uploaded is kept, with the host memory that it came from, as long as this object lives.
    """

    def __init__(self, device: torch.device):
        self.device = device
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
        target = torch.empty(len(source), dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda" and len(source) > CHUNK:
            copy_in_chunks(source, target)
        else:
            target.copy_(source)
        return target.untyped_storage()

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes() for memory, _ in self.pieces.values())


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
