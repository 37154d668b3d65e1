"""Calibration data: real requests, and labels where there are some, from the model file or from a file of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from grc.errors import GrcError, InputError, message_of
from grc.graph.capture import Source, flat_tensors
from grc.graph.model_file import as_call
from grc.precision.quality import AUC, Limit
from grc.runtime.values import decode_columns, format_of, tensors_of
from grc.runtime.weights import raw_chunks

ROWS = 256  # rows that a search looks at: a trial of a 6-layer Transformer over them takes about a second
BATCH = 64
LABEL = "label"
FUNCTION = "calibration()"  # the origin of batches of the model file
HINT = "give rows of every input: .npz, .jsonl, .json or .parquet"


@dataclass(frozen=True)
class Calibration:
    """Batches of flat inputs, labels beside them or None, where they come from, and which batches of that are not here."""

    batches: Sequence[Sequence[Tensor]]
    labels: Sequence[Tensor] | None
    origin: str
    real: bool
    notes: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return sum(rows_of(batch) for batch in self.batches)

    def first(self, rows: int) -> Calibration:
        """The first batches that hold as many rows."""
        kept, count = 0, 0
        for batch in self.batches:
            if count >= rows:
                break
            kept, count = kept + 1, count + rows_of(batch)
        labels = None if self.labels is None else self.labels[:kept]
        return replace(self, batches=self.batches[:kept], labels=labels)

    def place(self, batch: int, row: int) -> str:
        """Where a row is in the data as they were given: `row 70 of rows.npz`, `row 6 of batch 1 of calibration()`."""
        every = range(len(self.batches) + len(self.left_out))
        number = [n for n in every if n not in self.left_out][batch]
        if self.origin == FUNCTION:
            return f"row {row} of batch {number} of {FUNCTION}"
        return f"row {number * BATCH + row} of {self.origin}"

    @property
    def digest(self) -> str:
        """sha256 of every value and label, in order."""
        found = hashlib.sha256()
        for batch in (*self.batches, *((label,) for label in self.labels or ())):
            for tensor in batch:
                found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
                for chunk in raw_chunks(tensor):
                    found.update(chunk)
        return found.hexdigest()


def rows_of(batch: Sequence[Tensor]) -> int:
    return batch[0].shape[0] if batch and batch[0].dim() else 1


def calibration_of(source: Source, file: Path | None) -> Calibration:
    """The data of `file`, else of the model file's calibration(), else what get_inputs draws.

    Raises GrcError for data that does not fit the model's inputs.
    """
    if file is not None:
        return checked(from_file(source, file), source)
    if source.model.calibration is not None:
        return checked(from_function(source), source)
    batches = [source.inputs(BATCH if source.dynamic else 1)]
    note = (
        "calibrated on what get_inputs draws: if its ids and values are random, they say little about quality. "
        "Define calibration() in the model file, or pass --calibration FILE"
    )
    return checked(Calibration(batches, None, "get_inputs", False, (note,)), source)


def from_function(source: Source) -> Calibration:
    """calibration() gives batches: what get_inputs gives, or {"inputs": that, "labels": tensor}."""
    assert source.model.calibration is not None
    batches, labels = [], []
    for entry in source.model.calibration():
        given = entry
        if isinstance(entry, Mapping) and set(entry) == {"inputs", "labels"}:
            given = entry["inputs"]
            labels.append(torch.as_tensor(entry["labels"]))
        leaves, _ = flat_tensors(as_call(source.model.module, given))
        batches.append(leaves)
    if not batches:
        raise GrcError("calibration() gives no batch", "return a list of what get_inputs returns")
    if labels and len(labels) != len(batches):
        raise GrcError("calibration() gives labels for some batches only", "give them for all, or for none")
    return Calibration(batches, labels or None, FUNCTION, True)


def from_file(source: Source, file: Path) -> Calibration:
    """Rows of every input by name in npz, jsonl, json or parquet, with `label` for labels."""
    if not file.is_file():
        raise GrcError(f"no calibration file at {file}", HINT)
    columns = decode_columns(file.read_bytes(), format_of(file.name, None, HINT))
    try:
        label = torch.as_tensor(columns.pop(LABEL)) if LABEL in columns else None
    except (TypeError, ValueError) as error:
        raise GrcError(
            f"{file.name} has labels that are no numbers: {message_of(error)}", f"give one {LABEL} a row"
        ) from error
    specs = [{"name": name, "dtype": str(dtype)[6:]} for name, dtype in zip(source.names, source.dtypes, strict=True)]
    leaves = tensors_of(columns, specs)
    rows = leaves[0].shape[0] if leaves and leaves[0].dim() else 1
    if not source.dynamic or any(leaf.dim() == 0 or leaf.shape[0] != rows for leaf in leaves):
        return Calibration([leaves], None if label is None else [label], file.name, True)
    parts = list(zip(*(leaf.split(BATCH) for leaf in leaves), strict=True))
    labels = None if label is None else label.split(BATCH)
    if label is not None and label.shape != (rows,):
        raise GrcError(f"{file.name} has labels for other rows than it has inputs", f"give one {LABEL} a row")
    return Calibration([list(part) for part in parts], labels, file.name, True)


def check_sizes(number: int, batch: Sequence[Tensor], origin: str, source: Source) -> None:
    """Raises InputError for a tensor of a size that the model's inputs don't have."""
    rows: dict[int, str] = {}
    for name, tensor, sizes in zip(source.names, batch, source.sizes, strict=True):
        for have, size in zip(tensor.shape, sizes, strict=True):
            if size.constant and have != size.offset:
                told = f"has a size of {have} where the model takes {size.offset}"
                raise InputError(f"batch {number} of the calibration data ({origin}): {name} {told}", HINT)
            if size.free is None and size.scale == 1:
                rows.setdefault(have - size.offset, name)
    if len(rows) > 1:
        told = " and ".join(f"{count} of {name}" for count, name in rows.items())
        raise InputError(f"batch {number} of the calibration data ({origin}) has {told} rows", HINT)


def checked(found: Calibration, source: Source) -> Calibration:
    """Every batch fits the model's inputs. NaN and infinity are told, and the batches that hold them are left out."""
    notes, kept = list(found.notes), []
    for i, batch in enumerate(found.batches):
        if [t.dtype for t in batch] != source.dtypes or [t.dim() for t in batch] != [len(s) for s in source.sizes]:
            raise InputError(
                f"batch {i} of the calibration data ({found.origin}) does not have the model's inputs",
                f"give {', '.join(source.names)} as get_inputs does",
            )
        check_sizes(i, batch, found.origin, source)
        bad = [
            name
            for name, tensor in zip(source.names, batch, strict=True)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]
        if bad:
            notes.append(f"batch {i} of the calibration data holds NaN or infinity in {bad[0]}, and is left out")
        else:
            kept.append(i)
    if not kept:
        raise GrcError("every batch of the calibration data holds NaN or infinity", "clean the data")
    if not any(map(rows_of, found.batches)):
        raise GrcError(f"the calibration data ({found.origin}) has no rows", HINT)
    labels = None if found.labels is None else [found.labels[i] for i in kept]
    left_out = tuple(i for i in range(len(found.batches)) if i not in kept)
    batches = [found.batches[i] for i in kept]
    return replace(found, batches=batches, labels=labels, notes=tuple(notes), left_out=left_out)


def check_labels(data: Calibration, limits: Sequence[Limit]) -> None:
    """Raises GrcError where a limit needs labels that are not there, or that it can't be measured with."""
    for limit in limits:
        if limit.needs_labels and data.labels is None:
            raise GrcError(
                f"{limit.metric} needs labels, and the calibration data ({data.origin}) has none",
                'give {"inputs": …, "labels": …} from calibration(), or a column "label" in --calibration FILE',
            )
        for batch, labels in enumerate(data.labels or () if limit.metric == AUC else ()):
            values = labels.reshape(-1)
            wrong = ((values != 0) & (values != 1)).nonzero()  # NaN is neither
            if len(wrong):
                row = int(wrong[0])
                raise GrcError(
                    f"{data.place(batch, row)} has the label {values[row].item():g}; {AUC} takes 0 and 1",
                    f"give 1 for a row whose item was right and 0 for others, or leave {AUC} out of --budget",
                )
