"""CUDA C++ kernels, compiled by NVRTC, which comes with every CUDA build of torch: neither a toolkit nor a GPU is needed."""

from __future__ import annotations

import ctypes
import functools
import os
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from grc.errors import LoweringError
from grc.kernels import cpp

FLAGS = ("--std=c++17",)
HEADERS = cpp.INCLUDE / "cuda"
CLUSTERS = 90  # the first architecture with clusters of blocks


def missing() -> str | None:
    """What keeps CUDA C++ from being compiled here, or None."""
    try:
        library()
    except LoweringError as error:
        return f"{error.message}: {error.hint}"
    return None


def missing_for_clusters(arch: str) -> str | None:
    """What keeps a kernel for clusters of blocks from being built for an architecture ("sm_90") here, or None."""
    if int(arch.removeprefix("sm_")) < CLUSTERS:
        return f"the kernel needs clusters of blocks: sm_{CLUSTERS} or newer, not {arch}"
    return missing()


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC. Raises LoweringError where there is none."""
    for path in candidates():
        try:
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")):  # which it looks for by name only
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise LoweringError("NVRTC is not installed", "pip install nvidia-cuda-nvrtc")


def candidates() -> Iterator[str]:
    """Where NVRTC may be: beside torch, where the linker looks, and as a package without the rest of CUDA."""
    major = (torch.version.cuda or "").split(".")[0]
    folders = [Path(folder) / "nvidia" for folder in (*site.getsitepackages(), *sys.path) if folder]
    found = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    yield from map(str, sorted(found, key=lambda path: path.suffix != f".{major}"))
    yield f"libnvrtc.so.{major}" if major else "libnvrtc.so"


def build(source: Path, macros: Mapping[str, str], arch: str) -> Path:
    """Compile a kernel with these macros for an architecture ("sm_90") into a cubin, which is kept like C++ objects.

    Headers are those beside the source and in HEADERS. Raises LoweringError with the compiler's words.
    """
    folders = [source.parent, HEADERS]
    options = [f"--gpu-architecture={arch}", *FLAGS, *(f"-I{folder}" for folder in folders)]
    options += [f"-D{name}={text}" for name, text in macros.items()]
    headers = [header.read_bytes() for folder in folders for header in sorted(folder.glob("*.h"))]
    target = cpp.cached(".cubin", source.read_bytes(), *headers, *options, str(version()))
    if not target.exists():
        own = target.with_suffix(f".{os.getpid()}")
        own.write_bytes(compiled(source, options))
        os.replace(own, target)
    return target


def compile_launcher(source: Path, flags: Sequence[str]) -> Path:
    """Compile a C function that launches cubins, which the flags name, into an object that carries them."""
    from torch.utils.cpp_extension import include_paths  # which takes its time, and no host that only serves needs it

    includes = [HEADERS, *include_paths("cuda")]
    return cpp.compile_object(source, ["-DUSE_CUDA", *flags, *(f"-I{path}" for path in includes)])


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compiled(source: Path, options: list[str]) -> bytes:
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given) != 0:
            log = got(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            raise LoweringError(f"NVRTC failed:\n{log[-4000:]}", "grc needs CUDA 12.8 or newer for this kernel")
        return got(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def got(program: ctypes.c_void_p, what: str) -> bytes:
    """nvrtcGet... of a program."""
    nvrtc, size = library(), ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
