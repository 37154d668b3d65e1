"""Check a request before a kernel sees it: dtype, rank, sizes, batch, bags, ids, and NaN where an answer shows one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from grc.errors import InputError

MANY = 1024  # forms of requests that are remembered
UNBOUNDED = 2**31 - 1  # a size that no request reaches
FEW = 32  # numbers up to which a Python list is cheaper than two calls of torch, at 2.5 us each


def add_up(lengths: torch.Tensor, rows: int) -> bool:
    """Whether lengths are those of bags that hold `rows` values in all."""
    if lengths.numel() <= FEW:
        told = lengths.flatten().tolist()
        return sum(told) == rows and min(told, default=0) >= 0
    low, high = torch.aminmax(lengths)  # no length above `rows`: then the sum can't overflow
    return low.item() >= 0 and high.item() <= rows and lengths.sum().item() == rows


def ascend(offsets: torch.Tensor, rows: int, ended: bool) -> bool:
    """Whether offsets are those of bags that lie one after the other in `rows` values; `ended` with the last one's end."""
    if offsets.numel() <= FEW:
        told = offsets.tolist()
        end = told[-1]
        return told[0] == 0 and (end == rows if ended else end <= rows) and told == sorted(told)
    low, high = (bound.item() for bound in torch.aminmax(offsets))
    if offsets[0].item() != low or low != 0 or (high != rows if ended else high > rows):
        return False  # and where none is outside of 0..rows, the differences can't overflow
    return offsets.diff().min().item() >= 0


def told(least: int, most: int) -> str:
    """The bounds of a size in words."""
    return f"at least {least}" if most >= UNBOUNDED else f"{least} to {most}" if least else f"up to {most}"


@dataclass(frozen=True)
class Limit:
    """Ids 0..rows-1 in columns start..stop of an input."""

    start: int
    stop: int | None
    rows: int
    table: str
    padding: int | None


class InputCheck:
    """The checks of one artifact, prepared once from its manifest."""

    def __init__(self, manifest: dict[str, Any]):
        self.specs = manifest["inputs"]
        self.names = [spec["name"] for spec in self.specs]
        self.dtypes = [getattr(torch, spec["dtype"]) for spec in self.specs]
        self.ranks = [len(spec["sizes"]) for spec in self.specs]
        self.max_batch = manifest["batch"]["max"]
        self.capped = manifest["batch"]["capped"]
        self.constant = [
            [(dim, size) for dim, size in enumerate(spec["sizes"]) if isinstance(size, int)] for spec in self.specs
        ]
        self.lead = next(
            ((i, dim) for i, spec in enumerate(self.specs) for dim, s in enumerate(spec["sizes"]) if s == "batch"), None
        )
        self.scaled = [
            (i, dim, *((1, 0) if s == "batch" else (s["scale"], s["offset"])))
            for i, spec in enumerate(self.specs)
            for dim, s in enumerate(spec["sizes"])
            if s == "batch" or isinstance(s, dict)
        ]
        named: dict[str, list[tuple[int, int]]] = {}
        for i, spec in enumerate(self.specs):
            for dim, size in enumerate(spec["sizes"]):
                if isinstance(size, str) and size != "batch":
                    named.setdefault(size, []).append((i, dim))
        self.bounds = [(i, *bound) for i, spec in enumerate(self.specs) for bound in spec.get("bounds", ())]
        self.equal = [places for places in named.values() if len(places) > 1]
        self.segments = [(e["values"], e["counts"], e["form"]) for e in manifest["segments"]]
        self.devices = ("cpu",) if manifest["target"]["device"] == "cpu" else ("cpu", "cuda")
        self.fitted: dict[tuple[Any, ...], int] = {}  # batches of forms that fitted
        self.limits: dict[int, list[Limit]] = {}
        for entry in manifest["ids"] if manifest["on_bad_id"] == "error" else ():
            limit = Limit(entry["start"], entry["stop"], entry["rows"], entry["table"], entry["padding"])
            self.limits.setdefault(entry["input"], []).append(limit)
        self.smallest = {i: min(limit.rows for limit in limits) for i, limits in self.limits.items()}

    def batch(self, inputs: Sequence[Any]) -> int:
        """The batch of a request. Raises InputError naming the input that does not fit.

        Most requests have the dtypes and shapes of one before them, which fitted.
        """
        try:
            form = tuple([(type(t), t.dtype, t.shape, t.device, t.layout) for t in inputs])
        except (AttributeError, RuntimeError):  # no tensors, or nested ones, as the checks below will say
            return self.checked(inputs)
        batch = self.fitted.get(form)
        if batch is None:
            batch = self.checked(inputs)
            if len(self.fitted) >= MANY:
                self.fitted.clear()
            self.fitted[form] = batch
        return batch

    def checked(self, inputs: Sequence[Any]) -> int:
        if len(inputs) != len(self.specs):
            raise InputError(
                f"the request has {len(inputs)} inputs, not {len(self.specs)}: {', '.join(self.names)}",
                "see grc inspect",
            )
        for i, tensor in enumerate(inputs):
            if type(tensor) is not torch.Tensor and not isinstance(tensor, torch.Tensor):
                raise InputError(
                    f'input "{self.names[i]}" is a {type(tensor).__name__}, not a tensor', "pass torch tensors"
                )
            dispatch = type(tensor).__torch_dispatch__
            if dispatch is not torch.Tensor.__torch_dispatch__:  # its memory is elsewhere, or nowhere
                raise InputError(
                    f'input "{self.names[i]}" is a {type(tensor).__name__}, which no kernel reads',
                    "pass plain torch tensors",
                )
            if tensor.device.type not in self.devices or tensor.layout is not torch.strided or tensor.is_nested:
                form = "nested" if tensor.is_nested else str(tensor.layout)[6:].replace("strided", "dense")
                raise InputError(
                    f'input "{self.names[i]}" is {form} on {tensor.device.type}; the artifact takes dense tensors on '
                    f"{' and '.join(self.devices)}",
                    f"convert it: {self.names[i]}.cpu(), or .to_dense()",
                )
            if tensor.dtype is not self.dtypes[i]:
                want, have = str(self.dtypes[i])[6:], str(tensor.dtype)[6:]
                raise InputError(
                    f'input "{self.names[i]}" is {have}; the model takes {want}',
                    f"convert it: {self.names[i]}.to(torch.{want})",
                )
            if tensor.dim() != self.ranks[i]:
                raise InputError(
                    f'input "{self.names[i]}" has {tensor.dim()} dimensions {list(tensor.shape)}; '
                    f"the model takes {self.described(i)}",
                    "see grc inspect",
                )
            for dim, size in self.constant[i]:
                if tensor.shape[dim] != size:
                    raise InputError(
                        f'input "{self.names[i]}" has shape {list(tensor.shape)}; the model takes {self.described(i)}',
                        "see grc inspect",
                    )
        return self.consistent(inputs)

    def consistent(self, inputs: Sequence[torch.Tensor]) -> int:
        if self.lead is not None:
            batch = inputs[self.lead[0]].shape[self.lead[1]]
        elif self.scaled:
            i, dim, scale, offset = self.scaled[0]
            batch = max(0, (inputs[i].shape[dim] - offset) // scale)
        else:
            batch = 1
        if batch > self.max_batch:
            raise InputError(
                f"the request has batch {batch}; the artifact takes up to {self.max_batch}",
                "split the request: the model, as it was traced, takes no more"
                if self.capped
                else f"split the request, or compile with --max-batch {batch}",
            )
        for i, dim, scale, offset in self.scaled:
            size = inputs[i].shape[dim]
            if size != scale * batch + offset:
                raise InputError(
                    f'input "{self.names[i]}" has size {size} in dimension {dim}; '
                    f"at batch {batch} it must be {scale * batch + offset}",
                    "give every input the same batch",
                )
        for (first, at), *others in self.equal:
            size = inputs[first].shape[at]
            for i, dim in others:
                if inputs[i].shape[dim] != size:
                    raise InputError(
                        f'input "{self.names[i]}" has size {inputs[i].shape[dim]} in dimension {dim}; '
                        f'it must be {size}, as in dimension {at} of input "{self.names[first]}"',
                        "see grc inspect",
                    )
        for i, dim, least, most in self.bounds if batch else ():
            size = inputs[i].shape[dim]
            if not least <= size <= most:
                raise InputError(
                    f'input "{self.names[i]}" has size {size} in dimension {dim}; the model takes {told(least, most)}',
                    "cut or pad it to that",
                )
        return batch

    def described(self, index: int) -> str:
        return (
            "["
            + ", ".join(
                str(s) if not isinstance(s, dict) else f"{s['scale']}*batch+{s['offset']}"
                for s in self.specs[index]["sizes"]
            )
            + "]"
        )

    def bags(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raise InputError where lengths or offsets do not fit the values that they cut into bags."""
        for values, counts, form in self.segments:
            told, rows = inputs[counts], inputs[values].shape[0]
            if not (add_up(told, rows) if form == "lengths" else ascend(told, rows, form == "offsets")):
                self.refuse_bags(counts, values, form, told.flatten().tolist(), rows)

    def refuse_bags(self, counts: int, values: int, form: str, told: list[int], rows: int) -> None:
        name, other = f'input "{self.names[counts]}"', f'input "{self.names[values]}" has {rows} values'
        if form == "lengths":
            low = next((i for i, length in enumerate(told) if length < 0), None)
            fault = f"adds up to {sum(told)}; {other}" if low is None else f"has length {told[low]} at position {low}"
            raise InputError(f"{name} {fault}", "the lengths of all bags must add up to the number of values")
        fall = next((i for i, (a, b) in enumerate(pairwise(told), 1) if a > b), None)
        fault = f"ends with {told[-1]}; {other}"
        if told[0] != 0:
            fault = f"begins with {told[0]}, not with 0"
        elif fall is not None:
            fault = f"falls from {told[fall - 1]} to {told[fall]} at position {fall}"
        end = "end with the number of values" if form == "offsets" else "end within the values"
        raise InputError(f"{name} {fault}", f"offsets must begin with 0, never fall, and {end}")

    def ids(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raise InputError for the first id outside of its table."""
        for index, limits in self.limits.items():
            tensor = inputs[index]
            if tensor.numel() == 0:
                continue
            low, high = torch.aminmax(tensor)  # one pass settles the usual case: every id fits the smallest table
            if low.item() >= 0 and high.item() < self.smallest[index]:
                continue
            for limit in limits:
                part = tensor if limit.stop is None else tensor[..., limit.start : limit.stop]
                bad = (part < 0) | (part >= limit.rows)
                if limit.padding is not None:
                    bad &= part != limit.padding
                if bool(bad.any()):
                    self.refuse(index, part, bad, limit)

    def refuse(self, index: int, part: torch.Tensor, bad: torch.Tensor, limit: Limit) -> None:
        place = bad.nonzero()[0].tolist()
        found = int(part[tuple(place)])
        column = f", column {place[1] + limit.start}" if len(place) > 1 else ""
        raise InputError(
            f'input "{self.names[index]}" has id {found} at row {place[0]}{column}; table {limit.table} has {limit.rows} rows',
            "compile with --on-bad-id zero, or retrain with a larger table",
        )

    def nan(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raise InputError when an input holds NaN or inf: an answer of NaN came from there."""
        for name, tensor in zip(self.names, inputs, strict=True):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise InputError(
                    f'input "{name}" holds {float(tensor[tuple(place)])} at {place}',
                    "clean the features before the request",
                )

    def padded(self, inputs: Sequence[torch.Tensor], batch: int, smallest: int) -> list[torch.Tensor]:
        """Repeat the last row up to the smallest batch that the graph takes."""
        out = []
        for tensor, spec in zip(inputs, self.specs, strict=True):
            for dim, size in enumerate(spec["sizes"]):
                if size == "batch":
                    index = torch.arange(smallest).clamp(max=batch - 1)
                    tensor = tensor.index_select(dim, index)
                elif not isinstance(size, int):
                    raise InputError(f"the model takes batches from {smallest} up", "send more rows in one request")
            out.append(tensor)
        return out
