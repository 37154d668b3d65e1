"""Where calibration data come from: calibration() of the model file, or a file of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grc.errors import GrcError, InputError, ModelFileError, message_of
from grc.graph.capture import Source, flat_tensors
from grc.graph.model_file import as_call, raised_by
from grc.runtime.values import decode_columns, format_of, tensors_of

BATCH = 64
LABEL = ("label", "labels")  # the column of labels: the first of these names that no input has
FUNCTION = "calibration()"  # the origin of batches of the model file
HINT = "give rows of every input: .npz, .jsonl, .json or .parquet"

Given = tuple[list[list[Tensor]], list[Tensor] | None]
"""Batches of flat inputs, and labels beside them or None."""


def from_function(source: Source) -> Given:
    """calibration() gives batches: what get_inputs gives, or {"inputs": that, "labels": tensor}.

    Raises ModelFileError where it fails or gives something else.
    """
    batches, labels = [], []
    for number, entry in enumerate(called(source)):
        given = entry
        if isinstance(entry, Mapping) and set(entry) == {"inputs", "labels"}:
            given = entry["inputs"]
            labels.append(labels_of(entry["labels"], f"batch {number} of {FUNCTION}"))
        try:
            batches.append(flat_tensors(as_call(source.model.module, given))[0])
        except InputError as error:
            raise InputError(f"batch {number} of {FUNCTION}: {error.message}", error.hint) from error
    if not batches:
        raise GrcError(f"{FUNCTION} gives no batch", "return a list of what get_inputs returns")
    if labels and len(labels) != len(batches):
        raise GrcError(f"{FUNCTION} gives labels for some batches only", "give them for all, or for none")
    return batches, labels or None


def called(source: Source) -> list[Any]:
    """What calibration() gives, one entry a batch."""
    function, path = source.model.calibration, source.model.file
    place = f" in {path}" if path else ""
    if not callable(function):
        raise ModelFileError(
            f"calibration{place} is a {type(function).__name__}, no function", "define calibration with def"
        )
    with raised_by(FUNCTION, path, "mend it, or pass --calibration FILE, which is used in its place"):
        found = function()
        if not isinstance(found, (str, Mapping, Tensor)) and hasattr(found, "__iter__"):
            return list(found)
    raise ModelFileError(
        f"{FUNCTION}{place} returned a {type(found).__name__}", "return a list of what get_inputs returns"
    )


def from_file(source: Source, file: Path) -> Given:
    """Rows of every input by name in npz, jsonl, json or parquet, with `label` for labels.

    Raises GrcError naming the file and what in it does not fit.
    """
    if not file.is_file():
        raise GrcError(f"no calibration file at {file}", HINT)
    form, data = format_of(file.name, None, HINT), file.read_bytes()
    if not data.strip():
        raise InputError(f"{file.name} is empty", HINT)
    columns = decode_columns(data, form, what=file.name, hint=HINT)
    name = next((name for name in LABEL if name not in source.names), None)
    label = labels_of(columns.pop(name), file.name) if name in columns else None
    check_columns(columns, source.names, name, file.name)
    specs = [{"name": name, "dtype": str(dtype)[6:]} for name, dtype in zip(source.names, source.dtypes, strict=True)]
    try:
        leaves = tensors_of(columns, specs)
    except InputError as error:
        raise InputError(
            f"{file.name}: {error.message}", "give rows of the shapes and types that get_inputs gives"
        ) from error
    rows = leaves[0].shape[0] if leaves and leaves[0].dim() else 1
    if not source.dynamic or any(leaf.dim() == 0 or leaf.shape[0] != rows for leaf in leaves):
        return [leaves], None if label is None else [label]
    if label is not None and label.shape not in ((rows,), (rows, 1)):
        told = f"{list(label.shape)}, and {rows} rows of inputs"
        raise GrcError(f"{file.name} has labels of the shape {told}", f"give one {name} a row")
    parts = zip(*(leaf.split(BATCH) for leaf in leaves), strict=True)
    return [list(part) for part in parts], None if label is None else list(label.split(BATCH))


def check_columns(columns: Mapping[str, Any], names: Sequence[str], label: str | None, file: str) -> None:
    """Raises InputError for a column that no input has, and for an input without one."""
    hint = f"the inputs are {', '.join(names)}" + (f"; labels are a column {label}" if label else "")
    for name in columns:
        if name not in names:
            raise InputError(f"{file} has a column {name}, which is no input of the model", hint)
    for name in names:
        if name not in columns:
            raise InputError(f"{file} has no column {name}", hint)


def labels_of(given: Any, where: str) -> Tensor:
    """Labels as a tensor. Raises GrcError naming the first that is no number."""
    hint = "give one number a row"
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        for row, value in enumerate(given if hasattr(given, "__iter__") else ()):
            if not is_number(value):
                raise GrcError(f"row {row} of {where} has the label {value}, which is no number", hint) from error
        raise GrcError(f"{where} has labels that are no numbers: {message_of(error)}", hint) from error
    if found.is_complex():
        raise GrcError(f"{where} has labels of {str(found.dtype)[6:]}", hint)
    return found


def is_number(value: Any) -> bool:
    try:
        torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
