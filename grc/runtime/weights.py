"""Weights: one safetensors file, written as a stream and read as a memory map that all parts and processes share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from grc.errors import ArtifactError

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.complex64: "C64",
}  # fmt: skip
LINE = 64  # bytes: every tensor whose size is a multiple of a cache line begins on one
CHUNK = 1 << 26  # bytes written at a time, so that writing a table copies no table


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors without holding a second copy of any. Raises ArtifactError for a dtype that safetensors lacks."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ArtifactError(f"weight {name} is {tensor.dtype}, which can't be stored", "convert it in get_model()")
    names = sorted(tensors, key=lambda n: (tensors[n].nbytes % LINE != 0, n))
    header: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for chunk in raw_chunks(tensors[name]):
                file.write(chunk)


def raw_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor's numbers in their order, a chunk at a time and without a copy of the whole where they lie so."""
    flat = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # as a single number cut from a row may have, which torch calls contiguous all the same
        flat = flat.clone(memory_format=torch.contiguous_format)
    for part in flat.view(torch.uint8).split(CHUNK):
        yield memoryview(part.numpy())


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Memory-map every tensor: nothing is read until it is used, and all processes share the pages."""
    if not path.exists():
        raise ArtifactError(f"{path} is missing", "copy the artifact again, or rebuild it")
    with safe_open(str(path), framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
