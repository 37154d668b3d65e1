"""A bad request is told what is wrong with it, in the same words over HTTP and gRPC, and the server goes on."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import ON_GPU
from tests.server.running import Running, running

grpc = pytest.importorskip("tritonclient.grpc")

DENSE = {"name": "dense", "datatype": "FP32", "shape": [1, 3], "data": [0.5, -1.0, 2.0]}
IDS = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [3, 7]}
GOOD = {"inputs": [DENSE, IDS]}
INFER, RECOMMEND = "/v2/models/tiny/infer", "/v2/models/tiny/recommend"


@pytest.fixture(autouse=True)
def goes_on(server: Running) -> Iterator[None]:
    yield
    assert server.ask(INFER, json.dumps(GOOD).encode())[0] == 200


def both(dense: dict[str, Any] | None = None, ids: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"inputs": [{**DENSE, **(dense or {})}, {**IDS, **(ids or {})}], **more}


# Bodies that can be sent as JSON and, but for those marked, as protobuf too.
BOTH = {
    "dtype": (both({"datatype": "FP64"}), 'input "dense" is FP64; the model takes FP32'),
    "rank": (
        both({"shape": [3]}),
        'input "dense" has 1 dimensions [3]; the model takes [batch, 3]',
    ),
    "negative shape": (both({"shape": [-1, 3]}), 'input "dense" has no shape: [-1, 3]'),
    "shape of no tensor": (
        both({"shape": [0, 1 << 47, 1 << 47], "data": []}, {"shape": [0, 2], "data": []}),
        f'input "dense" has a shape that is too large: [0, {1 << 47}, {1 << 47}]',
    ),
    "many dimensions": (
        both({"shape": [1] * 70, "data": [1.0]}),
        f'input "dense" has 70 dimensions {[1] * 70}; the model takes [batch, 3]',
    ),
    "width": (
        both({"shape": [1, 2], "data": [1.0, 2.0]}),
        'input "dense" has shape [1, 2]; the model takes [batch, 3]',
    ),
    "batch": (
        both(ids={"shape": [2, 2], "data": [1, 2, 3, 4]}),
        'input "ids" has size 2 in dimension 0; at batch 1 it must be 1',
    ),
    "name": (
        {"inputs": [DENSE, {**IDS, "name": "age"}]},
        "the request has an unknown input age; the inputs are dense, ids",
    ),
    "missing": ({"inputs": [DENSE]}, "the request misses input ids; the inputs are dense, ids"),
    "twice": ({"inputs": [DENSE, IDS, DENSE]}, 'input "dense" is given twice'),
    "values": (both({"shape": [2, 3]}), 'input "dense" has 3 values; shape [2, 3] has 6'),
    "large": (
        both({"shape": [65, 3], "data": [0.0] * 195}, {"shape": [65, 2], "data": [1] * 130}),
        "the request has batch 65; the artifact takes up to 64",
    ),
    "id": (
        both(ids={"data": [3, 80]}),
        'input "ids" has id 80 at row 0, column 1; table items.weight has 80 rows',
    ),
    "negative id": (
        both(ids={"data": [-1, 7]}),
        'input "ids" has id -1 at row 0, column 0; table users.weight has 50 rows',
    ),
    "output": ({**GOOD, "outputs": [{"name": "best"}]}, "there is no output best; the outputs are output"),
}


@pytest.mark.parametrize("case", BOTH)
def test_over_http(server: Running, case: str) -> None:
    body, message = BOTH[case]
    assert server.error(INFER, json.dumps(body).encode()) == (400, message)


@pytest.mark.parametrize("case", BOTH)
def test_over_grpc(server: Running, case: str) -> None:
    import grpc as library
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    body, message = BOTH[case]
    asked = pb.ModelInferRequest(model_name="tiny")
    for entry in body["inputs"]:
        one = asked.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        field = one.contents.fp32_contents if entry["name"] == "dense" else one.contents.int64_contents
        field.extend(entry["data"])
    for entry in body.get("outputs", ()):
        asked.outputs.add(name=entry["name"])
    with library.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(library.RpcError) as caught:
            stub.ModelInfer(asked)
    assert (caught.value.code(), caught.value.details()) == (library.StatusCode.INVALID_ARGUMENT, message)


NO_TIME, NO_PRIORITY = "timeout must be a number of microseconds, not ", "priority must be a whole number, not "
PARAMETERS = [
    ("timeout", "string_param", "soon", f"{NO_TIME}'soon'"),
    ("timeout", "string_param", "", f"{NO_TIME}''"),
    ("timeout", "int64_param", -5, f"{NO_TIME}-5"),
    ("timeout", "double_param", 1.5, f"{NO_TIME}1.5"),
    ("timeout", "bool_param", False, f"{NO_TIME}False"),
    ("priority", "string_param", "1", f"{NO_PRIORITY}'1'"),
    ("priority", "int64_param", -1, f"{NO_PRIORITY}-1"),
    ("priority", "double_param", 1.0, f"{NO_PRIORITY}1.0"),
    ("sequence_id", "uint64_param", 4, "this server knows no sequences"),
    ("sequence_id", "string_param", "4", "this server knows no sequences"),
]


@pytest.mark.parametrize(("name", "kind", "value", "told"), PARAMETERS)
def test_parameters_that_do_not_fit_over_either_protocol(
    server: Running, name: str, kind: str, value: Any, told: str
) -> None:
    import grpc as library
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    assert server.error(INFER, json.dumps({**GOOD, "parameters": {name: value}}).encode()) == (400, told)
    asked = pb.ModelInferRequest(model_name="tiny")
    setattr(asked.parameters[name], kind, value)
    with library.insecure_channel(f"127.0.0.1:{server.grpc}") as channel, pytest.raises(library.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asked)
    assert (caught.value.code(), caught.value.details()) == (library.StatusCode.INVALID_ARGUMENT, told)


LENGTHS = {
    "too few values": ([2, 1, 0, 2], 'input "lengths" adds up to 5; input "values" has 4 values'),
    "too many values": ([1, 1, 0, 1], 'input "lengths" adds up to 3; input "values" has 4 values'),
    "negative": ([2, -1, 1, 2], 'input "lengths" has length -1 at position 1'),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_that_do_not_fit_their_values(server: Running, case: str) -> None:
    lengths, message = LENGTHS[case]
    inputs = [
        {"name": "dense", "datatype": "FP32", "shape": [2, 3], "data": [0.5] * 6},
        {"name": "values", "datatype": "INT64", "shape": [4], "data": [3, 7, 1, 2]},
        {"name": "lengths", "datatype": "INT64", "shape": [4], "data": [1, 1, 0, 2]},
    ]
    path = "/v2/models/bags/infer"
    assert server.ask(path, json.dumps({"inputs": inputs}).encode())[0] == 200
    inputs[2]["data"] = lengths
    assert server.error(path, json.dumps({"inputs": inputs}).encode()) == (400, message)


JSON = {
    "no json": (b"{", "the request is no JSON: unexpected end of data: line 1 column 2 (char 1)"),
    "an array": (b"[1]", "the request is a JSON array, not an object"),
    "no inputs": (b"{}", "the request has no list of inputs"),
    "no name": (json.dumps({"inputs": [{}]}).encode(), "an input has no name"),
    "no shape": (json.dumps(both({"shape": "3"})).encode(), "input \"dense\" has no shape: '3'"),
    "no data": (
        json.dumps({"inputs": [{k: v for k, v in DENSE.items() if k != "data"}, IDS]}).encode(),
        'input "dense" has neither data nor binary_data_size',
    ),
    "ragged": (json.dumps(both({"data": [[1.0, 2.0], [3.0]]})).encode(), 'input "dense" has rows of different lengths'),
    "fraction": (
        json.dumps(both(ids={"data": [1.5, 2]})).encode(),
        'input "ids" has floating-point numbers; the model takes INT64',
    ),
    "whole numbers with a point": (
        json.dumps(both(ids={"data": [2.0, 2]})).encode(),
        'input "ids" has floating-point numbers; the model takes INT64',
    ),
    "words": (
        json.dumps(both({"data": ["a", "b", "c"]})).encode(),
        'input "dense" has values that are no numbers of its type; the model takes FP32',
    ),
    "null": (
        json.dumps(both({"data": [None, 1.0, 2.0]})).encode(),
        'input "dense" has values that are no numbers of its type; the model takes FP32',
    ),
    "too many digits": (
        json.dumps(both(ids={"data": [1 << 63, 2]})).encode(),
        'input "ids" has a value that is too large; the model takes INT64',
    ),
    "parameters": (json.dumps(both(parameters=3)).encode(), "parameters is a JSON number, not an object"),
    "shared memory": (
        json.dumps(both({"parameters": {"shared_memory_region": "here"}})).encode(),
        "this server knows no shared memory",
    ),
    "id": (json.dumps(both(id=7)).encode(), "id is a JSON number, not a string"),
    "bytes nobody asked for": (
        json.dumps(GOOD).encode(),
        "the body has {left} bytes; its JSON alone should have 9999",
    ),
}


@pytest.mark.parametrize("case", JSON)
def test_json_that_does_not_fit(server: Running, case: str) -> None:
    body, message = JSON[case]
    headers = {"Inference_Header_Content_Length": "9999"} if case == "bytes nobody asked for" else {}
    assert server.error(INFER, body, **headers) == (400, message.format(left=len(body)))


def binary(dense: bytes, size: int | None = None, tail: bytes = b"") -> tuple[bytes, str]:
    """A body with `dense` as bytes, and how long its JSON is."""
    entry = {k: v for k, v in DENSE.items() if k != "data"}
    entry["parameters"] = {"binary_data_size": len(dense) if size is None else size}
    head = json.dumps({"inputs": [entry, IDS]}).encode()
    return head + dense + tail, str(len(head))


def test_bytes_that_do_not_fit(server: Running) -> None:
    twelve = struct.pack("<3f", 1, 2, 3)
    cases = [
        (binary(twelve[:8]), 'input "dense" has 8 bytes; shape [1, 3] of FP32 has 12'),
        (binary(twelve[:8], size=12), 'the body ends inside of input "dense": 8 of its 12 bytes are there'),
        (binary(twelve, tail=b"more"), "the body has 4 bytes that belong to no input"),
        (binary(twelve, size=-1), 'input "dense" has a binary_data_size that is no size: -1'),
    ]
    for (body, length), message in cases:
        assert server.error(INFER, body, Inference_Header_Content_Length=length) == (400, message)
    body, _ = binary(twelve)
    told = "Inference-Header-Content-Length must be a whole number, not many"
    assert server.error(INFER, body, Inference_Header_Content_Length="many") == (400, told)


def test_raw_contents_over_grpc_that_do_not_fit(server: Running) -> None:
    import grpc as library
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    asked = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[bytes(8)])
    asked.inputs.add(name="dense", datatype="FP32", shape=[1, 3])
    asked.inputs.add(name="ids", datatype="INT64", shape=[1, 2])
    with library.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(library.RpcError) as caught:
            stub.ModelInfer(asked)
        assert caught.value.details() == "the request has 2 inputs and 1 raw contents"
        asked.raw_input_contents.append(bytes(16))
        with pytest.raises(library.RpcError) as caught:
            stub.ModelInfer(asked)
        assert caught.value.details() == 'input "dense" has 8 bytes; shape [1, 3] of FP32 has 12'


def test_nan_is_named(server: Running) -> None:
    body, length = binary(struct.pack("<3f", 1, float("nan"), 3))
    told = 'input "dense" holds nan at [0, 1]'
    assert server.error(INFER, body, Inference_Header_Content_Length=length) == (400, told)


@pytest.mark.parametrize(
    ("path", "method", "status", "message"),
    [
        ("/v2/models/none/infer", "POST", 404, "unknown model none; this server has tiny, bags"),
        ("/v2/models/none", "GET", 404, "unknown model none; this server has tiny, bags"),
        ("/v2/models/tiny/versions/9/infer", "POST", 404, "model tiny has no version 9; it serves 1"),
        ("/v2/models/tiny/versions/9", "GET", 404, "model tiny has no version 9; it serves 1"),
        ("/v2/models/tiny/dance", "GET", 404, "there is nothing at /v2/models/tiny/dance"),
        ("/v3", "GET", 404, "there is nothing at /v3"),
        (INFER, "GET", 405, "/v2/models/tiny/infer takes POST, not GET"),
        ("/v2/models/tiny", "POST", 405, "/v2/models/tiny takes GET, not POST"),
        ("/v2", "DELETE", 405, "/v2 takes GET, not DELETE"),
        (
            "/v2/models/bags/recommend",
            "POST",
            404,
            "model bags has no preprocess and no postprocess: send tensors to infer",
        ),
    ],
)
def test_what_is_not_there(server: Running, path: str, method: str, status: int, message: str) -> None:
    assert server.error(path, b"{}" if method == "POST" else None, method) == (status, message)


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [("/v2", "DELETE", "GET, HEAD"), (INFER, "HEAD", "POST"), ("/v2/models/tiny/users/7/features", "GET", "DELETE")],
)
def test_a_method_that_a_path_does_not_take_is_told_which_it_takes(
    server: Running, path: str, method: str, allow: str
) -> None:
    status, _, headers = server.ask(path, method=method)
    assert (status, headers["allow"]) == (405, allow)


def test_unknown_model_and_version_over_grpc(server: Running) -> None:
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        for name, version, told in (
            ("none", "", "unknown model none; this server has tiny, bags"),
            ("tiny", "9", "model tiny has no version 9; it serves 1"),
        ):
            with pytest.raises(grpc.InferenceServerException) as caught:
                client.get_model_metadata(name, version)
            assert (caught.value.status(), caught.value.message()) == ("StatusCode.NOT_FOUND", told)
        with pytest.raises(grpc.InferenceServerException) as caught:
            client.load_model("tiny")
        told = "models are those that the server was started with; new versions of them are found on disk"
        assert (caught.value.status(), caught.value.message()) == ("StatusCode.UNIMPLEMENTED", told)


ROW = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7}


def deep(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return {"dense": value}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"[1]", 400, "the request is a JSON array, not an object"),
        (b"{", 400, "the request is no JSON: unexpected end of data: line 1 column 2 (char 1)"),
        (json.dumps({"user": 3}).encode(), 400, "preprocess: 'dense'"),
        (json.dumps({**ROW, "item": 80}).encode(), 400, None),
        (json.dumps({**ROW, "spoil": True}).encode(), 500, "postprocess: spoilt"),
        (json.dumps({**ROW, "exit": "before"}).encode(), 400, "preprocess: SystemExit(3)"),
        (json.dumps({**ROW, "exit": "after"}).encode(), 500, "postprocess: SystemExit(3)"),
        (json.dumps(deep(32)).encode(), 400, "the request nests deeper than 32 levels"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, None),
    ],
)
def test_recommendations_that_fail(server: Running, body: bytes, status: int, message: str | None) -> None:
    found = server.error(RECOMMEND, body)
    expected = 'input "ids" has id 80 at row 0, column 1; table items.weight has 80 rows'
    if body.startswith(b'{"a"'):
        assert found[0] == 400 and found[1].startswith("the request is no JSON: depth limit exceeded")
    else:
        assert found == (status, message or expected)
    assert server.ask(RECOMMEND, json.dumps(ROW).encode())[0] == 200


@pytest.mark.parametrize("where", ["sleep", "sleep after"])
def test_a_deadline_holds_for_functions_that_have_begun(server: Running, where: str) -> None:
    began = time.monotonic()
    told = server.error(RECOMMEND, json.dumps({**ROW, where: 1.5}).encode(), x_timeout_ms="200")
    assert told == (503, "model tiny was too busy: the request's time ran out")
    assert time.monotonic() - began < 1.2


def test_an_id_can_not_write_headers_or_lines_of_log(server: Running) -> None:
    body = json.dumps({**GOOD, "id": "a\r\nset-cookie: b\u2028ü"}).encode()
    status, text, headers = server.ask(INFER, body)
    assert (status, headers["x-request-id"]) == (200, "a__set-cookie:_b__")
    assert "set-cookie" not in headers
    assert json.loads(text)["id"] == "a\r\nset-cookie: b\u2028ü", "the protocol's own id comes back as it was"
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        with pytest.raises(grpc.InferenceServerException) as caught:
            client.infer("tiny", [], request_id="a\r\nb")
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_headers_that_do_not_fit(server: Running) -> None:
    body = json.dumps(ROW).encode()
    for headers, told in (
        ({"x_timeout_ms": "soon"}, "x-timeout-ms must be a whole number, not soon"),
        ({"x_user_id": "7"}, "x-user-id and x-features-version belong together"),
        ({"x_user_id": "7", "x_features_version": "new"}, "x-features-version must be a whole number, not new"),
    ):
        assert server.error(RECOMMEND, body, **headers) == (400, told)


@pytest.mark.parametrize("device", [{}, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def test_a_bad_request_in_a_batch_fails_alone(compiled: Any, tmp_path: Path, device: dict[str, str]) -> None:
    """A slow artifact lets requests pile up behind one, so that good and bad ones share a batch."""
    from tests.server.test_scheduler import slow

    edit = partial(slow, on_gpu=bool(device))
    artifact = compiled(tmp_path / "slow.grc", edit=edit, max_batch=64, **device)
    bodies = [both(ids={"data": [3, 80] if n % 5 == 0 else [3, n % 80]}) for n in range(30)]
    with running(tmp_path, f"tiny={artifact}") as server, ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda body: server.ask(INFER, json.dumps(body).encode()), bodies))
        merged = server.metric('grc_batch_requests_sum{model="tiny"}')
        batches = server.metric('grc_batch_requests_count{model="tiny"}')
    for n, (status, text, _) in enumerate(found):
        if n % 5 == 0:
            told = 'input "ids" has id 80 at row 0, column 1; table items.weight has 80 rows'
            assert (status, json.loads(text)["error"]) == (400, told)
        else:
            assert status == 200
            assert len(json.loads(text)["outputs"][0]["data"]) == 1
    assert merged > 2 * batches, "requests were not merged, so that nothing was shown"
