"""Bodies, well and badly sent: packed, large, cut short or slow, each is read or refused by name, and the server goes on."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.running import Running, running, until
from tests.server.test_bad_requests import BOTH, DENSE, GOOD, IDS, INFER, RECOMMEND, ROW, binary, deep
from tests.server.test_bad_requests import goes_on as goes_on  # after every test here too

grpc = pytest.importorskip("tritonclient.grpc")


def raw(server: Running, data: bytes, wait: bool = True) -> bytes:
    """Send bytes as they are, and read what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.http), timeout=30) as peer:
        peer.sendall(data)
        found = b""
        while wait and (part := peer.recv(65536)):
            found += part
        return found


def test_a_body_cut_short_harms_nobody(server: Running) -> None:
    before = server.metric('grc_refusals_total{model="",reason="truncated"}')
    body = json.dumps(GOOD).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for cut in (0, 1, len(body) // 2, len(body) - 1):
        raw(server, head + body[:cut], wait=False)
    for _ in until("four refusals"):
        if server.metric('grc_refusals_total{model="",reason="truncated"}') == before + 4:
            break
    assert server.ask(INFER, body)[0] == 200


def test_what_is_no_http_is_refused(server: Running) -> None:
    answer = raw(server, b"hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"\r\nconnection: close\r\n" in answer
    (told, *_) = [event for event in server.events() if event.get("reason") == "http"]
    assert (told["level"], told["message"]) == ("warning", "this is no HTTP: Invalid method encountered")
    assert answer.endswith(b'{"error":"this is no HTTP: Invalid method encountered"}')


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_spoilt_bodies_are_the_clients_fault(server: Running, data: st.DataObject) -> None:
    """Whatever is sent is answered or refused by name: never a 500, and never a closed door."""
    body, header = bytearray(json.dumps(GOOD).encode()), None
    if data.draw(st.booleans()):
        sent, header = binary(struct.pack("<3f", 1, 2, 3))
        body = bytearray(sent)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = data.draw(st.sampled_from([INFER, RECOMMEND]))
    headers = {"Inference_Header_Content_Length": header} if header else {}
    status, text, _ = server.ask(path, bytes(body), **headers)
    assert status in (200, 400), text


@pytest.mark.parametrize("coding", ["deflate", "Deflate", "DEFLATE", "Identity"])
def test_codings_are_told_in_any_case(server: Running, coding: str) -> None:
    body = json.dumps(GOOD).encode()
    sent = body if coding == "Identity" else zlib.compress(body)
    assert server.ask(INFER, sent, content_encoding=coding)[0] == 200


def test_a_packed_body_that_is_none(server: Running) -> None:
    body = json.dumps(GOOD).encode()
    status, told = server.error(INFER, body, content_encoding="gzip")
    assert status == 400 and told.startswith("the body is no gzip: ")
    assert server.error(INFER, zlib.compress(body)[:-8], content_encoding="deflate") == (
        400,
        "the body ends inside of its deflate",
    )
    assert server.error(INFER, body, content_encoding="br") == (
        415,
        "content-encoding br is unknown; gzip and deflate are known",
    )


LISTS, NAMES = b"[]," * (3 << 20), b"".join(b'"%d":1,' % n for n in range(1 << 20))
HEAVY = {"lists": b'{"x":[' + LISTS + b"[]]}", "names": b"{" + NAMES + b'"x":1}'}


@pytest.mark.parametrize("path", [INFER, RECOMMEND])
@pytest.mark.parametrize("what", HEAVY)
def test_json_of_more_values_than_its_size_allows_is_not_read(server: Running, what: str, path: str) -> None:
    status, told = server.error(path, zlib.compress(HEAVY[what], 1), content_encoding="deflate")
    assert status == 413 and told.endswith(" values; up to 2097152 are read"), told


@pytest.mark.parametrize("coding", ["identity", "deflate"])
def test_large_bodies_are_read_as_small_ones_are(server: Running, coding: str) -> None:
    def sent(body: dict[str, Any]) -> bytes:
        text = json.dumps(body).encode()
        return zlib.compress(text) if coding == "deflate" else text

    more = {"more": list(range(100_000))}
    for path, body in ((INFER, GOOD), (RECOMMEND, ROW)):
        small = server.ask(path, json.dumps(body).encode())[1]
        assert server.ask(path, sent({**body, **more}), content_encoding=coding)[:2] == (200, small)
    assert server.error(INFER, sent({"inputs": [DENSE], **more}), content_encoding=coding) == (400, BOTH["missing"][1])
    deeper = sent({**deep(32), **more})
    assert server.error(RECOMMEND, deeper, content_encoding=coding) == (400, "the request nests deeper than 32 levels")


def test_bodies_are_limited_in_size_and_time(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, tiny, "--max-body", 1, "--body-timeout", 0.5) as server:
        mega = (1 << 20) + 1
        told = "the body is larger than 1048576 bytes"
        assert server.error("/v2/models/served/infer", bytes(mega)) == (413, told)
        packed = zlib.compress(bytes(50 << 20))
        assert server.error("/v2/models/served/infer", packed, content_encoding="deflate") == (413, told)
        chunked = http.client.HTTPConnection("127.0.0.1", server.http, timeout=30)
        chunked.request("POST", "/v2/models/served/infer", iter([bytes(mega)]), encode_chunked=True)
        answer = chunked.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]) == (413, told)
        chunked.close()
        slow = raw(server, b"POST /v2/models/served/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123")
        assert slow.startswith(b"HTTP/1.1 408") and slow.endswith(b'{"error":"the body did not come within 0.5 s"}')
        body = {**GOOD, "inputs": [DENSE, IDS]}
        assert server.ask("/v2/models/served/infer", json.dumps(body).encode())[0] == 200
        with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            one = grpc.InferInput("dense", [100_000, 3], "FP32")
            one.set_data_from_numpy(np.zeros((100_000, 3), np.float32))
            with pytest.raises(grpc.InferenceServerException) as caught:
                client.infer("served", [one])
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
