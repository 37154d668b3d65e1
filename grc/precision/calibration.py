"""Calibration data: real requests, and labels where there are some, checked and in batches."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from grc.errors import CalibrationWarning, GrcError, InputError
from grc.graph.capture import Source
from grc.precision.calibration_data import BATCH, FUNCTION, HINT, from_file, from_function
from grc.precision.quality import AUC, Limit, rows_of
from grc.runtime.structure import Json
from grc.runtime.weights import raw_chunks

ROWS = 256  # rows that a search looks at: a trial of a 6-layer Transformer over them takes about a second
KEPT, LEAST = 1 / 8, 16  # what an artifact carries: rows in as many of its weights' bytes, and how many at least
OUTLIER = 1000  # times as large as what is usual in a column
SPARE = 4  # numbers of a column that may be outliers, or one in a hundred
UNREAL = (
    "calibrated on what get_inputs draws: if its ids and values are random, they say little about quality. "
    "Define calibration() in the model file, or pass --calibration FILE"
)


@dataclass(frozen=True)
class Calibration:
    """Batches of flat inputs, labels beside them or None, and where they come from: which of the batches that were given each
    is, and which of its rows are here where rows can be taken apart. `sizes` are those of the inputs, as a manifest has
    them."""

    batches: Sequence[Sequence[Tensor]]
    labels: Sequence[Tensor] | None
    origin: str
    real: bool
    notes: tuple[str, ...] = ()
    numbers: Sequence[int] = ()
    places: Sequence[Tensor] = ()
    sizes: Sequence[Sequence[Json]] = ()
    by_row: bool = False  # each row of a batch is a request of its own, of the same sizes as all others

    @property
    def rows(self) -> int:
        return sum(rows_of(batch, self.sizes) for batch in self.batches)

    def sample(self, rows: int, both: bool = False) -> Calibration:
        """As many rows from all over the data, in batches of BATCH, where rows can be taken apart; else the fewest batches
        that hold them. With `both`, more where labels of one kind alone are among them, and the data has others."""
        while rows < self.rows:
            found = self.spread(rows)
            if not both or len(found.kinds) == len(self.kinds):
                return found
            rows *= 4
        return self

    def spread(self, rows: int) -> Calibration:
        if not self.by_row:
            count = -(-rows * len(self.batches) // self.rows)
            while sum(rows_of(self.batches[i], self.sizes) for i in evenly(count, len(self.batches))) < rows:
                count += 1
            kept = evenly(count, len(self.batches))
            labels = None if self.labels is None else [self.labels[i] for i in kept]
            return replace(self, batches=[self.batches[i] for i in kept], labels=labels)
        places = torch.tensor(evenly(rows, self.rows))
        batches = list(zip(*(picked(column, places) for column in zip(*self.batches, strict=True)), strict=True))
        return replace(self, batches=batches, labels=None if self.labels is None else picked(self.labels, places))

    @property
    def kinds(self) -> set[bool]:
        """Whether a label is 1, of all labels."""
        return {bool(kind) for labels in self.labels or () for kind in (labels.reshape(-1) == 1).unique()}

    def place(self, batch: int, row: int) -> str:
        """Where a row is in the data as they were given: `row 70 of rows.npz`, `row 6 of batch 1 of calibration()`."""
        return self.given(self.numbers[batch], int(self.places[batch][row]) if self.by_row else row)

    def given(self, number: int, row: int) -> str:
        """A row of a batch as it was given."""
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


def evenly(count: int, total: int) -> list[int]:
    """As many of 0..total-1, from the first to the last."""
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def picked(column: Sequence[Tensor], places: Tensor) -> list[Tensor]:
    """Rows of one input in batches of BATCH: `places` count through all its batches, in order."""
    starts = [0, *itertools.accumulate(len(part) for part in column)]
    parts = [
        part[places[(places >= start) & (places < end)] - start]
        for part, (start, end) in zip(column, itertools.pairwise(starts), strict=True)
    ]
    return list(torch.cat(parts).split(BATCH))


def apart(found: Calibration) -> bool:
    """Whether rows can be taken apart: all inputs, and labels where there are some, have one entry a row."""
    if any(not entry or entry[0] != "batch" or not all(isinstance(s, int) for s in entry[1:]) for entry in found.sizes):
        return False
    rows = [rows_of(batch, found.sizes) for batch in found.batches]
    return all(label.shape[:1] == (count,) for count, label in zip(rows, found.labels or (), strict=False))


def calibration_of(source: Source, file: Path | None, largest: int | None = None) -> Calibration:
    """The data of `file`, else of the model file's calibration(), else what get_inputs draws.

    Raises GrcError for data that does not fit the model's inputs, and where rows can't be taken apart, for a batch of more
    than `largest` rows, which the artifact would refuse.
    """
    if file is not None or source.model.calibration is not None:
        batches, labels = from_function(source) if file is None else from_file(source, file)
        found = checked(Calibration(batches, labels, FUNCTION if file is None else file.name, True), source)
        check_batches(found, largest)
        return found if found.rows >= LEAST else replace(found, notes=(*found.notes, few(found)))
    warnings.warn(UNREAL, CalibrationWarning, stacklevel=2)
    batches = [source.inputs(BATCH if source.dynamic else 1)]
    return checked(Calibration(batches, None, "get_inputs", False, (UNREAL,)), source)


def few(data: Calibration) -> str:
    rows = "row is" if data.rows == 1 else "rows are"
    return (
        f"{data.rows} {rows} all that {data.origin} gives to calibrate on: the quality of other requests may be another"
    )


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


def check_batches(data: Calibration, largest: int | None) -> None:
    for number, batch in zip(data.numbers, data.batches, strict=True):
        rows = rows_of(batch, data.sizes)
        if largest is not None and rows > largest and not data.by_row:
            raise InputError(
                f"batch {number} of the calibration data ({data.origin}) has {rows} rows; the artifact takes up to {largest}",
                f"give smaller batches, or compile with --max-batch {rows}",
            )


def checked(found: Calibration, source: Source) -> Calibration:
    """Every batch fits the model's inputs. NaN and infinity are told, and rows that hold them are left out: whole batches where
    rows can't be taken apart."""
    for i, batch in enumerate(found.batches):
        if [t.dtype for t in batch] != source.dtypes or [t.dim() for t in batch] != [len(s) for s in source.sizes]:
            raise InputError(
                f"batch {i} of the calibration data ({found.origin}) does not have the model's inputs",
                f"give {', '.join(source.names)} as get_inputs does",
            )
        check_sizes(i, batch, found.origin, source)
    found = replace(found, sizes=[[size.json() for size in entry] for entry in source.sizes])
    if not found.rows:
        raise GrcError(f"the calibration data ({found.origin}) has no rows", HINT)
    found = finite(replace(found, by_row=apart(found)), source.names)
    return replace(found, notes=(*found.notes, *outliers(found, source.names)))


def finite(data: Calibration, names: Sequence[str]) -> Calibration:
    """The data without NaN and infinity, and a note of what that took away. Raises GrcError where nothing is left."""
    batches: list[Sequence[Tensor]] = []
    labels: list[Tensor] = []
    numbers, places, bad = [], [], []
    for i, batch in enumerate(data.batches):
        good = torch.stack([sound(tensor, data.by_row) for tensor in batch])
        bad += [
            (i, row, names[int(good[:, row].int().argmin())]) for row in (~good.all(0)).nonzero().flatten().tolist()
        ]
        kept = good.all(0).nonzero().flatten()
        if not len(kept):
            continue
        cut = len(kept) < good.shape[1]
        batches.append([tensor[kept] for tensor in batch] if cut else batch)
        if data.labels is not None:
            labels.append(data.labels[i][kept] if cut else data.labels[i])
        numbers.append(i)
        places.append(kept)
    what, total = ("rows", data.rows) if data.by_row else ("batches", len(data.batches))
    if not batches:
        raise GrcError(f"all {what} of the calibration data hold NaN or infinity", "clean the data")
    notes = data.notes
    if bad:
        number, row, name = bad[0]
        first = f"{data.given(number, row) if data.by_row else f'batch {number}'}, in {name}"
        notes = (
            *notes,
            f"{len(bad)} of {total} {what} of the calibration data left out for NaN or infinity, first {first}",
        )
    kept_labels = None if data.labels is None else labels
    return replace(data, batches=batches, labels=kept_labels, notes=notes, numbers=numbers, places=places)


def outliers(data: Calibration, names: Sequence[str]) -> list[str]:
    """A note for each input with numbers far beyond what is usual in their column: errors are shares of the largest answer,
    and one row may make that."""
    notes = []
    for name, parts in zip(names, zip(*data.batches, strict=True), strict=True):
        if not parts[0].is_floating_point() or not parts[0].dim():
            continue
        columns = torch.cat([part.reshape(-1, part.shape[-1] if part.dim() > 1 else 1) for part in parts]).abs()
        if not columns.numel():
            continue
        usual, largest = usual_of(columns), columns.amax(0)
        beyond = largest > OUTLIER * usual
        if beyond.any():
            worst = int(torch.where(beyond, largest / usual, 0).argmax())
            notes.append(
                f"{name} of the calibration data has outliers: {largest[worst].item():g} in column {worst}, over {OUTLIER} "
                "times as large as usual numbers; leave it out unless requests hold such"
            )
    return notes


def usual_of(columns: Tensor) -> Tensor:
    """The largest magnitude that is usual in each column of [N, C]: of its numbers that aren't 0 without the largest SPARE, or
    one in a hundred, or half where they are few. Up to SPARE numbers among zeros tell nothing of their column: they are
    held against the other columns, or against 1 where there are none."""
    counts = (columns > 0).sum(0)
    spare = torch.maximum(counts // 100, (counts // 2).clamp(max=SPARE))
    usual = columns.topk(int(spare.max()) + 1, 0).values.gather(0, spare.unsqueeze(0)).squeeze(0).double()
    lone = (counts <= SPARE) & (2 * counts <= len(columns))
    others = usual[~lone]
    return torch.where(lone, others.max() if len(others) else usual.new_ones(()), usual)


def sound(tensor: Tensor, by_row: bool) -> Tensor:
    """Which rows of an input hold neither NaN nor infinity; one answer for the whole of it where rows can't be taken apart."""
    good = torch.isfinite(tensor)
    if not by_row:
        return good.all().reshape(1)
    return good.flatten(1).all(1) if good.dim() > 1 else good


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
