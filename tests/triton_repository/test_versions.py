"""A new version of a repository: no request is lost or answered by stages of two versions while it is moved in."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grc.errors import ArtifactError
from grc.runtime.artifact import read_manifest
from grc.runtime.triton_repository import Repository, add_version, export
from grc.runtime.triton_repository.client import Client
from grc.runtime.triton_repository.config import read
from grc.runtime.triton_repository.launcher import serving
from grc.runtime.triton_repository.replay import Replayed, call, verify
from grc.runtime.triton_repository.tensors import interface
from tests.triton_repository.conftest import compiled

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'grc-compiler[triton]'")


class Ranker(nn.Module):
    """Its answers tell its version, and whether the table and the top are of one version."""

    def __init__(self, version: float, width: int) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(20, 8), nn.Linear(8 + width, 1)
        with torch.no_grad():
            self.table.weight.fill_(version)
            self.top.weight.fill_(version)
            self.top.bias.zero_()

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        return self.top(torch.cat([self.table(ids), dense], 1)).squeeze(1)


def artifact(folder: Path, version: float, width: int = 2) -> Path:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.arange(batch) % 20, torch.zeros(batch, width)

    return compiled(Ranker(version, width).eval(), folder / f"v{version:g}-{width}" / "ranker.grc", inputs)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("old"), 1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("new"), 3)


def versions(repository: Repository) -> dict[str, list[str]]:
    return {m: sorted(e.name for e in (repository.path / m).iterdir() if e.name.isdigit()) for m in repository.models}


def test_a_version_is_added_with_the_repositorys_settings(old: Path, new: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo", prefix="a_", max_batch=8)
    added = add_version(new, made.path)
    assert (added.models, added.record["version"]) == (["a_ranker"], 2)
    assert versions(added) == {"a_ranker": ["1", "2"]}
    assert versions(add_version(old, made.path, 7)) == {
        "a_ranker": ["2", "7"]
    }  # the one before may still have requests
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["repo"]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("specific.versions=[1,4]", ["1", "3", "4"]),
        ("latest.num_versions=3", ["2", "3", "4"]),
        ("all={}", ["1", "2", "3", "4"]),
    ],
)
def test_a_version_that_a_policy_keeps_is_not_deleted(
    old: Path, new: Path, tmp_path: Path, policy: str, kept: list[str]
) -> None:
    made = export(old, tmp_path / "repo", overrides=[f"*.version_policy.{policy}"])
    for _ in range(3):
        made = add_version(new, made.path)
    assert versions(made) == {"ranker": kept}


def test_a_version_is_proven_with_the_configuration_that_will_serve_it(old: Path, new: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo")
    (made.path / "ranker/warmup/input_1").write_bytes(b"\1" * 8)
    file = made.path / "ranker/config.pbtxt"
    file.write_text(file.read_text() + "# edited\n")
    seen: list[bytes] = []

    def look(version: Repository) -> None:
        seen.extend((version.path / "ranker" / name).read_bytes() for name in ("config.pbtxt", "warmup/input_1"))

    add_version(new, made.path, before_done=look)
    assert seen == [file.read_bytes(), b"\1" * 8]


def test_an_ensemble_names_the_versions_of_its_steps(old: Path, new: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo", layout="stages")
    config = made.path / "ensemble_model/config.pbtxt"
    assert {step.model_version for step in read(config).ensemble_scheduling.step} == {1}
    assert read(made.path / "gr_trt/config.pbtxt").version_policy.latest.num_versions == 2
    add_version(new, made.path)
    assert {step.model_version for step in read(config).ensemble_scheduling.step} == {2}


def test_a_version_of_other_tensors_is_refused(old: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo")
    wider = artifact(tmp_path, 1, width=5)
    with pytest.raises(ArtifactError) as caught:
        add_version(wider, made.path)
    assert caught.value.message == f"the new version of ranker differs from the one in {made.path} in input"
    assert caught.value.hint == "export it to a repository of its own"
    assert versions(made) == {"ranker": ["1"]}


def test_a_version_that_is_there_is_kept(old: Path, new: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo")
    with pytest.raises(ArtifactError) as caught:
        add_version(new, made.path, 1)
    assert caught.value.message == f"{made.path} has version 1"
    with pytest.raises(ArtifactError) as caught:
        add_version(new, tmp_path / "nothing")
    assert caught.value.message == f"{tmp_path / 'nothing'} is no Triton repository of grc: it has no repository.json"


@pytest.mark.triton
@pytest.mark.parametrize("layout", [pytest.param("fused", marks=pytest.mark.slow), "stages"])
def test_no_request_is_lost_while_a_version_is_added(old: Path, new: Path, tmp_path: Path, layout: str) -> None:
    made = export(old, tmp_path / "repo", layout=layout)
    shapes = interface(read_manifest(old))
    request = [torch.tensor([3, 4]), torch.zeros(2, 2)]
    answers: list[float] = []
    done = threading.Event()

    def ask(client: Client) -> None:
        while not done.is_set():
            (scores,) = call(client, made.entry, shapes, request)
            answers.extend(scores.tolist())

    with serving(made.path, "--model-control-mode=poll", "--repository-poll-secs=1") as server:
        client = Client("grpc", server.at("grpc"))
        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask, client) for _ in range(2)]
            try:
                time.sleep(0.5)
                add_version(new, made.path)
                deadline = time.monotonic() + 60
                while answers[-1] != 72 and time.monotonic() < deadline:
                    time.sleep(0.1)
            finally:
                done.set()
        for each in asking:
            each.result()  # raises what any request was answered with but scores
        last = call(client, made.entry, shapes, request)[0].tolist()
        client.close()
    assert set(answers) == {8.0, 72.0}  # a table of one version and a top of another would give 24
    assert last == [72.0, 72.0]


@pytest.mark.triton
def test_a_version_is_verified_on_a_server_of_its_own(old: Path, new: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo")
    told: list[Replayed] = []
    add_version(new, made.path, before_done=lambda repository: told.append(verify(repository, new)))
    assert told[0].error < 1e-6 and versions(made) == {"ranker": ["1", "2"]}


@pytest.mark.triton
def test_a_version_that_answers_wrongly_leaves_the_old_one(old: Path, new: Path, tmp_path: Path) -> None:
    made = export(old, tmp_path / "repo")
    before = versions(made)
    spoiled = Path(shutil.copytree(new, tmp_path / "ranker.grc"))
    with pytest.raises(ArtifactError, match="answers golden request 0 over http"):
        add_version(spoiled, made.path, before_done=lambda repository: verify(repository, old))
    assert versions(Repository.open(made.path)) == before
