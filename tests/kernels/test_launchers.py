"""The C functions that launch kernels in CUDA C++, read by the host's compiler with CUDA's header, which Triton carries."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from grc.kernels import cpp, encoder, nvrtc, tower

KERNELS = ["-DGRC_KERNELS=" + " ".join(f'KERNEL(0, {rows}, 8, "{rows}.cubin")' for rows in tower.ROWS)]
FORMS = ["-DGRC_WIDE=16", "-DGRC_HALF=8", '-DGRC_WIDE_CUBIN="wide.cubin"', '-DGRC_HALF_CUBIN="half.cubin"']


@pytest.mark.parametrize("folder, flags", [(encoder.HERE, FORMS), (tower.HERE, KERNELS)], ids=["encoder", "tower"])
def test_compiles_without_a_warning(folder: Path, flags: list[str]) -> None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("Triton is not installed")
    cuda = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    includes = [f"-I{nvrtc.HEADERS}", "-isystem", f"{Path(torch.__file__).parent / 'include'}", "-isystem", f"{cuda}"]
    command = [
        cpp.compiler(),
        *cpp.FLAGS,
        "-DUSE_CUDA",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        *flags,
        *includes,
    ]
    done = subprocess.run([*command, str(folder / "shim.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
