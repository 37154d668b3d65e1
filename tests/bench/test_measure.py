"""A whole run on a tiny model: rows for grc and its peers, and no speed for a peer that is wrong or broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grc
from grc.bench import host, peers
from grc.bench.measure import Settings, measure
from grc.bench.requests import draws, pool
from grc.bench.rows import Row, read
from grc.bench.subject import BenchError, in_16_bits
from grc.errors import LoweringError
from grc.graph.capture import capture
from grc.graph.model_file import load_model
from grc.lowering.timing import Processors

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 120)

    def forward(self, item):
        return self.out(self.items(item))


def get_model():
    torch.manual_seed(0)
    return Tiny().eval()


def get_inputs(batch{parameters}):
    generator = torch.Generator().manual_seed({seed})
    return (torch.randint(50, (batch,), generator=generator),)
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("models") / "tiny.py"
    file.write_text(MODEL.format(parameters=', seed=0, ids="uniform"', seed="seed + (ids == 'zipf')"))
    return file


def by_engine(rows: list[Row]) -> dict[str, Row]:
    return {row["engine"]: row for row in rows}


@pytest.mark.engine
def test_a_run_has_a_row_for_every_engine_batch_and_kind_of_ids(model_file: Path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    settings = Settings(
        str(model_file), ("eager", "onnxruntime"), (4, 1), threads=1, seconds=0.01, engine="eager", command="grc bench"
    )
    rows = measure(settings)
    found = {(row["engine"], row["batch"], row["ids"]) for row in rows}
    assert found == {(e, b, i) for e in ("grc", "eager", "onnxruntime") for b in (1, 4) for i in ("uniform", "zipf")}
    for row in rows:
        assert row["refused"] is None
        assert row["min_us"] <= row["p50_us"] <= row["p99_us"]
        assert row["max_error"] < 1e-6
        assert row["overlap100"] == 1.0
        assert row["pool"] >= 16
        assert row["calls"] >= 5
        assert row["precision"] == "fp32"
    assert by_engine(rows)["grc"]["form"] == "eager"
    assert by_engine(rows)["grc"]["build_s"] > 0


def test_a_peer_that_is_wrong_or_broken_or_dies_has_no_speed(model_file: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("wrong", "broken", "late", "dies_building", "dies_answering", "dies_running")
    for name in names:
        monkeypatch.setitem(peers.PEERS, name, f"tests.bench.bad_peers:{name}")
    settings = Settings(str(model_file), names, (3,), threads=1, seconds=0.01, engine="eager", ids=("uniform",))
    rows = by_engine(measure(settings))
    assert rows["wrong"]["p50_us"] is None
    assert "error" in rows["wrong"]["refused"]
    assert rows["wrong"]["max_error"] > 0.1
    assert rows["broken"]["p50_us"] is None
    assert rows["broken"]["refused"] == "RuntimeError: no kernel for this"
    assert rows["late"]["form"] == "second"
    assert rows["late"]["p50_us"] > 0
    assert rows["dies_building"]["refused"] == "its process was killed: out of memory?"
    assert rows["dies_answering"]["refused"] == "its process died: exit code 7"
    assert rows["dies_running"]["refused"] == "its process died: SIGSEGV"
    assert rows["grc"]["p50_us"] > 0


def test_a_batch_that_the_artifact_does_not_take_is_found_before_anything_is_measured(model_file: Path, tmp_path: Path):
    path = tmp_path / "small.grc"
    grc.compile(str(model_file), None, grc.Options(output=path, engine="eager", batches=(4,), max_batch=8))
    settings = Settings(str(model_file), ("eager",), (16, 4), threads=1, seconds=0.01, artifact=path)
    told: list[str] = []
    with pytest.raises(BenchError, match=r"^small\.grc takes batches up to 8, not 16$") as error:
        measure(settings, told.append)
    assert error.value.hint == "measure smaller --batches, or compile with --max-batch 16"
    assert told == ["capture"]


def test_what_other_programs_took_of_the_host_is_told(model_file: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[float, int, int]] = []

    def crowded(before: Processors, after: Processors, threads: int, cores: int) -> str:
        seen.append((after.own - before.own, threads, cores))
        return "other programs took 1.0 of 2 cores"

    monkeypatch.setattr("grc.lowering.timing.Processors.crowded", crowded)
    told: list[str] = []
    settings = Settings(str(model_file), ("eager",), (1,), threads=1, seconds=0.5, engine="eager", ids=("uniform",))
    measure(settings, told.append)
    assert told.count("note: other programs took 1.0 of 2 cores") == 1
    assert seen[-1][0] > 0.5 and seen[-1][1:] == (1, os.cpu_count())  # half a second of each engine, in the workers


def test_a_model_that_can_not_be_compiled_is_said_as_compile_says_it(tmp_path: Path):
    file = tmp_path / "bad.py"
    file.write_text(MODEL.format(parameters="", seed="0"))
    with pytest.raises(LoweringError, match="turbo"):
        measure(Settings(str(file), ("eager",), (1,), threads=1, engine="turbo"))


def test_an_unknown_peer_is_named_with_those_there_are():
    with pytest.raises(BenchError, match="there is no peer tensorflow") as error:
        measure(Settings("no-such-file.py", ("eager", "tensorflow")))
    assert error.value.hint == "choose from eager, compile, aoti, onnxruntime"


@pytest.mark.parametrize(
    ("precision", "device", "able"),
    [
        ("fp32", "cpu", ["eager", "compile", "aoti", "onnxruntime"]),
        ("int8", "cpu", ["onnxruntime"]),
        ("fp32", "cuda", ["eager", "compile", "aoti"]),
        ("fp8", "cuda", ["eager", "compile", "aoti"]),
    ],
)
def test_peers_are_those_that_run_there_in_that_precision(precision: str, device: str, able: list[str]):
    assert peers.usual(precision, device) == able
    for name in set(peers.PEERS) - set(able):
        told = "is not measured on a GPU" if device == "cuda" else f"has no form of precision {precision}"
        with pytest.raises(BenchError, match=f"{name} {told}"):
            peers.known([name], precision, device)


@torch.no_grad()
@pytest.mark.parametrize(("precision", "dtype"), [("int8", torch.float16), ("bf16", torch.bfloat16)])
def test_peers_of_fewer_bits_on_a_gpu_are_the_model_in_16(model_file: Path, precision: str, dtype: torch.dtype):
    model = load_model(model_file)
    args, kwargs = model.inputs(3)
    whole = model.module(*args, **kwargs)
    source = capture(in_16_bits(model, precision))
    narrow = source.model.module(*args, **kwargs)
    assert {p.dtype for p in source.model.module.parameters()} == {dtype} and narrow.dtype is dtype
    torch.testing.assert_close(narrow.float(), whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("parameters", "seed"), [("", "0"), (", seed=0", "seed"), (', ids="uniform"', "0")])
def test_requests_of_a_pool_differ_whatever_get_inputs_takes(tmp_path: Path, parameters: str, seed: str):
    file = tmp_path / "other.py"
    file.write_text(MODEL.format(parameters=parameters, seed=seed))
    model = load_model(file)
    drawn = draws(model, str(file))
    assert list(drawn) == (["uniform", "zipf"] if "ids" in parameters else ["uniform"])
    requests = pool(drawn["uniform"], capture(model), 8, 1)
    assert len(requests) == 16
    assert len({tuple(request.leaves[0].tolist()) for request in requests}) == 16
    assert {tuple(request.leaves[0].shape) for request in requests} == {(8,)}


def test_a_pool_is_as_large_as_it_was_asked_to_be(model_file: Path):
    model = load_model(model_file)
    requests = pool(draws(model, str(model_file))["uniform"], capture(model), 16, 100 * 16 * 8)
    assert len(requests) == 100
    assert sum(request.bytes for request in requests) == 100 * 16 * 8


def test_an_engine_gets_threads_and_a_tuned_malloc():
    found = host.tuned_environment({"PATH": "/bin"}, 2)
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["PATH"] == "/bin"
    assert found.get("GLIBC_TUNABLES") == (host.TUNABLES if host.has_glibc() else None)


@pytest.mark.engine
def test_the_command_measures_in_a_tuned_process(model_file: Path, tmp_path: Path):
    command = [sys.executable, "-m", "grc", "bench", str(model_file), "--against", "eager", "--batches", "2"]
    command += ["--engine", "eager", "--seconds", "0.02", "--threads", "1", "--ids", "uniform"]
    command += ["--output", str(tmp_path / "rows.jsonl")]
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "grc is" in done.stdout
    rows = read(tmp_path / "rows.jsonl")
    assert {row["engine"] for row in rows} == {"grc", "eager"}
    assert {row["allocator"] for row in rows} == {host.ALLOCATOR if host.has_glibc() else host.STOCK_ALLOCATOR}
    assert {row["command"] for row in rows} == {
        "grc bench tiny.py --against eager --batches 2 --seconds 0.02 --threads 1 --engine eager"
    }
