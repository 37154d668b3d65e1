"""Repositories on the real tritonserver: both layouts answer as the model, and a bad request fails alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.errors import ArtifactError, GrcError, InputError
from grc.runtime.artifact import Artifact, read_manifest, write_manifest
from grc.runtime.golden import read_golden
from grc.runtime.triton_repository import launcher
from grc.runtime.triton_repository.client import PROTOCOLS, Client, Unavailable
from grc.runtime.triton_repository.export import export
from grc.runtime.triton_repository.launcher import Server, serving
from grc.runtime.triton_repository.replay import ANSWER, LOADABLE, REQUEST, Replay, Replayed, call, examples, verify
from grc.runtime.triton_repository.repository import Repository
from grc.runtime.triton_repository.requests import tensor_of
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.tensors import Interface, interface
from grc.runtime.weights import read_weights, write_weights
from tests.cli.session import WORDS
from tests.triton_repository.conftest import EXAMPLE

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'grc-compiler[triton]'")
pytestmark = [pytest.mark.triton, pytest.mark.engine]
DELAY = 100_000  # microseconds: long enough for requests that are sent together to be merged on a busy machine


def shapes(artifact: Path) -> Interface:
    return interface(read_manifest(artifact))


def golden(artifact: Path, index: int) -> tuple[list[Tensor], list[Tensor]]:
    found = read_golden(Artifact.open(artifact))[index]
    return found.inputs, found.outputs


@pytest.mark.parametrize("layout", ["fused", "stages"])
def test_movielens_recommends_the_artifacts_films(
    films: Path, requests: list[dict], tmp_path: Path, layout: Any
) -> None:
    told: list[Replayed] = []
    export(
        films,
        tmp_path / "repo",
        Settings(layout=layout),
        before_done=lambda made: told.append(verify(made, films, requests)),
    )
    assert told[0].requests == 2 * (len(requests) + len(examples(grc.load(films)))) and told[0].error < 1e-5


def test_the_request_among_the_assets_is_sent_through_the_ensemble(spoken: Path, tmp_path: Path) -> None:
    def spoil(made: Repository) -> None:
        model = made.path / "postprocess_py/1/model.py"
        model.write_text(model.read_text().replace("[tensor(entry.name) for", "[-tensor(entry.name) for"))
        verify(made, spoken)

    with pytest.raises(ArtifactError) as caught:
        export(spoken, tmp_path / "repo", before_done=spoil, warmup=False)
    assert caught.value.message == "ensemble_model answers a request over http otherwise than the artifact does"


def test_where_the_example_is_none_that_preprocess_takes_nothing_is_started(spoken: Path, tmp_path: Path) -> None:
    for name in ("tiny.py", "words.py", "served.py"):
        shutil.copyfile(spoken.parent / name, tmp_path / name)
    (tmp_path / "request.json").write_text('{"dense": [0.5, -1.0, 2.0], "user": 3, "item": 99}')
    path = tmp_path / "tiny.grc"
    grc.compile(str(tmp_path / "served.py"), None, grc.Options(output=path, engine="eager", batches=(4,), max_batch=8))
    with pytest.raises(InputError) as caught:
        export(path, tmp_path / "repo", before_done=lambda made: verify(made, path))
    assert caught.value.message.startswith('request.json among the assets was refused: input "ids" has id 99 at row 0')
    assert not (tmp_path / "repo").exists()


def test_preprocess_is_warm_and_its_queue_is_bounded(spoken: Path, tmp_path: Path) -> None:
    for name in ("tiny.py", "served.py", "request.json"):
        shutil.copyfile(spoken.parent / name, tmp_path / name)
    slow = "import time\n" + WORDS.replace("    return torch", "    time.sleep(0.3)\n    return torch")
    (tmp_path / "words.py").write_text(slow)
    path = tmp_path / "tiny.grc"
    grc.compile(str(tmp_path / "served.py"), None, grc.Options(output=path, engine="eager", batches=(4,), max_batch=8))
    made = export(path, tmp_path / "repo", max_queue=2)
    with serving(made.path) as server:
        client = Client("http", server.at("http"))
        warmed = [client.statistics(f"{name}process_py") for name in ("pre", "post")]

        def ask(number: int) -> str:
            try:
                return str(client.infer(made.entry, [(REQUEST, tensor_of(EXAMPLE))], [ANSWER])[0].shape)
            except Unavailable as error:
                return error.message

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        client.close()
    assert warmed == [(1, 1), (1, 1)]
    refused = [answer for answer in answers if "Exceeds maximum queue size" in answer]
    assert 1 <= len(refused) <= 5 and len(set(answers).difference(refused)) == 1


def test_requests_that_do_not_meet_by_themselves_are_made_to(
    dlrm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grc.runtime.triton_repository.replay.AT_ONCE", 1)
    told: list[Replayed] = []
    export(dlrm, tmp_path / "repo", cache=True, before_done=lambda made: told.append(verify(made, dlrm)))
    assert told[0].merged > 0 and told[0].alone is None


def test_a_repository_that_never_merges_though_it_may_is_not_written(
    dlrm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "statistics", lambda client, model: (0, 0))
    with pytest.raises(ArtifactError) as caught:
        export(dlrm, tmp_path / "repo", before_done=lambda made: verify(made, dlrm))
    assert caught.value.message == "no requests to dlrm were merged, though its configuration asks for it"
    assert not (tmp_path / "repo").exists()


@dataclass(frozen=True)
class Served:
    """A repository behind a running server."""

    repository: Repository
    server: Server


@pytest.fixture(scope="module")
def fused(dlrm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    chosen = Settings(max_delay_us=DELAY, max_queue=64, timeout_us=10_000_000, priorities=2, instances=2)
    made = export(dlrm, tmp_path_factory.mktemp("fused") / "repo", chosen)
    with serving(made.path) as server:
        yield Served(made, server)


@pytest.fixture(scope="module")
def stages(dlrm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = export(dlrm, tmp_path_factory.mktemp("stages") / "repo", layout="stages")
    with serving(made.path, *LOADABLE) as server:
        yield Served(made, server)


@pytest.mark.parametrize("layout", ["fused", "stages"])
def test_dlrm_answers_as_the_model(dlrm: Path, layout: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(layout)
    replayed = Replay(served.repository, grc.load(dlrm), served.server).run([])
    assert replayed.tensors >= 2 * (4 + 48) and replayed.merged > 0
    assert replayed.error < 1e-6


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, fused: Served) -> Iterator[Client]:
    client = Client(request.param, fused.server.at(request.param))
    yield client
    client.close()


def test_a_bad_id_in_a_merged_batch_fails_alone(client: Client, dlrm: Path) -> None:
    inputs, outputs = golden(dlrm, 3)
    rows = [[t[i : i + 1].clone() for t in inputs] for i in range(8)]
    rows[5][1][0, 2] = 500

    def ask(row: list[Tensor]) -> Tensor | str:
        try:
            return call(client, "dlrm", shapes(dlrm), row)[0]
        except InputError as error:
            return error.message

    before = client.statistics("dlrm")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, rows))
    after = client.statistics("dlrm")
    assert after[1] - before[1] < 8
    bad = answers.pop(5)
    assert isinstance(bad, str)
    assert 'input "ids" has id 500 at row 0, column 2; table bags.2.weight has 500 rows' in bad
    expected = outputs[0][[0, 1, 2, 3, 4, 6, 7]]
    torch.testing.assert_close(torch.cat([a for a in answers if isinstance(a, Tensor)]), expected)


WRONG = {
    "dtype": (
        lambda d, i: (d.double(), i),
        {"dense": "FP64"},
        "inference input 'dense' data-type is 'FP64', but model",
    ),
    "shape": (lambda d, i: (d[:, :12], i), {}, "unexpected shape for input 'dense' for model 'dlrm'. Expected [-1,13]"),
    "batch": (lambda d, i: (d.repeat(40, 1), i.repeat(40, 1)), {}, "inference request batch-size must be <= 64"),
    "rows": (lambda d, i: (d, i[:1]), {}, "batch size does not match other inputs for 'dlrm'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_triton_refuses_what_the_configuration_does_not_allow(client: Client, dlrm: Path, case: str) -> None:
    from dataclasses import replace

    spoil, types, message = WRONG[case]
    known = shapes(dlrm)
    dtypes = {"FP64": "float64"}
    given = [replace(e, dtype=dtypes[types[e.name]]) if e.name in types else e for e in known.inputs]
    spoiled = spoil(*golden(dlrm, 1)[0])  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        client.infer("dlrm", list(zip(given, spoiled, strict=True)), known.outputs)
    assert message in caught.value.message


def test_an_unknown_model_and_version_are_named(client: Client, dlrm: Path) -> None:
    inputs, _ = golden(dlrm, 0)
    with pytest.raises(GrcError, match="unknown model: 'nobody' is not found"):
        call(client, "nobody", shapes(dlrm), inputs)
    given = list(zip(shapes(dlrm).inputs, inputs, strict=True))
    with pytest.raises(GrcError, match="'dlrm' version 9 is not found"):
        client.infer("dlrm", given, shapes(dlrm).outputs, model_version="9")


def test_a_request_may_have_a_priority_and_a_deadline(client: Client, dlrm: Path) -> None:
    inputs, outputs = golden(dlrm, 0)
    given = list(zip(shapes(dlrm).inputs, inputs, strict=True))
    (answer,) = client.infer("dlrm", given, shapes(dlrm).outputs, priority=1)
    torch.testing.assert_close(answer.flatten(), outputs[0])
    with pytest.raises(Unavailable, match="Request timeout expired"):  # it waits for others, and may not wait so long
        client.infer("dlrm", given, shapes(dlrm).outputs, timeout=1000)


def test_instances_map_one_file_of_weights(fused: Served) -> None:
    weights = (fused.repository.place("dlrm") / "weights.safetensors").stat()
    mapped = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            inodes = {int(line.split()[4]) for line in maps.read_text().splitlines()}
            mapped += [maps.parent.name] if weights.st_ino in inodes else []
    assert len(set(mapped) - {str(os.getpid())}) == 2


def test_stages_name_a_bad_id_and_a_nan(stages: Served, dlrm: Path) -> None:
    client = Client("http", stages.server.at("http"))
    inputs, outputs = golden(dlrm, 1)
    bad = inputs[1].clone()
    bad[1, 3] = -4
    nan = inputs[0].index_fill(1, torch.tensor([5]), torch.nan)
    for spoiled, message in (
        ([inputs[0], bad], 'input "ids" has id -4 at row 1, column 3; table bags.3.weight has 500 rows'),
        ([nan, inputs[1]], 'input "dense" holds nan at [0, 5]'),
    ):
        with pytest.raises(InputError) as caught:
            call(client, stages.repository.entry, shapes(dlrm), spoiled)
        assert message in caught.value.message
    torch.testing.assert_close(call(client, stages.repository.entry, shapes(dlrm), inputs)[0], outputs[0])
    client.close()


def test_a_copied_model_folder_serves_alone_and_caches(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo", Settings(cache=True))
    shutil.copytree(made.path / "dlrm", tmp_path / "alone" / "dlrm")
    inputs, outputs = golden(dlrm, 2)
    with serving(tmp_path / "alone", "--cache-config=local,size=1048576") as server:
        client = Client("grpc", server.at("grpc"))
        before = client.statistics("dlrm")[1]
        answers = [call(client, "dlrm", shapes(dlrm), inputs)[0] for _ in range(5)]
        executed = client.statistics("dlrm")[1] - before
        client.close()
    assert executed == 1
    for answer in answers:
        torch.testing.assert_close(answer, outputs[0])


def test_run_server_starts_the_repository_and_stops_when_told(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo", warmup=False)
    found, ports = launcher.find(), launcher.free_ports()
    assert found is not None
    words = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    words.append(f"--backend-directory={launcher.backends(found, tmp_path)}")
    env = launcher.environment(found, None) | {"TRITONSERVER": str(found.binary)}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([made.path / "run_server.sh", *words], env=env, stdout=log, stderr=log)
    server = Server(*ports, process, tmp_path / "log")
    try:
        assert launcher.ready(server, time.monotonic() + launcher.READY_SECONDS), server.last_words()
        client = Client("grpc", server.at("grpc"))
        inputs, outputs = golden(dlrm, 1)
        torch.testing.assert_close(call(client, "dlrm", shapes(dlrm), inputs)[0], outputs[0])
        client.close()
        process.terminate()
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()


class History(nn.Module):
    """The mean of a history of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.top = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, history: Tensor) -> dict[str, Tensor]:
        scores = self.top(self.items(history).mean(1))
        return {"scores": scores, "best": scores.argmax(1)}


def histories(batch: int) -> tuple[Tensor]:
    length = {1: 4, 2: 7, 3: 5, 5: 9, 11: 6}.get(batch, 8)
    return (torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(batch)),)


def test_verify_is_patient_with_a_full_queue_and_small_batches(dlrm: Path, tmp_path: Path) -> None:
    told: list[Replayed] = []
    made = export(
        dlrm,
        tmp_path / "repo",
        Settings(max_batch=4, max_queue=2, max_delay_us=20_000),
        before_done=lambda made: told.append(verify(made, dlrm)),
    )
    assert told[0].error < 1e-6 and made.record["settings"]["max_batch"] == 4


def test_histories_of_different_lengths_are_served_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "history.grc"
    grc.compile(History().eval(), histories, grc.Options(output=path, engine="eager", batches=(4,), max_batch=32))
    told: list[Replayed] = []
    made = export(
        path,
        tmp_path / "repo",
        Settings(max_delay_us=DELAY, warmup=False),
        before_done=lambda made: told.append(verify(made, path)),
    )
    text = (made.path / "history" / "config.pbtxt").read_text()
    assert "allow_ragged_batch: true" in text and "dims: -1" in text
    assert told[0].merged > 0 and told[0].error < 1e-6


def test_a_repository_that_answers_wrongly_is_not_written(dlrm: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(dlrm, tmp_path / "dlrm.grc"))
    file = spoiled / "golden.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_weights(file).items()}
    tensors["2.output.0"][1] += 0.25
    file.unlink()
    write_weights(file, tensors)
    write_manifest(spoiled, read_manifest(spoiled))
    with pytest.raises(ArtifactError) as caught:
        export(spoiled, tmp_path / "repo", before_done=lambda made: verify(made, spoiled))
    assert caught.value.message == "dlrm answers golden request 2 over http 2.5e-01 away from the model"
    assert caught.value.hint == "the repository was not written; check the artifact with grc check"
    assert [entry.name for entry in tmp_path.iterdir()] == ["dlrm.grc"]


def test_a_server_that_does_not_start_says_why(dlrm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = export(dlrm, tmp_path / "repo")
    (made.path / "dlrm/1/model.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(GrcError, match="No module named 'nothing_of_that_name'") as caught, serving(made.path):
        pass
    assert caught.value.message.startswith("tritonserver ended with 1:\n")
