"""A connection as clients use it, well and badly: every request is answered in its turn, or refused by name."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grc.runtime.server.refusal import Refused
from tests.server.running import Running, needs_extra, running, until

needs_extra()

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
INFER = "/v2/models/tiny/infer"
ROW = {
    "inputs": [
        {"name": "dense", "datatype": "FP32", "shape": [1, 3], "data": [0.5, -1.0, 2.0]},
        {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [3, 7]},
    ]
}


def post(path: str, body: object, *headers: str) -> bytes:
    text = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(text)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + text


class Peer:
    """A client that sends bytes as they are."""

    def __init__(self, peer: socket.socket):
        self.socket, self.file = peer, peer.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        status = int(self.file.readline().split()[1])
        headers = {}
        while line := self.file.readline().strip().decode():
            name, _, value = line.partition(": ")
            headers[name] = value
        return status, headers, self.file.read(int(headers.get("content-length", 0))) if body else b""

    def reset(self) -> None:
        """When it is closed, the server is told that nobody reads any more."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def closed(self) -> bool:
        return self.file.read() == b""


@contextmanager
def peer(server: Running) -> Iterator[Peer]:
    with socket.create_connection(("127.0.0.1", server.http), timeout=30) as found:
        client = Peer(found)
        with client.file:
            yield client


def test_requests_sent_at_once_are_answered_in_order(server: Running) -> None:
    names = [f"r{n}" for n in range(300)]
    data = b"".join(post(INFER, {**ROW, "id": name}) + LIVE for name in names)
    with peer(server) as client:
        client.send(data)
        found = [client.answer() for _ in range(2 * len(names))]
        assert {status for status, _, _ in found} == {200}
        assert [json.loads(body)["id"] for _, _, body in found[::2]] == names
        assert all(body == b"" for _, _, body in found[1::2])


def test_a_request_may_come_byte_by_byte(server: Running) -> None:
    with peer(server) as client:
        for byte in post(INFER, ROW):
            client.send(bytes([byte]))
        status, headers, body = client.answer()
        assert (status, json.loads(body)["model_name"]) == (200, "tiny")
        assert headers["date"].endswith(" GMT") and "connection" not in headers
        client.send(LIVE)
        assert client.answer()[0] == 200


@pytest.mark.parametrize(
    "request_", [b"GET /v2 HTTP/1.0\r\n\r\n", b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
)
def test_a_connection_ends_where_its_client_says_so(server: Running, request_: bytes) -> None:
    with peer(server) as client:
        client.send(request_)
        status, headers, _ = client.answer()
        assert (status, headers["connection"], client.closed()) == (200, "close", True)


def test_an_answer_to_head_has_no_body(server: Running) -> None:
    with peer(server) as client:
        client.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        length = client.answer()[1]["content-length"]
        client.send(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\n\r\n" + LIVE)
        status, headers, _ = client.answer(body=False)
        assert (status, headers["content-length"]) == (200, length)
        assert client.answer()[0] == 200
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny", "/metrics"):
            client.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert client.answer(body=False)[0] == 200, path


def test_an_answer_without_content_has_no_length(server: Running) -> None:
    with peer(server) as client:
        client.send(b"DELETE /v2/models/tiny/users/7/features HTTP/1.1\r\nHost: x\r\n\r\n" + LIVE)
        status, headers, _ = client.answer()
        assert (status, sorted(headers)) == (204, ["date", "x-request-id"])
        assert client.answer()[0] == 200


def test_a_client_that_asks_first_is_told_to_go_on(server: Running) -> None:
    head, _, body = post(INFER, ROW, "Expect: 100-continue").partition(b"\r\n\r\n")
    with peer(server) as client:
        client.send(head + b"\r\n\r\n")
        assert client.file.readline() + client.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert client.answer()[0] == 200


def test_an_upgrade_is_answered_as_plain_http(server: Running) -> None:
    with peer(server) as client:
        client.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nnot http")
        status, headers, _ = client.answer()
        assert (status, headers["connection"], client.closed()) == (200, "close", True)


@pytest.mark.parametrize(("size", "end"), [(65, b"\r\n\r\n"), (400, b"")])
@pytest.mark.parametrize("begin", [b"GET /v2?", b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_heads_are_limited(server: Running, begin: bytes, size: int, end: bytes) -> None:
    """Also those that never end."""
    with peer(server) as client:
        client.send(LIVE + begin + b"a" * (size << 10) + (b" HTTP/1.1" if b"?" in begin else b"") + end)
        assert client.answer()[0] == 200
        status, headers, body = client.answer()
        told = {"error": "the head of the request is longer than 65536 bytes"}
        assert (status, json.loads(body), headers["connection"], client.closed()) == (431, told, "close", True)


def test_many_small_headers_are_one_long_head(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, f"tiny={tiny}", "--max-head", 1) as server, peer(server) as client:
        lines = b"".join(b"x-%d: y\r\n" % n for n in range(200))
        client.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
        status, _, body = client.answer()
        assert (status, json.loads(body)) == (431, {"error": "the head of the request is longer than 1024 bytes"})


def test_a_head_that_does_not_come_is_not_waited_for(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, f"tiny={tiny}", "--body-timeout", 0.3) as server, peer(server) as client:
        client.send(b"GET /v2 HTTP/1.1\r\nHo")
        status, _, body = client.answer()
        assert (status, json.loads(body)) == (408, {"error": "the head did not come within 0.3 s"})
        assert client.closed()


def calls_are_limited(server: Running) -> None:
    """Over gRPC, to two of them: a stream that is open is one."""
    grpc = pytest.importorskip("tritonclient.grpc")

    with ExitStack() as ends:
        clients = [ends.enter_context(grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")) for _ in range(3)]
        for client in clients[:2]:
            answered = threading.Event()
            client.start_stream(lambda result, error, answered=answered: answered.set())
            ends.callback(client.stop_stream)
            client.async_stream_infer("tiny", [])
            assert answered.wait(30)
        with pytest.raises(grpc.InferenceServerException) as caught:
            clients[2].is_server_live()
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_connections_are_limited(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, f"tiny={tiny}", "--max-connections", 2) as server:
        with peer(server) as one, peer(server) as two:
            for client in (one, two):
                client.send(LIVE)
                assert client.answer()[0] == 200
            with peer(server) as three:
                three.send(LIVE)
                status, headers, body = three.answer()
                assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
                assert json.loads(body) == {"error": "the server has its 2 connections"} and three.closed()
            one.send(LIVE)
            assert one.answer()[0] == 200
            calls_are_limited(server)
        for _ in until("room again"):
            if server.ask("/v2/health/live")[0] == 200:
                break
        assert server.metric('grc_refusals_total{model="",reason="connections"}') >= 1


def test_a_client_that_left_is_not_computed_for(tmp_path: Path, compiled: Callable[..., Path]) -> None:
    from tests.server.test_scheduler import slow

    artifact = compiled(tmp_path / "slow.grc", edit=slow)
    with running(tmp_path, f"tiny={artifact}", "--max-rows", 1) as server:
        with ExitStack() as open_ones:
            stay = [open_ones.enter_context(peer(server)) for _ in range(30)]
            for client in stay:
                client.send(post(INFER, ROW))
            with peer(server) as leaves:
                leaves.send(post(INFER, ROW))
                for _ in range(2):  # what was sent before these are answered has been read
                    assert server.ask("/v2/health/live")[0] == 200
                leaves.reset()
            assert [client.answer()[0] for client in stay] == [200] * len(stay)
        for _ in until("the client that left"):
            if server.metric('grc_refusals_total{model="tiny",reason="gone"}') == 1:
                break
        assert server.metric('grc_requests_total{code="200",model="tiny",protocol="http"}') == len(stay)


def test_a_client_over_grpc_that_left_is_counted_as_gone_and_not_computed_for(
    tmp_path: Path, compiled: Callable[..., Path]
) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    from tests.server.test_protocol import inputs, request
    from tests.server.test_scheduler import slow

    series = 'grc_requests_total{{code="{}",model="tiny",protocol="grpc"}}'
    pending = 'nv_inference_pending_request_count{model="tiny",version="1"}'
    answered: list[object] = []
    artifact, given = compiled(tmp_path / "slow.grc", edit=slow), inputs(grpc, request(1))
    with (
        running(tmp_path, f"tiny={artifact}", "--max-rows", 1, "--timeout", 300) as server,
        grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client,
    ):
        calls = [client.async_infer("tiny", given, lambda result, error: answered.append(error)) for _ in range(100)]
        for _ in until("all calls"):
            if len(answered) + server.metric(pending) >= 98:  # and one or two are being computed
                break
        calls[-1].cancel()
        for _ in until("all others"):
            if len(answered) == 100:
                break
        assert [server.metric(series.format(code)) for code in (200, 499)] == [99, 1]
        assert server.metric('grc_refusals_total{model="tiny",reason="gone"}') == 1
        assert [event["status"] for event in server.events() if event["event"] == "refused"] == [499]


@pytest.mark.parametrize(("left", "reason"), [(60.0, "gone"), (-1.0, "deadline")])
def test_why_nobody_waits_for_a_call_over_grpc(left: float, reason: str) -> None:
    pytest.importorskip("tritonclient.grpc")
    from grc.runtime.server.grpc_service import Grpc
    from grc.runtime.server.service import Call

    told: list[Refused] = []
    service: Any = SimpleNamespace(failed=lambda call, error: told.append(error))
    unused: Any = None

    async def call() -> None:
        answer = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(
            Grpc(service, unused, unused, unused).unless_ended(Call("", "grpc", left), answer)
        )
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(call())
    assert [refused.reason for refused in told] == [reason]


def test_a_client_that_leaves_its_recommendation_is_counted_as_gone(server: Running) -> None:
    series = 'grc_requests_total{{code="{}",model="tiny",protocol="http"}}'
    gone, answered = (server.metric(series.format(code)) for code in (499, 200))
    row = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7, "sleep": 0.6}
    with peer(server) as leaves:
        leaves.send(post("/v2/models/tiny/recommend", row))
        time.sleep(0.05)
    time.sleep(0.8)
    assert (server.metric(series.format(499)), server.metric(series.format(200))) == (gone + 1, answered)


def test_a_client_that_ends_its_side_gets_its_answers(server: Running) -> None:
    row = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7, "sleep": 0.05}
    with peer(server) as client:
        client.send(post("/v2/models/tiny/recommend", row) + post(INFER, ROW))
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.answer()[0] for _ in range(2)] == [200, 200]
        assert client.closed()


HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (f'{HEAD}Content-Length: 50\r\n\r\n{{"inputs"', "the body ends after 9 of 50 bytes"),
        (f"{HEAD}Content-Length: 50\r\n\r\n", "the body ends after 0 of 50 bytes"),
        (f'{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{{"in', "the body ends after 4 bytes, inside of its chunks"),
        (f"{HEAD}Content-Le", "the request ends inside of its head"),
        ("POST", "the request ends inside of its head"),
    ],
)
def test_a_request_that_is_cut_short_is_told_so(server: Running, sent: str, told: str) -> None:
    with peer(server) as client:
        client.send(LIVE + sent.encode())
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer()[0] == 200, "the request before it"
        status, headers, body = client.answer()
        assert (status, headers["connection"], json.loads(body), client.closed()) == (
            400,
            "close",
            {"error": told},
            True,
        )
        assert any(event.get("id") == headers["x-request-id"] for event in server.events())
