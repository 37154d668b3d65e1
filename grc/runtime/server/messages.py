"""The protocol's JSON, with binary tensors behind it: a request read, an answer written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import torch

from grc.runtime.server.cut import Cut
from grc.runtime.server.datatypes import NAMES, bytes_of_list, check_shape, check_size
from grc.runtime.server.packed import Packed, Shape
from grc.runtime.server.refusal import invalid
from grc.runtime.server.version import Version

# What a client may ask for beyond the protocol, and this server does not do: silence would be a wrong answer.
REFUSED = {
    "shared_memory_region": "shared memory",
    "classification": "classification",
    "sequence_id": "sequences",
}


@dataclass(slots=True)
class Asked:
    """A request: inputs in the model's order, and the outputs that are wanted, each as bytes or as JSON."""

    id: str
    inputs: Packed
    outputs: list[tuple[int, bool]]
    seconds: float | None
    priority: int


@dataclass(slots=True)
class Layout:
    """What JSON before binary tensors said, and where the bytes of each input lie behind it; it holds none of them."""

    spans: list[tuple[int, int]]
    shapes: tuple[Shape, ...]
    dtypes: Sequence[torch.dtype]
    rows: int
    outputs: list[tuple[int, bool]]
    seconds: float | None
    priority: int

    @classmethod
    def of(cls, asked: Asked, spans: list[tuple[int, int]]) -> Layout:
        inputs = asked.inputs
        return cls(spans, inputs.shapes, inputs.dtypes, inputs.rows, asked.outputs, asked.seconds, asked.priority)

    def asked(self, body: bytes) -> Asked:
        data = [body[start:stop] for start, stop in self.spans]
        return Asked("", Packed(data, self.shapes, self.dtypes, self.rows), self.outputs, self.seconds, self.priority)


def read_json(data: bytes | memoryview) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the request is no JSON: {error}", "json") from None
    if type(value) is not dict:
        raise invalid(f"the request is a JSON {json_type(value)}, not an object", "json")
    return value


def json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", dict: "object"}
    return names.get(type(value), "null")


def read(body: bytes, header: int, version: Version, remember: bool = True) -> Asked:
    """The request in a body; `header` is where the JSON ends and binary tensors begin. On the event loop, what its JSON said is
    remembered."""
    if header > len(body):
        raise invalid(f"the body has {len(body)} bytes; its JSON alone should have {header}", "truncated")
    text = body[:header]
    if remember and header < len(body):
        known = version.layouts.get((text, len(body)))
        if known is not None:
            return known.asked(body)
    request = read_json(text)
    parameters = object_at(request, "parameters")
    refuse_unknown(parameters)
    inputs, spans = read_inputs(request, body, header, version)
    binary = bool(parameters.get("binary_data_output", False))
    outputs = read_outputs(request, binary, version)
    id = request.get("id", "")
    if type(id) is not str:
        raise invalid(f"id is a JSON {json_type(id)}, not a string")
    asked = Asked(id, inputs, outputs, timeout(parameters), priority(parameters))
    if remember and not id and len(spans) == len(inputs.data):
        layout = Layout.of(asked, [spans[i] for i in range(len(spans))])
        version.layouts.put((text, len(body)), layout, len(text))
    return asked


def object_at(entry: dict[str, Any], key: str) -> dict[str, Any]:
    found = entry.get(key)
    if found is None:
        return {}
    if type(found) is not dict:
        raise invalid(f"{key} is a JSON {json_type(found)}, not an object")
    return found


def refuse_unknown(parameters: dict[str, Any]) -> None:
    for name, what in REFUSED.items():
        if parameters.get(name):
            raise invalid(f"this server knows no {what}", "unsupported")


def timeout(parameters: dict[str, Any]) -> float | None:
    """Seconds; the protocol's extension counts microseconds, and 0 is no limit."""
    return whole(parameters, "timeout", "number of microseconds") / 1e6 or None


def priority(parameters: dict[str, Any]) -> int:
    """1 is the most urgent; 0 is what a request has that names none."""
    return whole(parameters, "priority", "whole number")


def whole(parameters: dict[str, Any], name: str, what: str) -> int:
    found = parameters.get(name)
    if found is None:
        return 0
    if type(found) is not int or found < 0:
        raise invalid(f"{name} must be a {what}, not {found!r}")
    return found


def read_inputs(
    request: dict[str, Any], body: bytes, at: int, version: Version
) -> tuple[Packed, dict[int, tuple[int, int]]]:
    """The inputs, and where those that came as bytes lie in the body."""
    given = request.get("inputs")
    if type(given) is not list:
        raise invalid("the request has no list of inputs")
    data: dict[int, bytes] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    spans: dict[int, tuple[int, int]] = {}
    for entry in given:
        if type(entry) is not dict or type(entry.get("name")) is not str:
            raise invalid("an input has no name")
        name = entry["name"]
        index = version.input_index.get(name)
        if index is None:
            raise invalid(f"the request has an unknown input {name}; the inputs are {', '.join(version.input_index)}")
        if index in data:
            raise invalid(f'input "{name}" is given twice')
        dtype = checked_dtype(name, entry.get("datatype"), version.dtypes[index])
        shape = checked_shape(name, entry.get("shape"))
        shapes[index] = tuple(shape)
        parameters = object_at(entry, "parameters")
        refuse_unknown(parameters)
        size = parameters.get("binary_data_size")
        if size is None:
            if "data" not in entry:
                raise invalid(f'input "{name}" has neither data nor binary_data_size')
            data[index] = bytes_of_list(name, entry["data"], shape, dtype)
            continue
        if type(size) is not int or size < 0:
            raise invalid(f'input "{name}" has a binary_data_size that is no size: {size!r}')
        if at + size > len(body):
            raise invalid(
                f'the body ends inside of input "{name}": {len(body) - at} of its {size} bytes are there', "truncated"
            )
        check_size(name, size, shape, dtype)
        spans[index] = at, at + size
        data[index] = body[at : at + size]
        at += size
    if at < len(body):
        raise invalid(f"the body has {len(body) - at} bytes that belong to no input")
    return version.packed(data, shapes), spans


def checked_dtype(name: str, given: Any, dtype: torch.dtype) -> torch.dtype:
    if given != NAMES[dtype]:
        raise invalid(f'input "{name}" is {given}; the model takes {NAMES[dtype]}')
    return dtype


def checked_shape(name: str, shape: Any) -> list[int]:
    if type(shape) is not list or not all(type(size) is int for size in shape):
        raise invalid(f'input "{name}" has no shape: {shape!r}')
    check_shape(name, shape)
    return shape


def read_outputs(request: dict[str, Any], binary: bool, version: Version) -> list[tuple[int, bool]]:
    given = request.get("outputs")
    if not given:
        return [(index, binary) for index in range(len(version.output_names))]
    if type(given) is not list:
        raise invalid("outputs is no list")
    wanted = []
    for entry in given:
        name = entry.get("name") if type(entry) is dict else None
        index = version.output_index.get(name) if type(name) is str else None
        if index is None:
            raise invalid(f"there is no output {name}; the outputs are {', '.join(version.output_index)}")
        parameters = object_at(entry, "parameters")
        refuse_unknown(parameters)
        wanted.append((index, bool(parameters.get("binary_data", binary))))
    return wanted


def write(asked: Asked, answer: Sequence[torch.Tensor], version: Version) -> tuple[bytes, int | None]:
    """The body of an answer, and how long its JSON is where binary tensors follow."""
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    cut = Cut.all_of(answer)
    for index, binary in asked.outputs:
        entry: dict[str, Any] = {
            "name": version.output_names[index],
            "datatype": NAMES[cut.whole.tensors[index].dtype],
            "shape": cut.shape(index),
        }
        if binary:
            data = cut.packed(index)
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            entry["data"] = orjson.Fragment(cut.json(index))
        outputs.append(entry)
    head: dict[str, Any] = {"model_name": version.name, "model_version": version.number, "outputs": outputs}
    if asked.id:
        head["id"] = asked.id
    text = orjson.dumps(head)
    return (b"".join([text, *tail]), len(text)) if tail else (text, None)
