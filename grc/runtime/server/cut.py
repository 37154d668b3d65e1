"""Cut: one request's part of a batch's answer, cut when it is needed and as what is needed: tensors, bytes or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import torch

from grc.runtime.server.datatypes import array_of, plain_array


class Whole:
    """A batch's answer. Its bytes and its numbers' digits are written once, and not for each of its requests."""

    def __init__(self, tensors: Sequence[torch.Tensor], dims: Sequence[int | None], rows: int):
        self.tensors, self.dims, self.rows = tensors, dims, rows
        self.bytes: dict[int, bytes] = {}
        self.digits: dict[int, list[bytes]] = {}

    def bytes_of(self, index: int) -> bytes:
        if index not in self.bytes:
            self.bytes[index] = array_of(self.tensors[index]).tobytes()
        return self.bytes[index]

    def digits_of(self, index: int) -> list[bytes]:
        """Each number as orjson writes it: the shortest digits that give the same number back."""
        if index not in self.digits:
            text = orjson.dumps(plain_array(self.tensors[index]), option=orjson.OPT_SERIALIZE_NUMPY)
            self.digits[index] = text[1:-1].split(b",") if len(text) > 2 else []
        return self.digits[index]


class Cut(Sequence[torch.Tensor]):
    """The rows from `start` to `stop` of a batch's answer."""

    __slots__ = ("start", "stop", "whole")

    def __init__(self, whole: Whole, start: int, stop: int):
        self.whole, self.start, self.stop = whole, start, stop

    @classmethod
    def all_of(cls, answer: Sequence[torch.Tensor]) -> Cut:
        """An answer that was not merged with others."""
        return answer if isinstance(answer, Cut) else cls(Whole(answer, [None] * len(answer), 1), 0, 1)

    def __len__(self) -> int:
        return len(self.whole.tensors)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        tensor, dim = self.whole.tensors[index], self.whole.dims[index]
        return tensor if dim is None else tensor.narrow(dim, self.start, self.stop - self.start)

    def shape(self, index: int) -> list[int]:
        shape, dim = list(self.whole.tensors[index].shape), self.whole.dims[index]
        if dim is not None:
            shape[dim] = self.stop - self.start
        return shape

    def packed(self, index: int) -> bytes:
        if self.whole.dims[index]:  # the rows are not one piece
            return array_of(self[index]).tobytes()
        return self.piece(self.whole.bytes_of(index), index)

    def json(self, index: int) -> bytes:
        """Its numbers as a flat JSON array."""
        if self.whole.dims[index]:
            return orjson.dumps(plain_array(self[index]), option=orjson.OPT_SERIALIZE_NUMPY)
        return b"[%b]" % b",".join(self.piece(self.whole.digits_of(index), index))

    def piece(self, everything: Any, index: int) -> Any:
        if self.whole.dims[index] is None:
            return everything
        width = len(everything) // self.whole.rows
        return everything[self.start * width : self.stop * width]
