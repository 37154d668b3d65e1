"""What a user's own mistakes look like: the line of their file, what to do, and no traceback unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.session import MODEL, Grc, refused

INPUTS = """
def get_inputs(batch):
    return (torch.randn(batch, 4),)
"""
BRANCH = (
    """\
import torch
from torch import nn


class Gate(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


def get_model():
    return Gate().eval()

"""
    + INPUTS
)

CASES = {
    "syntax": ("def get_model(:\n", "{file}:1: invalid syntax", "mend the syntax error"),
    "import": (
        "import no_such_package.part\n",
        "{file} can't be imported: No module named 'no_such_package'",
        "pip install no_such_package",
    ),
    "raises": ("x = 1\ny = {}['a']\n", "{file}:2: KeyError: 'a'", "the file must run by itself: python {file}"),
    "ends Python": ("raise SystemExit(0)\n", "{file}:1: SystemExit: 0", "the file must run by itself: python {file}"),
    "no get_model": ("x = 1\n", "{file} has no get_model()", "define get_model() -> nn.Module"),
    "no get_inputs": (
        "def get_model(): ...\n",
        "{file} has no get_inputs(batch)",
        "define get_inputs(batch) -> tuple or dict of tensors",
    ),
    "no module": (
        "def get_model(): return 3\ndef get_inputs(batch): ...\n",
        "get_model() in {file} returned a int",
        "return a torch.nn.Module in eval mode",
    ),
    "get_model raises": (
        "def get_model():\n    return 1 / 0\ndef get_inputs(batch): ...\n",
        "{file}:2: get_model() raised ZeroDivisionError: division by zero",
        None,
    ),
    "no function": (
        "from torch import nn\nget_model = nn.Linear(4, 4).eval()\ndef get_inputs(batch): ...\n",
        "get_model in {file} is a Linear, no function",
        "define get_model with def",
    ),
    "inputs are no function": (
        "def get_model(): ...\nget_inputs = (1, 2)\n",
        "get_inputs in {file} is a tuple, no function",
        "define get_inputs with def",
    ),
    "no text": ("\x00", "{file}: source code string cannot contain null bytes", "mend the syntax error"),
    "training": (
        MODEL.replace("Tiny().eval()", "Tiny()"),
        "{file}: the model is in training mode (Tiny and others)",
        "return model.eval() from get_model()",
    ),
    "get_inputs raises": (
        MODEL.replace("return torch.randn(batch, 3", "return torch.randn(batch, x"),
        "{file}:24: get_inputs(2) raised NameError: name 'x' is not defined",
        "get_inputs(batch) must work for every batch size from 1 up",
    ),
    "unseeded generator": (
        MODEL.replace("torch.Generator().manual_seed(batch)", "torch.Generator(); make.seed()"),
        "{file}: get_inputs(3) returns other values at each call",
        "seed the generator it draws from; torch, random and numpy.random are seeded already",
    ),
    "model fails": (
        MODEL.replace("nn.Linear(19, 1)", "nn.Linear(18, 1)"),
        "{file}:14: the model itself fails on get_inputs(2): RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        "mend the model or its get_inputs",
    ),
    "model fails later": (
        BRANCH.replace("x.sum() > 0", "len(x) > 2").replace("return x * 2", "raise ValueError('too many')"),
        "{file}:8: the model itself fails on get_inputs(3): ValueError: too many",
        "mend the model or its get_inputs",
    ),
    "names twice": (
        MODEL + "input_names = ['a', 'a']\n",
        "input_names must be a list of different names, not ['a', 'a']",
        "the inputs are dense, ids",
    ),
    "control flow": (
        BRANCH,
        "{file}:7: control flow depends on the values of a tensor",
        "use torch.where instead of `if tensor:` and x[torch.arange(len(p)), p] instead of a loop over p, "
        "keep .item() out of forward, and check weights in __init__",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_with_its_line(grc: Grc, model_file: Callable[[str], Path], artifact_path: Path, case: str):
    text, message, hint = CASES[case]
    file = model_file(text)
    ran = grc("compile", file, "-o", artifact_path)
    assert ran.code == 1
    assert ran.out == ""
    assert ran.told[0].startswith(f"error: {message.format(file=file)}")
    assert ran.told[1:] == ([f"hint: {hint.format(file=file)}"] if hint else [])
    assert not artifact_path.exists()
    assert list(artifact_path.parent.glob(".*.partial")) == []


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_traceback_is_shown_to_those_who_ask(grc: Grc, model_file: Callable[[str], Path], place: str):
    file = model_file("x = 1\ny = {}['a']\n")
    ran = grc("--traceback", "compile", file) if place == "before" else grc("compile", file, "--traceback")
    assert ran.err.startswith("Traceback (most recent call last):\n")
    assert "\nKeyError: 'a'\n" in ran.err
    assert ran.err.splitlines()[-1] == f"hint: the file must run by itself: python {file}"
    assert ran.code == 1


@pytest.mark.parametrize("command", ["compile", "explain", "opt"])
def test_a_model_file_must_exist(grc: Grc, tmp_path: Path, command: str):
    refused(
        grc(command, tmp_path / "no.py"),
        f"error: no model file at {tmp_path}/no.py",
        "hint: give a Python file with get_model() and get_inputs(batch)",
    )


def test_a_model_file_is_python_or_a_saved_program(grc: Grc, tmp_path: Path):
    (tmp_path / "model.onnx").write_text("")
    refused(
        grc("explain", tmp_path / "model.onnx"),
        f"error: {tmp_path}/model.onnx is neither a .py file nor a .pt2 program",
        "hint: see docs/model-files.md",
    )


def test_a_program_that_is_none_is_told_without_torchs_log(grc: Grc, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "model.pt2"
    file.write_text("no zip")
    refused(
        grc("compile", file),
        f"error: {file} is not a program saved by torch.export.save: File is not a zip file",
        "hint: save it again with the torch that is installed here",
    )
    assert capfd.readouterr().err == ""


def test_a_fault_of_grc_says_so(grc: Grc, model: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("grc.compiler.as_model", broken)
    refused(
        grc("explain", model),
        "error: grc itself failed: RuntimeError: out of order",
        "hint: this is a fault of grc; see it with --traceback",
    )


def test_inputs_need_no_seed(grc: Grc, model_file: Callable[[str], Path]):
    """Most people write torch.randn(batch, 4) and nothing more."""
    drawn = "return torch.randn(batch, 3), torch.randint(50, (batch, 2))\n"
    ran = grc("explain", model_file(MODEL.partition("    make = ")[0] + "    " + drawn))
    assert (ran.told, ran.code) == ([], 0)
