"""Requests and answers in files: JSON, JSON lines, npz and parquet, by the names of the model's inputs."""

from __future__ import annotations

import codecs
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, time
from enum import Enum
from io import BytesIO
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from grc.errors import InputError, message_of

FORMATS = ("json", "jsonl", "npz", "parquet")
BINARY = ("npz", "parquet")
BROKEN = (ValueError, KeyError, OSError, EOFError, BadZipFile, zlib.error, RecursionError)  # the last of lists in lists


def format_of(name: str, given: str | None, hint: str = f"name it with --format: {', '.join(FORMATS)}") -> str:
    """The format of a file, by its extension where none was given; JSON on a pipe. Raises InputError for another."""
    found = given or ("json" if name == "-" else name.rpartition(".")[2].lower())
    if found not in FORMATS:
        raise InputError(f"{name} has no known format", hint)
    return found


def decode(data: bytes, form: str, specs: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """One tensor for each input. Raises InputError naming the input that is missing, ragged or not numeric."""
    columns = decode_columns(data, form, [spec["name"] for spec in specs])
    return tensors_of(columns, specs, exact=form == "npz")


def decode_columns(
    data: bytes,
    form: str,
    empty: Sequence[str] = (),
    what: str = "the request",
    hint: str = "see grc run ARTIFACT --example",
) -> dict[str, Any]:
    """Every column of a file by name; where it is a list of no rows, the columns `empty` names, of no rows each.

    Raises InputError where the data, which it calls `what`, is not of this format.
    """
    try:
        found = DECODERS[form](data)
        return found if isinstance(found, dict) else columns_of(found, empty)
    except BROKEN as error:
        raise InputError(f"{what} is no {form}: {message_of(error)}", hint) from error


def tensors_of(
    columns: Mapping[str, Any], specs: Sequence[Mapping[str, Any]], exact: bool = False
) -> list[torch.Tensor]:
    """One tensor for each input. Raises InputError for a column that no input has, and for an input without one."""
    names = [spec["name"] for spec in specs]
    for name in columns:
        if name not in names:
            raise InputError(f"the request has an unknown input {name}", f"the inputs are {', '.join(names)}")
    for name in names:
        if name not in columns:
            raise InputError(f"the request misses input {name}", f"the inputs are {', '.join(names)}")
    return [tensor_of(columns[spec["name"]], spec, exact) for spec in specs]


def tensor_of(value: Any, spec: Mapping[str, Any], exact: bool) -> torch.Tensor:
    """A tensor of the input's dtype; an npz array has a dtype of its own, which is left for the program to judge."""
    if exact:
        try:
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
        except TypeError:
            have = f"an array of {value.dtype}"
            raise InputError(
                f'input "{spec["name"]}" is {have}; the model takes {spec["dtype"]}', "see grc inspect"
            ) from None
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f'input "{spec["name"]}" has rows of different lengths', "pad them to one length") from None
    if not array.size:  # [] does not show the sizes of the rows that it has none of
        rest = spec.get("sizes", ())[array.ndim :]
        array = array.reshape(*array.shape, *(size if isinstance(size, int) else 0 for size in rest))
    dtype = getattr(torch, spec["dtype"])
    if array.size and array.dtype.kind not in ("biuf" if dtype.is_floating_point else "biu"):
        have = "floating-point numbers" if array.dtype.kind == "f" else "values that are no numbers"
        raise InputError(f'input "{spec["name"]}" has {have}; the model takes {spec["dtype"]}', "see grc inspect")
    if array.size and not dtype.is_floating_point:
        least, most = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        for found in (int(array.min()), int(array.max())):
            if not least <= found <= most:
                told = f"{spec['dtype']} holds {least} to {most}"
                raise InputError(f'input "{spec["name"]}" has the value {found}; {told}', "see grc inspect")
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def from_json(data: bytes) -> dict[str, Any] | list[Any]:
    """{"input": [rows]}, or a list of {"input": row}."""
    value = json.loads(data)
    if not isinstance(value, (dict, list)):
        raise ValueError("it must be an object of columns or a list of rows")
    return value


def json_lines(data: bytes) -> list[Any]:
    """What each line holds, but for blank ones. Raises ValueError naming the line of the file that is no JSON."""
    found = []
    lines = data.removeprefix(
        codecs.BOM_UTF8
    ).splitlines()  # of bytes: a string may hold what str takes for a line's end
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(json_of(line.decode()))
        except ValueError as error:
            raise ValueError(f"line {number}: {message_of(error)}") from error
    return found


def json_of(line: str) -> Any:
    """What one line holds. Raises ValueError with the column alone: the line that json counts is always the first."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error


def columns_of(rows: Sequence[Any], empty: Sequence[str]) -> dict[str, list[Any]]:
    if not rows and empty:
        return {name: [] for name in empty}
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold at least one row, each an object")
    for i, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ValueError(f"row {i} has the inputs {', '.join(row)}, row 0 has {', '.join(rows[0])}")
    return {name: [row[name] for row in rows] for name in rows[0]}


def from_npz(data: bytes) -> dict[str, Any]:
    if data[:2] != b"PK":
        raise ValueError("it is no zip of arrays, as np.savez writes them")
    with np.load(BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def from_parquet(data: bytes) -> dict[str, Any]:
    read = parquet().read_table(BytesIO(data))
    return {name: read.column(name).to_pylist() for name in read.column_names}


DECODERS: dict[str, Callable[[bytes], dict[str, Any] | list[Any]]] = {  # columns by name, or a list of rows
    "json": from_json,
    "jsonl": json_lines,
    "npz": from_npz,
    "parquet": from_parquet,
}


def encode(values: Mapping[str, torch.Tensor], form: str) -> bytes:
    """The inverse of `decode`. Raises InputError where a format of rows can't hold tensors of different lengths."""
    if form == "json":
        return (json.dumps({name: plain(tensor) for name, tensor in values.items()}) + "\n").encode()
    if form == "npz":
        buffer = BytesIO()
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in values.items()})
        return buffer.getvalue()
    lengths = {tensor.shape[0] if tensor.dim() else -1 for tensor in values.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise InputError(f"{form} holds rows, and these tensors differ in length", "use json or npz")
    columns = {name: tensor.tolist() if form == "parquet" else plain(tensor) for name, tensor in values.items()}
    if form == "parquet":
        buffer = BytesIO()
        module = parquet()
        import pyarrow

        module.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()
    rows = zip(*columns.values(), strict=True)
    return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows).encode()


def parquet() -> Any:
    try:
        from pyarrow import parquet as module
    except ImportError:
        raise InputError("parquet needs pyarrow", "pip install 'grc-compiler[parquet]'") from None
    return module


def plain(value: Any) -> Any:
    """The same in JSON's own types: arrays and tensors are lists, dataclasses dicts, dates as ISO 8601 has them, and NaN and
    infinity, which JSON lacks, are null. Raises TypeError for anything else.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, torch.Tensor) and (not value.is_floating_point() or value.isfinite().all()):
        return value.tolist()
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (date, time)):
        return value.isoformat()
    raise TypeError(f"postprocess returns a {type(value).__name__}, which is no JSON")
