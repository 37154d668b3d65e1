"""Requests as bytes and answers as cuts: the same numbers as tensor by tensor."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import orjson
import pytest
import torch

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from grc.runtime.server import messages
from grc.runtime.server.cut import Cut, Whole
from grc.runtime.server.datatypes import NAMES, array_of, bytes_of_list, plain_array
from grc.runtime.server.merge import Merge
from grc.runtime.server.packed import Packed
from grc.runtime.server.refusal import Refused
from grc.runtime.server.version import Version

NUMBERS = [dtype for dtype in NAMES if dtype is not torch.bool]


def packed(*tensors: torch.Tensor) -> Packed:
    data = [array_of(t).tobytes() for t in tensors]
    return Packed(data, tuple(tuple(t.shape) for t in tensors), [t.dtype for t in tensors], len(tensors[0]))


@pytest.mark.parametrize("dtype", NAMES)
def test_a_batch_of_bytes_is_the_batch_of_its_tensors(dtype: torch.dtype) -> None:
    inputs = [{"name": "x", "dtype": str(dtype)[6:], "sizes": ["batch", 3]}]
    outputs = [{"dtype": "float32", "sizes": ["batch"]}]
    merge = Merge({"inputs": inputs, "outputs": outputs, "batch": {"max": 64, "dynamic": True}})
    requests = [[torch.arange(3 * n).reshape(n, 3).to(dtype)] for n in (1, 4, 2)]
    (found,) = merge.join_all([packed(*tensors) for tensors in requests])
    assert found.dtype is dtype and torch.equal(found, torch.cat([r[0] for r in requests]))
    mixed = merge.join_all([packed(*requests[0]), requests[1]])
    assert torch.equal(mixed[0], torch.cat([requests[0][0], requests[1][0]]))
    assert torch.equal(packed(*requests[1]).tensors()[0], requests[1][0])


def test_inputs_whose_batch_is_not_first_are_joined_where_it_is() -> None:
    inputs = [{"name": "x", "dtype": "int64", "sizes": [2, "batch"]}]
    outputs = [{"dtype": "float32", "sizes": ["batch"]}]
    merge = Merge({"inputs": inputs, "outputs": outputs, "batch": {"max": 64, "dynamic": True}})
    one, two = torch.tensor([[1], [2]]), torch.tensor([[3, 4], [5, 6]])
    assert merge.join_all([packed(one), packed(two)])[0].tolist() == [[1, 3, 4], [2, 5, 6]]


@pytest.mark.parametrize("dtype", NAMES)
def test_a_cut_is_the_same_as_tensor_bytes_and_json(dtype: torch.dtype) -> None:
    tensors = [torch.arange(10).reshape(5, 2).to(dtype), torch.arange(10).reshape(2, 5).to(dtype), torch.ones(3)]
    whole = Whole(tensors, [0, 1, None], 5)
    cut = Cut(whole, 1, 4)
    for index, own in enumerate((tensors[0][1:4], tensors[1][:, 1:4], tensors[2])):
        assert torch.equal(cut[index], own) and cut.shape(index) == list(own.shape)
        assert cut.packed(index) == array_of(own).tobytes()
        assert cut.json(index) == orjson.dumps(plain_array(own), option=orjson.OPT_SERIALIZE_NUMPY)
    assert len(cut) == len(list(cut)) == 3


def test_numbers_keep_their_shortest_digits() -> None:
    cut = Cut(Whole([torch.tensor([0.1, float("nan"), 1e-9])], [0], 3), 0, 3)
    assert cut.json(0) == b"[0.1,null,1e-9]"
    assert Cut(Whole([torch.empty(0, 4)], [None], 1), 0, 1).json(0) == b"[]"


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_of_json_become_the_bytes_of_their_dtype(dtype: torch.dtype) -> None:
    values = [0, 1, 100] if not dtype.is_floating_point else [0.5, -1.25, 3.0]
    assert bytes_of_list("x", values, [3], dtype) == array_of(torch.tensor(values, dtype=dtype)).tobytes()


def body(dense: list[float], ids: list[int], **more: object) -> tuple[bytes, int]:
    tail = array_of(torch.tensor(dense)).tobytes() + array_of(torch.tensor(ids)).tobytes()
    entries = [
        {"name": "dense", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}},
        {"name": "ids", "datatype": "INT64", "shape": [1, 2], "parameters": {"binary_data_size": 16}},
    ]
    head = json.dumps({"inputs": entries, **more}).encode()
    return head + tail, len(head)


def test_json_that_was_seen_before_is_not_read_again_and_its_bytes_are(tiny: Path) -> None:
    version = Version("tiny", "1", tiny)
    for n in range(3):
        asked = messages.read(*body([n, 1.0, 2.0], [n, 7], parameters={"timeout": 5000, "priority": 2}), version)
        assert [t.tolist() for t in asked.inputs.tensors()] == [[[n, 1.0, 2.0]], [[n, 7]]]
        assert (asked.inputs.rows, asked.outputs) == (1, [(0, False)])
        assert (asked.seconds, asked.priority) == (0.005, 2)
    assert (version.layouts.hits, len(version.layouts.entries)) == (2, 1)
    text, header = body([0.0, 1.0, 2.0], [3, 7], parameters={"timeout": 5000})
    with pytest.raises(Refused) as caught:
        messages.read(text + b"more", header, version)
    assert caught.value.message == "the body has 4 bytes that belong to no input"
    assert messages.read(*body([0.0, 1.0, 2.0], [3, 7], id="r1"), version).id == "r1"
    assert messages.read(*body([0.0, 1.0, 2.0], [3, 7], id="r1"), version).id == "r1"
    assert len(version.layouts.entries) == 1, "one with an id comes once"


def test_what_is_remembered_of_requests_holds_none_of_their_bytes(tiny: Path) -> None:
    version = Version("tiny", "1", tiny)
    asked = [messages.read(*body([0.0, 1.0, 2.0], [3, n], parameters={"timeout": n + 1}), version) for n in range(3)]
    held = {id(data) for one in asked for data in one.inputs.data}
    found: list[object] = [layout for layout, _, _ in version.layouts.entries.values()]
    assert len(found) == 3
    for _ in range(4):
        found = gc.get_referents(*found)
        assert not held & {id(one) for one in found}
