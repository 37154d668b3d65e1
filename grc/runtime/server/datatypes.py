"""The protocol's names for dtypes, and what its bytes and its JSON must be to become a tensor of one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from grc.runtime.server.refusal import invalid

NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
# numpy has no bfloat16: its bits travel as int16.
ARRAYS = {dtype: np.dtype(np.int16 if dtype is torch.bfloat16 else str(dtype)[6:]) for dtype in NAMES}
INTEGERS, NUMBERS = "iu", "iuf"
LARGEST = 1 << 60  # values; their bytes are counted in 64 bits


def check_shape(name: str, shape: list[int]) -> None:
    """Raises a refusal for sizes that no tensor has: a zero among them makes it empty, but not its strides small."""
    if any(size < 0 for size in shape):
        raise invalid(f'input "{name}" has no shape: {shape}')
    if math.prod(max(1, size) for size in shape) >= LARGEST:
        raise invalid(f'input "{name}" has a shape that is too large: {shape}')


def check_size(name: str, size: int, shape: list[int], dtype: torch.dtype) -> None:
    """Raises a refusal where little-endian bytes are not as many as their shape needs."""
    needed = math.prod(shape) * ARRAYS[dtype].itemsize
    if size != needed:
        raise invalid(f'input "{name}" has {size} bytes; shape {shape} of {NAMES[dtype]} has {needed}')


@np.errstate(over="ignore", invalid="ignore")  # what a dtype does not hold becomes infinite, and nothing is printed
def bytes_of_list(name: str, data: Any, shape: list[int], dtype: torch.dtype) -> bytes:
    """Little-endian bytes of numbers as they stand in JSON, flat or nested. Raises a refusal where they don't fit."""
    try:
        found = np.asarray(data)
    except ValueError:
        raise invalid(f'input "{name}" has rows of different lengths') from None
    if found.size != math.prod(shape):
        raise invalid(f'input "{name}" has {found.size} values; shape {shape} has {math.prod(shape)}')
    if found.dtype == ARRAYS[dtype] and dtype is not torch.bfloat16:
        return found.tobytes()
    kind = found.dtype.kind
    if dtype is torch.bool:
        fits = kind == "b" or (kind in INTEGERS and bool(((found == 0) | (found == 1)).all()))
    else:
        fits = kind in (NUMBERS if dtype.is_floating_point else INTEGERS)
    if found.size and not fits:
        # Integers that no integer dtype holds arrive as floats too.
        whole = kind == "f" and not dtype.is_floating_point and not bool((found % 1).any())
        what = "floating-point numbers" if kind == "f" else "values that are no numbers of its type"
        what = "a value that is too large" if whole and abs(found).max() >= 2.0**63 else what
        raise invalid(f'input "{name}" has {what}; the model takes {NAMES[dtype]}')
    if not dtype.is_floating_point and dtype is not torch.bool and found.size:
        limits = np.iinfo(ARRAYS[dtype])
        if found.min() < limits.min or found.max() > limits.max:
            raise invalid(f'input "{name}" has a value that is too large; the model takes {NAMES[dtype]}')
    if dtype is torch.bfloat16:
        return array_of(torch.from_numpy(found.astype(np.float32)).to(dtype)).tobytes()
    return found.astype(ARRAYS[dtype]).tobytes()


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Contiguous, and bfloat16 by its bits."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def plain_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Flat, as orjson writes it: the shortest digits that give the same number back."""
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().contiguous().reshape(-1).numpy()
