"""Artifacts on a GPU: answers from host and device, every size, every bit of a replay, bad ids, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grc
from benchmarks.gpu_stress import sound, stress
from grc.errors import ArtifactError, InputError
from grc.graph.model_file import from_module
from grc.runtime import bucket
from grc.runtime import device as device_memory
from grc.runtime.artifact import write_manifest
from grc.runtime.buckets import Buckets
from grc.runtime.engines import part_loader
from grc.runtime.program import bound

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
BUCKETS = (1, 4, 16)


class Click(nn.Module):
    """Two tables, dot products, a linear layer; the index is made on the CPU in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 16) for n in (20, 30, 40))
        self.top = nn.Linear(16 + 6, 3)

    def forward(self, dense: Tensor, ids: Tensor) -> dict[str, Tensor]:
        rows = torch.stack([dense, *[table(ids[:, i]) for i, table in enumerate(self.tables)]], 1)
        pairs = torch.bmm(rows, rows.transpose(1, 2))
        i, j = torch.tensor([1, 2, 2, 3, 3, 3]), torch.tensor([0, 0, 1, 0, 1, 2])
        scores = self.top(torch.cat([dense, pairs[:, i, j]], 1))
        return {"scores": scores, "best": scores.argmax(1)}


class Bagged(nn.Module):
    """Jagged bags: a request has as many ids as it has."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 8, mode="sum")

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        return self.bag(values, offsets)


class Centred(nn.Module):
    """Its rows read each other, so that padding would change them."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(x - x.mean(0))


def click_inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    ids = torch.stack([torch.randint(n, (batch,), generator=make) for n in (20, 30, 40)], 1)
    return torch.randn(batch, 16, generator=make), ids


def bagged_inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    counts = torch.randint(0, 4, (batch,), generator=make)
    ids = torch.randint(0, 50, (int(counts.sum()) + 1,), generator=make)
    return ids, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])


def options(path: Path, **more: object) -> grc.Options:
    chosen = {"buckets": BUCKETS, "max_batch": 64, "engine": "inductor", **more}
    return grc.Options(output=path, device="cuda", **chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Click().eval()


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "click.grc"
    grc.compile(model, click_inputs, options(path, streams=2, buckets=(1, 4, 16, 32), max_batch=100))
    return path


@pytest.fixture(scope="module")
def program(path: Path) -> grc.Program:
    return grc.load(path)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 16, 32, 33, 100])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_answers_on_the_device_that_asks(program: grc.Program, model: nn.Module, batch: int, device: str) -> None:
    inputs = click_inputs(batch)
    found = program(*(t.to(device) for t in inputs))
    expected = model(*inputs)
    assert found["scores"].device.type == device
    torch.testing.assert_close(found["scores"].cpu(), expected["scores"], rtol=1e-4, atol=1e-4)
    assert found["best"].dtype is torch.int64


@pytest.mark.parametrize("large", ["LARGE", "APART", "both"])
def test_large_requests_and_answers_go_where_they_are_wanted(
    program: grc.Program, path: Path, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    for name in ("LARGE", "APART") if large == "both" else (large,):
        monkeypatch.setattr(bucket, name, 1)
    monkeypatch.setattr(bucket, "ON_HOST", 0)
    direct = grc.load(path)
    for batch in (1, 3, 16, 100, 2):
        inputs = click_inputs(batch)
        found, wanted = direct(*(t.pin_memory() for t in inputs)), program(*inputs)
        assert torch.equal(found["scores"], wanted["scores"]) and torch.equal(found["best"], wanted["best"])
    bad = inputs[1].clone()
    bad[1, 2] = 40
    with pytest.raises(InputError, match="has id 40"):
        direct(inputs[0].pin_memory(), bad.pin_memory())


def test_the_part_has_graphs_and_counts_bad_ids(program: grc.Program) -> None:
    part = program.artifact.manifest["parts"][0]
    assert part["engine"] == "inductor" and part["graphs"] and part["checks_ids"] and part["notes"] == []


def test_neither_triton_nor_a_compiler_nor_the_model_is_needed_to_load(
    program: grc.Program, path: Path, tmp_path: Path
) -> None:
    inputs = click_inputs(5)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys
sys.modules["triton"] = None
import torch, grc
torch.save(grc.load(sys.argv[1])(*torch.load(sys.argv[2])), sys.argv[3])
"""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "/nowhere/g++", "CC": "/nowhere/gcc"}
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "inputs.pt"), str(tmp_path / "answers.pt")]
    subprocess.run(command, check=True, env=environment, timeout=300)
    answers, wanted = torch.load(tmp_path / "answers.pt"), program(*inputs)
    assert torch.equal(answers["scores"], wanted["scores"]) and torch.equal(answers["best"], wanted["best"])


def test_look_ups_are_timed_and_take_the_tile_that_won(program: grc.Program) -> None:
    kernels = program.artifact.manifest["kernels"]
    rows = [row for row in kernels["fused"] if row["op"] == "bag_dot"]
    assert [row["batch"] for row in rows] == program.artifact.manifest["gpu"]["buckets"]
    assert all(row["us"] > 0 and 0 <= row["of_copy"] < 1.2 and len(row["tile"]) == 4 for row in rows)
    assert kernels["copy_gbps"] > 100


def test_tables_go_to_the_device_in_chunks(program: grc.Program, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "CHUNK", 256)
    inputs = click_inputs(9)
    assert torch.equal(grc.load(path)(*inputs)["scores"], program(*inputs)["scores"])


def test_every_bit_of_a_replay_is_that_of_a_run(program: grc.Program, path: Path) -> None:
    manifest = program.artifact.manifest
    part = manifest["parts"][0]
    constants = bound(part["weights"], program.artifact.weights)
    direct = part_loader(manifest)({**part, "graphs": False}, path / "parts", constants)
    graphs = program.runs[0]
    assert isinstance(graphs, Buckets)
    for turn in range(300):
        size = graphs.plan.buckets[turn % 4]
        inputs = [t[torch.randperm(size)].contiguous() for t in click_inputs(size)]
        assert all(map(torch.equal, graphs(list(inputs)), direct(list(inputs))))


def test_threads_get_their_own_answers(program: grc.Program) -> None:
    requests = [click_inputs(batch) for batch in (1, 3, 16, 50)]
    expected = [program(*inputs)["scores"] for inputs in requests]

    def ask(turn: int) -> bool:
        return torch.equal(program(*requests[turn % 4])["scores"], expected[turn % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bad_id_is_named_and_the_next_request_is_answered(program: grc.Program, device: str) -> None:
    dense, ids = (t.to(device) for t in click_inputs(3))
    bad = ids.clone()
    bad[1, 2] = 40
    with pytest.raises(InputError, match=r'input "ids" has id 40 at row 1, column 2; .* has 40 rows'):
        program(dense, bad)
    assert torch.equal(program(dense, ids)["scores"], program(dense, ids)["scores"])


def test_jagged_requests_run_without_graphs_and_say_so(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Bagged().eval()
    grc.compile(model, bagged_inputs, options(tmp_path / "b.grc", engine="auto"))
    program = grc.load(tmp_path / "b.grc")
    assert all("runs without CUDA graphs" in part["notes"][0] for part in program.artifact.manifest["parts"])
    for batch in (1, 2, 9):
        inputs = bagged_inputs(batch)
        torch.testing.assert_close(program(*inputs), model(*inputs).detach(), rtol=1e-4, atol=1e-5)


def test_rows_that_read_each_other_are_never_padded(tmp_path: Path) -> None:
    model = Centred().eval()
    grc.compile(model, lambda batch: (torch.arange(4.0 * batch).view(batch, 4),), options(tmp_path / "c.grc"))
    program = grc.load(tmp_path / "c.grc")
    assert "depends on the other rows" in program.artifact.manifest["gpu"]["reason"]
    x = torch.rand(7, 4)
    torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_fastest_of_all_engines_is_kept(model: nn.Module, tmp_path: Path) -> None:
    found = options(tmp_path / "all.grc", engine="auto", static_buckets=True, batches=(4,), buckets=(1, 4), max_batch=4)
    artifact = grc.compile(model, click_inputs, found)
    measured = {(row["engine"], row["batch"]) for row in artifact.manifest["measured"]}
    assert {("inductor", 1), ("inductor", 4), ("aoti", 4), ("eager", 4), ("inductor@4", 4)} <= measured
    assert ("inductor@4", 1) not in measured
    assert artifact.manifest["rejected"] == {}
    inputs = click_inputs(3)
    captured = [run.plan.buckets for run in grc.load(artifact.path).runs.values() if isinstance(run, Buckets)]
    assert sorted(size for sizes in captured for size in sizes) == [1, 4], "a part has the buckets that it answers"
    for engine in [None, *(part["engine"] for part in artifact.manifest["parts"])]:
        scores = grc.load(artifact.path, engine=engine)(*inputs)["scores"]
        torch.testing.assert_close(scores, model(*inputs)["scores"].detach(), rtol=1e-4, atol=1e-4)


def test_another_gpu_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.grc"
    shutil.copytree(path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest.pop("checksum")
    manifest["target"]["sm"] = "sm_52"
    write_manifest(copy, manifest)
    with pytest.raises(ArtifactError, match="was built for sm_52; this GPU is sm_"):
        grc.load(copy)


def test_weights_lie_on_the_device_once(path: Path) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    first = grc.load(path)
    held = torch.cuda.memory_allocated() - before
    stored = (path / "weights.safetensors").stat().st_size
    del first
    assert held < stored + (72 << 20), "more than the weights and the workspace of cuBLAS lies on the device"


def test_buckets_are_learnt_from_traffic(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "sizes.txt").write_text("1 50\n5 30\n11 20\n")
    found = options(tmp_path / "t.grc", traffic=tmp_path / "sizes.txt", buckets=(), max_batch=16)
    manifest = grc.compile(model, click_inputs, found).manifest
    learnt = manifest["gpu"]["buckets"]
    assert set(learnt) <= {1, 5, 11, 16} and learnt[-1] == 16, (
        "of a model this small all buckets may take the same time"
    )
    assert any("learnt from 100 requests" in stage["summary"] for stage in manifest["stages"])
    program = grc.load(tmp_path / "t.grc")
    for batch in (1, 3, 5, 11, 16):
        inputs = click_inputs(batch)
        torch.testing.assert_close(program(*inputs)["scores"], model(*inputs)["scores"].detach(), rtol=1e-4, atol=1e-4)


def test_tables_that_do_not_fit_are_read_from_the_host(
    path: Path, program: grc.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "SMALL", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    before = torch.cuda.memory_allocated()
    spilled = grc.load(path)
    held = torch.cuda.memory_allocated() - before
    for batch in (1, 5, 33):
        inputs = click_inputs(batch)
        assert torch.equal(spilled(*inputs)["scores"], program(*inputs)["scores"])
    dense, ids = click_inputs(3)
    ids[2, 1] = -1
    with pytest.raises(InputError, match="has id -1 at row 2, column 1"):
        spilled(dense, ids)
    assert held < 72 << 20, "only graphs and workspaces lie on the device"


@pytest.mark.parametrize("replays", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_bit_differs_and_no_memory_stays_behind(model: nn.Module, path: Path, replays: int) -> None:
    found = stress(path, from_module(model, click_inputs), replays, threads=4, loads=60)
    assert found["replays"] >= replays and sound(found), found
