"""grc compile --precision: what is told before the search begins, and what inspect shows of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.session import MODEL, Grc, edit_manifest, refused

INT8 = ("--precision", "int8", "--engine", "inductor", "--batches", "4")


@pytest.mark.parametrize(
    ("precision", "engine", "others"),
    [
        ("int8", "aoti", "auto, inductor, inductor-float-layers, onnxruntime, onnxruntime-static"),
        ("bf16", "eager", "auto, inductor, inductor-float-layers, onnxruntime, onnxruntime-static"),
        ("fp32", "inductor-float-layers", "auto, inductor, aoti, onnxruntime, eager"),
    ],
)
def test_an_engine_that_a_precision_has_not_is_refused_at_once(
    grc: Grc, tmp_path: Path, precision: str, engine: str, others: str
):
    refused(
        grc("compile", tmp_path / "no.py", "--precision", precision, "--engine", engine),
        f"error: there is no engine {engine} for precision {precision}",
        f"hint: choose one of {others}",
    )


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_data_of_get_inputs_are_warned_of_before_the_search(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
):
    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("the search begins")

    monkeypatch.setattr("grc.compiler.Search", stop)
    ran = grc("compile", model, "-o", artifact_path, *INT8, *flags)
    assert ran.told[0].startswith("warning: calibrated on what get_inputs draws: if its ids and values are random")
    assert ran.told[1] == "error: grc itself failed: RuntimeError: the search begins"


def test_a_calibration_that_fails_is_told_with_its_line(
    grc: Grc, model_file: Callable[[str], Path], artifact_path: Path
):
    text = MODEL + "\n\ndef calibration():\n    return open('/no/clicks.npz')\n"
    file = model_file(text)
    refused(
        grc("compile", file, "-o", artifact_path, *INT8),
        f"error: {file}:{len(text.splitlines())}: calibration() raised FileNotFoundError: [Errno 2] No such file or "
        "directory: '/no/clicks.npz'",
        "hint: mend it, or pass --calibration FILE, which is used in its place",
    )


def test_inspect_shows_the_notes(grc: Grc, artifact: Path):
    assert "\nnotes\n" not in grc("inspect", artifact).out
    edit_manifest(artifact, lambda m: m["capture"]["notes"].append("dense is never read"))
    assert "\nnotes\n  dense is never read\n" in grc("inspect", artifact).out
