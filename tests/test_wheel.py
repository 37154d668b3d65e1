"""The wheel by itself: installed into an empty environment, it compiles a model and answers without its source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODEL = """\
import torch
from torch import nn


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(100, 16)
        self.items = nn.Embedding(200, 16)
        self.top = nn.Linear(32, 1)

    def forward(self, user, item):
        both = torch.cat([self.users(user), self.items(item)], dim=1)
        return torch.sigmoid(self.top(both))


def get_model():
    torch.manual_seed(0)
    return TwoTowers().eval()


def get_inputs(batch):
    make = torch.Generator().manual_seed(batch)
    return torch.randint(100, (batch,), generator=make), torch.randint(200, (batch,), generator=make)
"""

EXPECT = """\
import model, torch
with torch.no_grad():
    torch.save([(model.get_inputs(b), model.get_model()(*model.get_inputs(b))) for b in (1, 5)], "expected.pt")
"""

SERVE = """\
import sys, torch, grc
assert sys.prefix in grc.__file__, grc.__file__
served = grc.load("model.grc")
for inputs, expected in torch.load("expected.pt"):
    torch.testing.assert_close(served(*inputs), expected)
print("served")
"""


class Installed:
    """An environment that holds the wheel and what the wheel requires, and a folder away from the source."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        wheel_folder = folder / "dist"
        call(sys.executable, "-m", "build", "--wheel", "--outdir", wheel_folder, ROOT, cwd=folder)
        (self.wheel,) = wheel_folder.glob("grc_compiler-*.whl")
        call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        call(*pip, "-c", ROOT / "constraints.txt", self.wheel, cwd=folder)

    def run(self, command: str, *args: object) -> subprocess.CompletedProcess[str]:
        return call(self.bin / command, *args, cwd=self.folder)


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_file_of_the_package(installed: Installed):
    source = {p.relative_to(ROOT).as_posix() for p in (ROOT / "grc").rglob("*") if p.is_file()}
    source = {name for name in source if "__pycache__" not in name}
    packed = {name for name in zipfile.ZipFile(installed.wheel).namelist() if name.startswith("grc/")}
    assert {Path(name).suffix for name in source} >= {".py", ".cpp", ".h", ".j2"}
    assert packed == source


def test_wheel_tells_its_version(installed: Installed):
    version = installed.wheel.name.split("-")[1]
    assert version in installed.run("grc", "--version").stdout


def test_doctor_of_the_wheel_writes_json(installed: Installed):
    assert json.loads(installed.run("grc", "doctor", "--json").stdout)


@pytest.mark.engine
def test_wheel_compiles_a_model_and_serves_it_without_its_source(installed: Installed):
    model = installed.folder / "model.py"
    model.write_text(MODEL)
    installed.run("python", "-c", EXPECT)
    installed.run("grc", "compile", "model.py", "-o", "model.grc", "--engine", "inductor")
    model.unlink()
    assert installed.run("python", "-c", SERVE).stdout.splitlines()[-1] == "served"
    installed.run("grc", "check", "model.grc")
