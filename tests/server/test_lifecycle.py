"""From start to stop: ports, readiness, new versions under load, draining, logs and metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import grc
from grc.runtime.weights import read_weights, write_weights
from tests.cli.session import edit_manifest
from tests.server.running import Running, command, needs_extra, running, until
from tests.server.test_connection import peer, post
from tests.server.test_scheduler import slow

needs_extra()

DENSE = {"name": "dense", "datatype": "FP32", "shape": [1, 3], "data": [0.5, -1.0, 2.0]}
IDS = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [3, 7]}
BODY = json.dumps({"inputs": [DENSE, IDS]}).encode()
OTHER: Callable[[str], str] = lambda text: text.replace("manual_seed(0)", "manual_seed(1)")  # noqa: E731


def answer(server: Running, name: str = "served") -> tuple[str, float]:
    """Which version answered, and what."""
    status, text, _ = server.ask(f"/v2/models/{name}/infer", BODY)
    assert status == 200, text
    found = json.loads(text)
    return found["model_version"], found["outputs"][0]["data"][0]


def failing(*words: object) -> tuple[int, list[str]]:
    """A server that can't start: its exit code and its last words."""
    ran = subprocess.run(command(*words), capture_output=True, text=True, timeout=120)
    assert ran.stdout == ""
    return ran.returncode, [line for line in ran.stderr.splitlines() if not line.startswith(("server: ", "  "))]


def test_a_port_in_use_is_told_before_anything_is_loaded(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag, words in (("--port", ("--port", port)), ("--grpc-port", ("--port", 0, "--grpc-port", port))):
            assert failing(tiny, *words) == (
                1,
                [f"error: port {port} of 127.0.0.1 is in use", f"hint: choose another {flag}, or 0 for any"],
            )


def test_an_address_that_is_not_of_this_host(tiny: Path) -> None:
    code, said = failing(tiny, "--host", "192.0.2.1", "--port", 0)
    assert (code, said[1]) == (1, "hint: choose another --host")
    assert said[0].startswith("error: 192.0.2.1 is no address of this host")


def test_an_engine_that_the_artifact_has_no_part_for(tiny: Path) -> None:
    assert failing(tiny, "--engine", "inductor", "--port", 0, "--grpc-port", 0) == (
        1,
        ["error: tiny.grc holds no part for engine inductor", "hint: it holds eager"],
    )


def wrong_answers(artifact: Path) -> None:
    """Whole files, wrong numbers."""
    weights = {name: tensor.clone() for name, tensor in read_weights(artifact / "weights.safetensors").items()}
    weights["top.bias"] += 1
    write_weights(artifact / "weights.safetensors", weights)
    edit_manifest(artifact, lambda manifest: None)


def test_an_artifact_that_answers_wrongly_is_not_served(tmp_path: Path, tiny: Path) -> None:
    spoilt = Path(shutil.copytree(tiny, tmp_path / "spoilt.grc"))
    wrong_answers(spoilt)
    code, said = failing(spoilt, "--port", 0, "--grpc-port", 0)
    assert code == 1
    assert said[0].startswith("error: spoilt.grc answers a golden request ") and said[0].endswith(
        " away from the model"
    )
    assert said[1].startswith("hint: rebuild it here: grc compile ")


def test_says_what_is_served_and_how(server: Running) -> None:
    said = server.said()
    assert said.startswith("server: own, as asked\n")
    assert "  tiny         version 1, eager; requests merge by rows up to batch 64; proven in " in said
    assert f"  http         http://127.0.0.1:{server.http}/v2, docs at /docs, metrics at /metrics\n" in said


@contextmanager
def load(server: Running, clients: int = 4) -> Iterator[list[tuple[float, str, float]]]:
    """Requests without a pause, each of which must be answered: when, by which version, and what."""
    found: list[tuple[float, str, float]] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            found.append((time.monotonic(), *answer(server)))

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(ask) for _ in range(clients)]
        try:
            yield found
        finally:
            ended.set()
        for future in futures:
            future.result()


@pytest.mark.parametrize("cache", [0, 1])
def test_an_artifact_that_is_replaced_is_served_with_no_request_lost(
    tmp_path: Path, compiled: Callable[..., Path], cache: int
) -> None:
    """Nor is an answer of the old version given again by the new one."""
    path = compiled(tmp_path / "model.grc")
    with running(tmp_path, path, "--watch", 0.1, "--answer-cache", cache) as server, load(server) as found:
        _, old = answer(server)
        compiled(path, edit=OTHER)
        event = server.wait_for("version")
        for _ in until("answers of the new version"):
            if found[-1][1] == "2":
                break
        new = found[-1][2]
    assert (event["model"], event["version"], event["before"]) == ("served", "2", "1")
    assert new != old and len(found) > 50
    own = {"1": old, "2": new}
    assert {version for _, version, _ in found} == {"1", "2"}
    assert all(value == pytest.approx(own[version], rel=1e-5) for _, version, value in found)
    import torch

    written = grc.load(path)(torch.tensor([DENSE["data"]]), torch.tensor([IDS["data"]]))
    assert new == pytest.approx(float(written[0]), rel=1e-5)


def test_processing_keeps_its_files_after_the_artifact_was_replaced(
    tmp_path: Path, compiled: Callable[..., Path]
) -> None:
    """The old version's recommendations in flight still read its files, from a copy of its own."""
    path = compiled(tmp_path / "model.grc")
    row = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7, "sleep": 1.0}
    with running(tmp_path, path, "--watch", 0.1) as server, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.ask, "/v2/models/served/recommend", json.dumps(row).encode())
        time.sleep(0.2)
        shutil.rmtree(path)
        assert pending.result()[0] == 200
        assert answer(server)[0] == "1", "an artifact that is gone is served on"


def test_a_folder_of_versions_serves_the_newest_that_is_proven(tmp_path: Path, compiled: Callable[..., Path]) -> None:
    folder = tmp_path / "ranker"
    folder.mkdir()
    compiled(folder / "1")
    with running(tmp_path, folder, "--watch", 0.1) as server:
        assert answer(server, "ranker")[0] == "1"
        spoilt = compiled(tmp_path / "spoilt", edit=OTHER)
        wrong_answers(spoilt)
        spoilt.rename(folder / "2")
        refused = server.wait_for("version refused")
        assert (refused["version"], refused["serving"]) == ("2", "1")
        assert refused["message"].startswith("2 answers a golden request ")
        assert answer(server, "ranker")[0] == "1"
        assert server.metric('grc_version_loads_total{model="ranker",result="refused"}') >= 1
        damaged = compiled(tmp_path / "damaged", edit=OTHER)
        data = bytearray((damaged / "parts" / "eager.json").read_bytes())
        data[-1] ^= 1
        (damaged / "parts" / "eager.json").write_bytes(data)
        damaged.rename(folder / "3")
        for _ in until("the refusal of version 3"):
            if any(e["event"] == "version refused" and e["version"] == "3" for e in server.events()):
                break
        (last,) = [e for e in server.events() if e["event"] == "version refused" and e["version"] == "3"][:1]
        assert last["message"].startswith("3/parts/eager.json is damaged: its sha256 is not ")
        compiled(tmp_path / "good", edit=OTHER).rename(folder / "10")
        assert server.wait_for("version")["version"] == "10"
        assert answer(server, "ranker")[0] == "10"
        assert server.error("/v2/models/ranker/versions/1/infer", BODY) == (
            404,
            "model ranker does not serve version 1, though it is there; it serves 10",
        )
        assert server.error("/v2/models/ranker/versions/4") == (404, "model ranker has no version 4; it serves 10")
        assert server.ask("/v2/models/ranker/versions/10/infer", BODY)[0] == 200


def test_requests_in_flight_are_answered_after_sigterm(tmp_path: Path, tiny: Path) -> None:
    row = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7, "sleep": 1.0}
    import tritonclient.http as http

    with running(tmp_path, tiny) as server, ThreadPoolExecutor(4) as pool:
        idle = http.InferenceServerClient(f"127.0.0.1:{server.http}")
        assert idle.is_server_ready()  # its connection stays open, and must not hold the server
        pending = [pool.submit(server.ask, "/v2/models/served/recommend", json.dumps(row).encode()) for _ in range(2)]
        time.sleep(0.4)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10
        assert [p.result()[0] for p in pending] == [200, 200]
        assert [e["event"] for e in server.events()] == ["draining", "stopped"]
        idle.close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.http))


def test_draining_waits_for_bodies_and_no_longer_than_it_was_told(tmp_path: Path, tiny: Path) -> None:
    row = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7, "sleep": 20.0}
    infer = post("/v2/models/served/infer", json.loads(BODY))
    with (
        running(tmp_path, tiny, "--drain", 1) as server,
        peer(server) as whole,
        peer(server) as half,
        peer(server) as slow,
    ):
        slow.send(post("/v2/models/served/recommend", row))
        for client in (whole, half):
            client.send(infer[:-10])
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        server.wait_for("draining")
        whole.send(infer[-10:])
        status, headers, _ = whole.answer()
        assert (status, headers["connection"], whole.closed()) == (200, "close", True)
        for client, before in ((half, "the request was whole"), (slow, "the answer")):
            status, headers, text = client.answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(text) == {"error": f"the server ended before {before}"}
        assert server.process.wait(60) == 0
        assert time.monotonic() - began < 10
        assert sorted(server.wait_for_end()) == ["draining", "refused", "refused", "stopped"]
        assert {event.get("reason") for event in server.events()} == {None, "ended"}


def test_calls_over_grpc_that_a_drain_cuts_off_are_refused_and_logged(
    tmp_path: Path, compiled: Callable[..., Path]
) -> None:
    """More than a second's work waits when the server is told to end, the last of it in a stream."""
    grpc = pytest.importorskip("tritonclient.grpc")
    from tests.server.test_protocol import inputs, request

    series, cut_off = (
        'nv_inference_pending_request_count{model="served",version="1"}',
        "the server ended before the answer",
    )
    calls: list[str | None] = []
    stream: list[str | None] = []

    def keep(found: list[str | None], result: object, error: Any) -> None:
        found.append(None if error is None else error.message())

    artifact, given = compiled(tmp_path / "slow.grc", edit=slow), inputs(grpc, request(1))
    with running(tmp_path, artifact, "--drain", 1, "--max-rows", 1, "--timeout", 300) as server:
        client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        client.start_stream(partial(keep, stream))
        for _ in range(400):
            client.async_infer("served", given, partial(keep, calls))
        for _ in until("all calls"):
            if len(calls) + server.metric(series) >= 398:  # and one or two are being computed
                break
        client.async_stream_infer("served", given)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        for _ in until("every answer"):
            if len(calls) == 400 and stream:
                break
        client.stop_stream(cancel_requests=True)
        client.close()
    assert set(calls) == {None, cut_off} and stream[0] == cut_off
    refused = [event for event in server.events() if event["event"] == "refused"]
    assert {(event["reason"], event["status"], event["message"]) for event in refused} == {("ended", 503, cut_off)}
    assert len(refused) == calls.count(cut_off) + 1 and server.events()[-1]["event"] == "stopped"


def test_an_interrupt_ends_it_as_well(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, tiny) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert server.wait_for_end() == ["draining", "stopped"]


def test_a_model_that_answers_wrongly_is_not_ready(tmp_path: Path, tiny: Path) -> None:
    """Weights that change under the server: the canary finds it, and traffic goes elsewhere until it is mended."""
    path = Path(shutil.copytree(tiny, tmp_path / "model.grc"))
    with running(tmp_path, path, "--canary", 0.1) as server:
        assert server.ask("/v2/health/ready")[0] == 200
        with open(path / "weights.safetensors", "r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size - start
            file.seek(start)
            before = file.read(size)
            file.seek(start)
            file.write(bytes(size))
            file.flush()
            event = server.wait_for("canary failed")
            assert (event["model"], event["message"]) == ("served", "it answers wrongly")
            assert server.ask("/v2/health/ready")[0] == 503
            assert server.ask("/v2/models/served/ready")[0] == 503
            assert server.ask("/v2/health/live")[0] == 200
            assert server.metric('grc_canary_ok{model="served"}') == 0
            file.seek(start)
            file.write(before)
        server.wait_for("canary answered")
        assert server.ask("/v2/health/ready")[0] == 200


def test_a_deadline_that_can_not_be_met_is_refused_with_a_time_to_come_back(
    tmp_path: Path, compiled: Callable[..., Path]
) -> None:
    path = compiled(tmp_path / "slow.grc", edit=slow)
    body = {"inputs": [DENSE, IDS], "parameters": {"timeout": 1000}}
    with running(tmp_path, path) as server:
        status, text, headers = server.ask("/v2/models/served/infer", json.dumps(body).encode())
        assert (status, headers["retry-after"]) == (503, "1")
        # What is left of it, after the request was read.
        told = (
            r"model served (can't answer within [01] ms: it would take about \d+ ms"
            r"|was too busy: the request's time ran out)"
        )
        assert re.fullmatch(told, json.loads(text)["error"])
        row = json.dumps({"dense": DENSE["data"], "user": 3, "item": 7}).encode()
        assert server.ask("/v2/models/served/recommend", row, x_timeout_ms="1")[0] == 503
        assert server.metric('grc_refusals_total{model="served",reason="deadline"}') == 2
        grpc = pytest.importorskip("tritonclient.grpc")
        with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            with pytest.raises(grpc.InferenceServerException) as caught:
                from tests.server.test_protocol import inputs, request

                client.infer("served", inputs(grpc, request(1)), timeout=1000)
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
        assert answer(server)[0] == "1"


def test_a_full_queue_is_refused_and_the_rest_are_answered(tmp_path: Path, compiled: Callable[..., Path]) -> None:
    path = compiled(tmp_path / "slow.grc", edit=slow)
    with running(tmp_path, path, "--max-queue", 4, "--max-rows", 1) as server, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: server.ask("/v2/models/served/infer", BODY), range(16)))
        refused = [(text, headers) for status, text, headers in found if status == 503]
        assert [status for status, _, _ in found if status not in (200, 503)] == []
        assert refused and len(refused) < 16
        for text, headers in refused:
            assert json.loads(text) == {"error": "model served is busy: 4 requests wait"}
            assert int(headers["retry-after"]) >= 1
        assert server.metric('grc_refusals_total{model="served",reason="queue_full"}') == len(refused)


def test_metrics_tell_each_stage(tmp_path: Path, tiny: Path) -> None:
    row = json.dumps({"dense": DENSE["data"], "user": 3, "item": 7, "sleep": 0.3}).encode()
    with running(tmp_path, tiny) as server:
        assert server.ask("/v2/models/served/recommend", row)[0] == 200
        for n in range(5):
            assert answer(server)[0] == "1", n
        server.error("/v2/models/none/infer", BODY)
        stage = 'grc_stage_duration_seconds_sum{{model="served",stage="{}"}}'
        assert 0.3 <= server.metric(stage.format("preprocess")) < 1.0
        for name in ("queue", "compute", "postprocess"):
            assert 0 < server.metric(stage.format(name)) < 0.3, name
        assert server.metric('grc_request_duration_seconds_count{model="served"}') == 6
        assert server.metric('grc_requests_total{code="200",model="served",protocol="http"}') == 6
        assert server.metric('grc_requests_total{code="404",model="",protocol="http"}') == 1
        assert server.metric('grc_refusals_total{model="",reason="unknown_model"}') == 1
        assert server.metric('nv_inference_request_success_total{model="served",version="1"}') == 6
        assert server.metric('grc_batch_rows_count{model="served"}') >= 6
        assert server.metric('grc_canary_ok{model="served"}') == 1


def test_logs_are_json_with_the_ids_of_requests(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, tiny, "--access-log") as server:
        headers = server.ask("/v2/models/served/infer", BODY, x_request_id="abc")[2]
        assert headers["x-request-id"] == "abc"
        named = json.dumps({"inputs": [DENSE, IDS], "id": "of-the-protocol"}).encode()
        assert server.ask("/v2/models/served/infer", named)[2]["x-request-id"] == "of-the-protocol"
        status, _, headers = server.ask("/v2/models/served/infer", b"{")
        assert len(headers["x-request-id"]) == 16
        lines = {e["id"]: e for e in server.events()}
    good, bad = lines["abc"], lines[headers["x-request-id"]]
    assert (good["event"], good["model"], good["status"], good["level"]) == ("request", "served", 200, "info")
    assert 0 < good["ms"] < 10_000 and "of-the-protocol" in lines
    assert (bad["event"], bad["status"], bad["reason"], bad["level"]) == ("refused", status, "json", "warning")
    assert bad["message"] == "the request is no JSON: unexpected end of data: line 1 column 2 (char 1)"


def test_two_models_are_served_by_one_server(server: Running) -> None:
    stats: Any = json.loads(server.ask("/v2/models/stats")[1])
    assert [m["name"] for m in stats["model_stats"]] == ["tiny", "bags"]
