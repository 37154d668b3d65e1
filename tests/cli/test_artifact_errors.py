"""A damaged artifact, or one for another host, is refused by name by every command that would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grc.runtime.artifact import FORMAT, read_manifest
from grc.runtime.weights import read_weights, write_weights
from tests.cli.session import Grc, edit_manifest, refused

AGAIN = "hint: copy the artifact again, or rebuild it"


@pytest.mark.parametrize("name", ["weights.safetensors", "parts/eager.json", "golden.safetensors", "graph.txt"])
def test_one_flipped_bit_is_found(grc: Grc, artifact: Path, name: str):
    data = bytearray((artifact / name).read_bytes())
    data[-1] ^= 1
    (artifact / name).write_bytes(data)
    sha = json.loads((artifact / "manifest.json").read_text())["files"][name]["sha256"]
    for words in (("check", artifact), ("run", artifact, "--example")):
        refused(grc(*words), f"error: tiny.grc/{name} is damaged: its sha256 is not {sha[:12]}…", AGAIN)


def test_a_truncated_file_is_found(grc: Grc, artifact: Path):
    file = artifact / "weights.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    message = f"error: tiny.grc/weights.safetensors has {size // 2} bytes, the manifest says {size}"
    refused(grc("check", artifact), message, AGAIN)


def test_a_missing_file_is_found(grc: Grc, artifact: Path):
    (artifact / "parts" / "eager.json").unlink()
    refused(grc("check", artifact), "error: tiny.grc/parts/eager.json is missing", AGAIN)


def test_an_edited_manifest_is_found(grc: Grc, artifact: Path):
    file = artifact / "manifest.json"
    checksum = json.loads(file.read_text())["checksum"]
    file.write_text(file.read_text().replace('"max": 4096', '"max": 8192'))
    message = f"error: tiny.grc/manifest.json is damaged: its checksum is not {checksum[:12]}…"
    refused(grc("inspect", artifact), message, "hint: rebuild the artifact")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00"])
def test_a_manifest_that_is_none(grc: Grc, artifact: Path, text: str):
    (artifact / "manifest.json").write_text(text)
    ran = grc("inspect", artifact)
    assert ran.told[0].startswith("error: tiny.grc/manifest.json can't be read: ")
    assert (ran.told[1:], ran.code) == ([AGAIN], 1)


def test_a_folder_that_is_no_artifact(grc: Grc, tmp_path: Path):
    for command in ("inspect", "check"):
        refused(
            grc(command, tmp_path),
            f"error: {tmp_path} is no grc artifact: it has no manifest.json",
            "hint: build one with grc compile MODEL -o PATH",
        )


def other_isa(manifest: dict) -> None:
    manifest["target"]["isa"] = "avx512"


def other_torch(manifest: dict) -> None:
    manifest["target"]["torch"] = "2.4.1"


def other_format(manifest: dict) -> None:
    manifest["format"] = 99


def lost_operators(manifest: dict) -> None:
    manifest["requires"] = {"abacus::add": "no_such_package"}


def older_library(manifest: dict) -> None:
    manifest["requires"] = {"abacus::add": "json"}


HOSTS = {
    other_isa: ("tiny.grc was built for avx512; this CPU has avx2", "rebuild it here: {command}"),
    other_torch: (f"tiny.grc was built with torch 2.4.1; this is torch {torch.__version__.split('+')[0]}",
                  "rebuild it here: {command}"),
    other_format: (f"tiny.grc has format 99; this grc reads format {FORMAT}", "rebuild the artifact"),
    lost_operators: ("tiny.grc needs the operator abacus::add of no_such_package", "pip install no_such_package"),
    older_library: ("tiny.grc needs the operator abacus::add, which is not loaded here",
                    "install a version of json that has it"),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTS)
def test_another_host_is_refused_by_name(
    grc: Grc, artifact: Path, model: Path, change, monkeypatch: pytest.MonkeyPatch
):
    if change is other_isa:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    command = read_manifest(artifact)["command"]
    edit_manifest(artifact, change)
    message, hint = HOSTS[change]
    assert command.startswith(f"grc compile {model} --")
    for words in (("check", artifact), ("run", artifact, "--example")):
        refused(grc(*words), f"error: {message}", f"hint: {hint.format(command=command)}")


def test_inspect_reads_the_artifact_of_another_host(grc: Grc, artifact: Path):
    edit_manifest(artifact, other_torch)
    ran = grc("inspect", artifact)
    assert ran.code == 0
    assert ran.out.splitlines()[1].startswith("this host can't run it: tiny.grc was built with torch 2.4.1")
    assert json.loads(grc("inspect", artifact, "--json").out)["refused"].startswith("tiny.grc was built with torch 2.4")


def test_check_finds_an_artifact_that_answers_wrongly(grc: Grc, artifact: Path):
    """Whole files, wrong numbers: what a bad weight or a miscompiled part would look like."""
    weights = {name: tensor.clone() for name, tensor in read_weights(artifact / "weights.safetensors").items()}
    weights["top.bias"] += 1
    write_weights(artifact / "weights.safetensors", weights)
    edit_manifest(artifact, lambda manifest: None)
    ran = grc("check", artifact)
    assert ran.code == 1
    assert ran.told[0].startswith("error: tiny.grc: eager answers ")
    assert ran.told[0].endswith(" away from the model")
    assert [line.split()[-1] for line in ran.out.splitlines()[1:]] == ["WRONG", "WRONG"]
