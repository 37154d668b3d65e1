"""The host of a measurement: what it is, and the memory settings that every engine of the run gets."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from grc.runtime.version import VERSION

# glibc gives blocks above its thresholds back to the system at every free, so that each call faults its pages in again.
# mmap_max=0 keeps blocks of any size in the heap (the threshold can't exceed 32 MB); hugetlb=1 advises huge pages.
TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
ALLOCATOR = "glibc: nothing unmapped or trimmed, transparent huge pages advised"
STOCK_ALLOCATOR = "glibc defaults"


def tuned_environment(environment: Mapping[str, str], threads: int | None) -> dict[str, str] | None:
    """The environment to start the measurement in, or None where `environment` is it already."""
    wanted = {"GLIBC_TUNABLES": TUNABLES} if has_glibc() else {}
    if threads is not None:
        wanted["OMP_NUM_THREADS"] = str(threads)
    if all(environment.get(name) == value for name, value in wanted.items()):
        return None
    return {**environment, **wanted}


def restart_tuned(threads: int | None, module: str = "grc") -> None:
    """Start this command over with malloc tuned: glibc reads its settings only when a process starts."""
    environment = tuned_environment(os.environ, threads)
    if environment is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def allocator() -> str:
    return ALLOCATOR if os.environ.get("GLIBC_TUNABLES") == TUNABLES and has_glibc() else STOCK_ALLOCATOR


def has_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def machine(device: str) -> str:
    """Model, threads and ISA of the CPU, after the GPU's name where the measurement is on one. Never a host name."""
    isa = torch.backends.cpu.get_cpu_capability().lower()
    cpu = f"{cpu_model()}, {torch.get_num_threads()} threads, {isa}"
    return f"{torch.cuda.get_device_name()} / {cpu}" if device == "cuda" else cpu


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the model's name; family and model number still tell the generation.
    number = (
        f" (family {fields['cpu family']} model {fields['model']})" if {"cpu family", "model"} <= set(fields) else ""
    )
    return name + number


def last_level_cache() -> int:
    """Bytes of the largest cache that one core sees; 32 MB where the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1] in "KMG" else int(text))
    return max(sizes) or 32 << 20


def versions() -> dict[str, str]:
    found = {"grc": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("onnxruntime", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
