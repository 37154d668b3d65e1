"""The host of a measurement: what it is, and the memory settings that every engine of the run gets."""

from __future__ import annotations

import ctypes
import platform
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


def tuned_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment to start an engine's process in: glibc reads its settings only when a process starts."""
    tunables = {"GLIBC_TUNABLES": TUNABLES} if has_glibc() else {}
    return {**environment, **tunables, "OMP_NUM_THREADS": str(threads)}


def allocator() -> str:
    return ALLOCATOR if has_glibc() else STOCK_ALLOCATOR


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
