"""The protocol as its own client speaks it: HTTP with JSON and with bytes, gRPC, and both asynchronously."""

from __future__ import annotations

import asyncio
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import grc
from tests.server.running import Running

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")


CLOSE = {"tiny": 1e-6, "gpu": 1e-5}


def request(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    make = np.random.default_rng(seed)
    return {
        "dense": make.normal(size=(batch, 3)).astype(np.float32),
        "ids": make.integers(0, 50, (batch, 2)),
    }


def inputs(kind: Any, columns: dict[str, np.ndarray], **how: Any) -> list[Any]:
    found = []
    for name, array in columns.items():
        one = kind.InferInput(name, list(array.shape), {"float32": "FP32", "int64": "INT64"}[str(array.dtype)])
        one.set_data_from_numpy(array, **how)
        found.append(one)
    return found


@pytest.fixture(scope="module")
def program(tiny: Path) -> grc.Program:
    return grc.load(tiny)


def expected(program: grc.Program, columns: dict[str, np.ndarray]) -> np.ndarray:
    return program(*(torch.from_numpy(columns[name]) for name in ("dense", "ids"))).numpy()


@pytest.fixture(scope="module")
def clients(server: Running) -> Any:
    with (
        http.InferenceServerClient(f"127.0.0.1:{server.http}") as over_http,
        grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as over_grpc,
    ):
        yield {"http": over_http, "grpc": over_grpc}


@pytest.mark.parametrize("name", ["http", "grpc"])
@pytest.mark.parametrize("batch", [0, 1, 7, 64])
def test_answers_as_the_program_does(clients: Any, program: grc.Program, model: str, name: str, batch: int) -> None:
    kind = {"http": http, "grpc": grpc}[name]
    columns = request(batch)
    found = clients[name].infer(model, inputs(kind, columns), request_id="r7")
    np.testing.assert_allclose(found.as_numpy("output"), expected(program, columns), rtol=CLOSE[model])
    response = found.get_response()
    assert (response if name == "http" else {"id": response.id})["id"] == "r7"


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_a_client_may_name_priority_and_timeout(clients: Any, name: str) -> None:
    given = inputs({"http": http, "grpc": grpc}[name], request(1))
    assert clients[name].infer("tiny", given, priority=1, timeout=5_000_000).as_numpy("output").shape == (1,)


@pytest.mark.parametrize("kind", ["int64_param", "uint64_param"])
def test_a_timeout_over_grpc_may_be_any_integer(server: Running, kind: str) -> None:
    import grpc as library
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    asked = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[bytes(12), bytes(16)])
    asked.inputs.add(name="dense", datatype="FP32", shape=[1, 3])
    asked.inputs.add(name="ids", datatype="INT64", shape=[1, 2])
    setattr(asked.parameters["timeout"], kind, 1)
    with library.insecure_channel(f"127.0.0.1:{server.grpc}") as channel, pytest.raises(library.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asked)
    assert caught.value.code() == library.StatusCode.UNAVAILABLE


def test_the_priority_of_a_request_reaches_the_scheduler(server: Running) -> None:
    from grc.runtime.server.scheduler import LOWEST
    from grc.runtime.server.service import Call, Service

    service: Any = SimpleNamespace(loop=SimpleNamespace(call_soon=lambda call: None), hand_over=None, arrived=[])
    version: Any = SimpleNamespace(
        merge=SimpleNamespace(ragged=False),
        program=SimpleNamespace(check=SimpleNamespace(batch=lambda given: 1)),
    )
    for priority in (0, 3):
        call = Call("id", "http", 10.0)
        call.asks(None, priority)
        Service.submit(service, call, version, [], None)  # type: ignore[arg-type]
    assert [work.priority for work in service.arrived] == [LOWEST, 3]


def test_a_request_over_grpc_has_its_client_s_id(server: Running) -> None:
    import grpc as library
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    asked = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[bytes(12), bytes(16)])
    asked.inputs.add(name="dense", datatype="FP32", shape=[1, 3])
    asked.inputs.add(name="ids", datatype="INT64", shape=[1, 2])
    with library.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def told(**how: Any) -> str:
            _, call = stub.ModelInfer.with_call(asked, **how)
            return dict(call.trailing_metadata())["x-request-id"]

        assert told() != told(), "one of the server's own"
        asked.id = "the protocol's"
        assert told() == "the_protocol's"
        assert told(metadata=[("x-request-id", "mine 7")]) == "mine_7"
        asked.model_name = "none"
        with pytest.raises(library.RpcError) as caught:
            told(metadata=[("x-request-id", "mine")])
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine"
    assert any(event.get("id") == "mine" and event["event"] == "refused" for event in server.events())


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("taken", [True, False])
def test_json_and_bytes_mix(clients: Any, program: grc.Program, given: bool, taken: bool) -> None:
    columns = request(3)
    wanted = [http.InferRequestedOutput("output", binary_data=taken)]
    found = clients["http"].infer("tiny", inputs(http, columns, binary_data=given), outputs=wanted)
    np.testing.assert_allclose(found.as_numpy("output"), expected(program, columns), rtol=1e-6)


def test_inputs_in_any_order_and_keyed_json(server: Running, program: grc.Program) -> None:
    columns = request(2)
    body = {
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [2, 2], "data": columns["ids"].tolist()},
            {"name": "dense", "datatype": "FP32", "shape": [2, 3], "data": columns["dense"].ravel().tolist()},
        ]
    }
    status, text, headers = server.ask("/v2/models/tiny/infer", json.dumps(body).encode())
    answer = json.loads(text)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert (answer["model_name"], answer["model_version"]) == ("tiny", "1")
    assert answer["outputs"][0]["shape"] == [2] and answer["outputs"][0]["datatype"] == "FP32"
    np.testing.assert_allclose(answer["outputs"][0]["data"], expected(program, columns), rtol=1e-6)


def test_a_packed_body_is_unpacked(clients: Any, program: grc.Program) -> None:
    columns = request(5)
    for algorithm in ("gzip", "deflate"):
        found = clients["http"].infer("tiny", inputs(http, columns), request_compression_algorithm=algorithm)
        np.testing.assert_allclose(found.as_numpy("output"), expected(program, columns), rtol=1e-6)


def test_typed_contents_over_grpc(server: Running, program: grc.Program) -> None:
    import grpc as library
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    columns = request(2)
    asked = pb.ModelInferRequest(model_name="tiny")
    dense = asked.inputs.add(name="dense", datatype="FP32", shape=[2, 3])
    dense.contents.fp32_contents.extend(columns["dense"].ravel().tolist())
    ids = asked.inputs.add(name="ids", datatype="INT64", shape=[2, 2])
    ids.contents.int64_contents.extend(columns["ids"].ravel().tolist())
    with library.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asked)
    found = np.frombuffer(answer.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(found, expected(program, columns), rtol=1e-6)


def test_asynchronous_clients(server: Running, program: grc.Program, model: str) -> None:
    import tritonclient.grpc.aio as grpc_aio
    import tritonclient.http.aio as http_aio

    requests = [request(1 + n % 5, seed=n) for n in range(40)]

    async def ask() -> list[Any]:
        async with (
            http_aio.InferenceServerClient(f"127.0.0.1:{server.http}") as over_http,
            grpc_aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as over_grpc,
        ):
            assert await over_http.is_server_ready() and await over_grpc.is_model_ready(model)
            calls = [
                (over_http if n % 2 else over_grpc).infer(model, inputs(http if n % 2 else grpc, columns))
                for n, columns in enumerate(requests)
            ]
            return await asyncio.gather(*calls)

    for columns, found in zip(requests, asyncio.run(ask()), strict=True):
        np.testing.assert_allclose(found.as_numpy("output"), expected(program, columns), rtol=CLOSE[model])


def test_a_stream_answers_every_request_and_survives_a_bad_one(
    server: Running, program: grc.Program, model: str
) -> None:
    import queue

    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        bad = {**request(1), "ids": np.array([[99, 0]])}
        for columns in (request(1), bad, request(2)):
            client.async_stream_infer(model, inputs(grpc, columns))
        found = [answers.get(timeout=30) for _ in range(3)]
    assert [error is None for _, error in found] == [True, False, True]
    assert found[1][1].message() == 'input "ids" has id 99 at row 0, column 0; table users.weight has 50 rows'
    np.testing.assert_allclose(found[2][0].as_numpy("output"), expected(program, request(2)), rtol=CLOSE[model])


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_what_a_client_may_ask_of_a_model(clients: Any, name: str) -> None:
    client = clients[name]
    how = {} if name == "http" else {"as_json": True}
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny", "1")
    assert client.get_server_metadata(**how)["name"] == "grc"
    metadata = client.get_model_metadata("tiny", **how)
    assert [(i["name"], i["datatype"], [int(s) for s in i["shape"]]) for i in metadata["inputs"]] == [
        ("dense", "FP32", [-1, 3]),
        ("ids", "INT64", [-1, 2]),
    ]
    config = client.get_model_config("tiny", **how)
    config = config if name == "http" else config["config"]
    assert (config["name"], config["max_batch_size"]) == ("tiny", 64)
    assert [int(d) for d in config["input"][0]["dims"]] == [3]
    assert "dynamic_batching" in config
    before = counts(client, how)
    client.infer("tiny", inputs({"http": http, "grpc": grpc}[name], request(4)))
    after = counts(client, how)
    assert after[0] - before[0] >= 4 and after[1] - before[1] >= 1
    index = client.get_model_repository_index(**how)
    index = index if name == "http" else index["models"]
    assert [(m["name"], m["version"], m["state"]) for m in index] == [("tiny", "1", "READY"), ("bags", "1", "READY")]


def counts(client: Any, how: dict[str, bool]) -> tuple[int, int]:
    (found,) = client.get_inference_statistics("tiny", **how)["model_stats"]
    return int(found.get("inference_count", 0)), int(found.get("execution_count", 0))


def test_jagged_requests_get_their_own_answers_when_merged(server: Running, bags: Path) -> None:
    from tests.server.conftest import bags_inputs

    program = grc.load(bags)
    requests = [bags_inputs(1 + n % 4, seed=n) for n in range(60)]

    def ask(tensors: Any) -> np.ndarray:
        columns = dict(zip(("dense", "values", "lengths"), (t.numpy() for t in tensors), strict=True))
        with http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
            return client.infer("bags", inputs(http, columns)).as_numpy("output")

    with ThreadPoolExecutor(12) as pool:
        for tensors, found in zip(requests, pool.map(ask, requests), strict=True):
            np.testing.assert_allclose(found, program(*tensors).numpy(), rtol=1e-5, atol=1e-6)
    assert server.metric('grc_batch_requests_bucket{le="1.0",model="bags"}') < server.metric(
        'grc_batch_requests_count{model="bags"}'
    ), "nothing was merged"


def test_recommendations_in_the_users_words(server: Running, program: grc.Program) -> None:
    body = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7}
    status, text, headers = server.ask(
        "/v2/models/tiny/recommend", json.dumps(body).encode(), x_request_id="mine", content_type="application/json"
    )
    own = program(torch.tensor([body["dense"]]), torch.tensor([[3, 7]]))
    assert (status, headers["x-request-id"]) == (200, "mine")
    assert json.loads(text) == {"user": 3, "click": pytest.approx(float(own[0]), rel=1e-6)}
    packed = gzip.compress(json.dumps(body).encode())
    assert server.ask("/v2/models/tiny/recommend", packed, content_encoding="gzip")[1] == text


def test_an_example_that_gets_no_answer_is_not_shown(models: Path, compiled: Any, tmp_path: Path) -> None:
    from grc.runtime.server.version import Version

    good = (models / "request.json").read_text()
    row = {"dense": [0.5, -1.0, 2.0], "user": 3}
    spoilt = [json.dumps({**row, "item": 80}), json.dumps({**row, "item": 7, "spoil": True})]
    for text in ('{"user": 3}', "[1]", '{"dense": [1.0], "user": 3, "item": 7}', *spoilt):
        (models / "request.json").write_text(text)
        try:
            artifact = compiled(tmp_path / "model.grc")
        finally:
            (models / "request.json").write_text(good)
        assert Version("tiny", "1", artifact).example is None, text


@pytest.mark.parametrize(
    ("example", "schema"),
    [
        ([1, 2.5], {"type": "array", "items": {"type": "number"}}),
        ([1, "a"], {"type": "array", "items": {}}),
        ([], {"type": "array", "items": {}}),
        ({"at": None, "new": True}, {"type": "object", "properties": {"at": {}, "new": {"type": "boolean"}}}),
    ],
)
def test_the_schema_of_an_example_promises_no_more_than_it_shows(example: Any, schema: dict[str, Any]) -> None:
    from grc.runtime.server.openapi import schema_of

    assert schema_of(example) == schema


def test_openapi_names_every_path_and_an_example_that_works(server: Running) -> None:
    document = json.loads(server.ask("/openapi.json")[1])
    assert document["openapi"] == "3.1.0"
    recommend = document["paths"]["/v2/models/tiny/recommend"]["post"]
    assert recommend["description"] == "One user and one item, with three numbers."
    assert "/v2/models/bags/recommend" not in document["paths"]
    example = document["paths"]["/v2/models/tiny/infer"]["post"]["requestBody"]["content"]["application/json"][
        "example"
    ]
    assert server.ask("/v2/models/tiny/infer", json.dumps(example).encode())[0] == 200
    words = recommend["requestBody"]["content"]["application/json"]["example"]
    assert words == {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7}
    sent = recommend["requestBody"]["content"]["application/json"]["schema"]
    number, integer = {"type": "number"}, {"type": "integer"}
    fields = {"dense": {"type": "array", "items": number}, "user": integer, "item": integer}
    assert sent == {"type": "object", "properties": fields}
    answer = recommend["responses"]["200"]["content"]["application/json"]
    assert answer["schema"] == {"type": "object", "properties": {"user": integer, "click": number}}
    assert answer["example"]["user"] == 3
    assert server.ask("/v2/models/tiny/recommend", json.dumps(words).encode())[0] == 200
    for path, methods in document["paths"].items():
        if "get" in methods:
            assert server.ask(path.replace("{version}", "1"))[0] == 200, path
        if path.startswith("/v2/models/tiny") and "/versions" not in path:
            assert path.replace("/tiny", "/tiny/versions/{version}") in document["paths"]
    assert server.ask("/v2/repository/index", method="POST")[0] == 200 and "/v2/repository/index" in document["paths"]
    codes = {
        code for methods in document["paths"].values() for found in methods.values() for code in found["responses"]
    }
    assert codes == {"200", "204", *document["components"]["responses"]}
    told = ["400", "404", "405", "408", "413", "415", "431", "500", "503"]
    assert list(document["components"]["responses"]) == told
    page = server.ask("/docs")[1].decode()
    assert all(path in page for path in document["paths"])
