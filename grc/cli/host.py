"""What this host offers to grc: one finding for each thing that it can use."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from grc.errors import GrcError
from grc.kernels import cpp, nvrtc
from grc.lowering.eager import Eager
from grc.lowering.engine import Engine, Target
from grc.lowering.inductor import Inductor
from grc.lowering.onnxruntime import OnnxRuntime
from grc.runtime.triton_repository import launcher, wheel
from grc.runtime.version import VERSION

TORCH = ((2, 11), (2, 15))  # from the first to below the second, as in pyproject.toml
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FLAGS = {  # what /proc/cpuinfo calls them
    "AVX2": "avx2", "AVX-512": "avx512f", "VNNI": "avx512_vnni", "BF16": "avx512_bf16", "AMX": "amx_tile",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that grc can use: whether it is usable, in words, and the command that would make it so."""

    kind: str
    name: str
    usable: bool
    detail: str
    command: str | None = None


def findings() -> list[Finding]:
    target = Target("cpu", cpp.target_isa(), torch.get_num_threads())
    engines: list[Engine] = [Inductor(packed=True), Inductor(packed=False), OnnxRuntime(), Eager()]
    checks: list[Callable[[], Finding]] = [
        torch_version, compiler, isa, threads, huge_pages, gpu, triton, cuda_compiler, tritonserver,
    ]  # fmt: skip
    return [
        Finding("software", "grc", True, VERSION),
        *(check() for check in checks),
        *(engine_finding(engine, target) for engine in engines),
        *(on_gpu(name) for name in ("inductor", "aoti", "eager")),
    ]


def torch_version() -> Finding:
    low, high = TORCH
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    wanted = f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    if low <= found < high:
        return Finding("software", "torch", True, f"{torch.__version__}, in the range {wanted}")
    return Finding("software", "torch", False, f"{torch.__version__} is outside of {wanted}", f"pip install '{wanted}'")


def compiler() -> Finding:
    try:
        path = cpp.compiler()
    except GrcError as error:
        return Finding("software", "c++", False, error.message, "apt-get install g++")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Finding(
        "software", "c++", done.returncode == 0, f"{path}: {(done.stdout or done.stderr).partition(chr(10))[0]}"
    )


def isa() -> Finding:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = set((re.search(r"^flags\s*:(.*)$", text, re.M) or [text, ""])[1].split())
    have = ", ".join(name for name, flag in FLAGS.items() if flag in flags) or "none of " + ", ".join(FLAGS)
    model = (re.search(r"^model name\s*:\s*(.*)$", text, re.M) or ["", "unknown CPU"])[1]
    return Finding("hardware", "cpu", True, f"{model}: {have}; kernels are built for {cpp.target_isa()}")


def threads() -> Finding:
    cores = len(os.sched_getaffinity(0))
    used = torch.get_num_threads()
    detail = f"torch uses {used} threads on {cores} cores"
    return Finding(
        "hardware", "threads", used <= cores, detail, None if used <= cores else f"export OMP_NUM_THREADS={cores}"
    )


def huge_pages() -> Finding:
    """Tables are read at random: with huge pages a look-up misses the TLB far less often."""
    if not HUGE_PAGES.exists():
        return Finding("hardware", "huge pages", False, "this kernel has no transparent huge pages")
    mode = (re.search(r"\[(\w+)\]", HUGE_PAGES.read_text()) or ["", "unknown"])[1]
    command = None if mode != "never" else f"echo madvise | sudo tee {HUGE_PAGES}"
    return Finding("hardware", "huge pages", mode != "never", f"transparent huge pages: {mode}", command)


def gpu() -> Finding:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Finding("hardware", "gpu", True, f"{torch.cuda.get_device_name()}, sm_{major}{minor}")
    if torch.version.cuda is None:
        command = "pip install torch --index-url https://download.pytorch.org/whl/cu128" if has_driver() else None
        return Finding("hardware", "gpu", False, "torch was built without CUDA", command)
    return Finding("hardware", "gpu", False, "torch sees no CUDA device", "nvidia-smi")


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("software", "triton", False, "not installed; it comes with torch for CUDA")
    usable = torch.cuda.is_available()
    return Finding("software", "triton", usable, "installed" if usable else "installed, but there is no GPU")


def cuda_compiler() -> Finding:
    """What compiles kernels in CUDA C++; without it, `compile --device cuda` leaves them out."""
    words, _, command = (nvrtc.missing() or "").partition(": ")
    if words:
        return Finding("software", "nvrtc", False, f"{words}; it comes with torch for CUDA", command)
    usable = torch.cuda.is_available()
    version = ".".join(map(str, nvrtc.version()))
    return Finding("software", "nvrtc", usable, version if usable else f"{version}, but there is no GPU")


def tritonserver() -> Finding:
    """What `grc export-triton --verify` starts."""
    reason = launcher.missing()
    found = launcher.find()
    if reason is None and found is not None:
        return Finding("software", "tritonserver", True, f"{found.binary}, for grc export-triton --verify")
    fetch = None if found or wheel.obstacle() else "python -m grc.runtime.triton_repository.wheel"
    return Finding("software", "tritonserver", False, reason or "", fetch)


def engine_finding(engine: Engine, target: Target) -> Finding:
    reason = engine.missing(target)
    if reason is None:
        return Finding("engine", engine.name, True, "usable")
    words, _, command = reason.partition(": pip")
    return Finding("engine", engine.name, False, words, f"pip{command}" if command else None)


def on_gpu(name: str) -> Finding:
    """An engine for `grc compile --device cuda`: what it lacks here, the GPU first."""
    label = f"{name} on cuda"
    found = gpu()
    if not found.usable:
        return Finding("engine", label, False, f"needs a GPU: {found.detail}", found.command)
    if name != "eager":
        for needed in (triton(), compiler()):
            if not needed.usable:
                return Finding("engine", label, False, f"needs {needed.name}: {needed.detail}", needed.command)
    return Finding("engine", label, True, f"usable, captured in CUDA graphs on {found.detail}")
