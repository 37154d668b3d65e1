"""Kernels in CUDA C++ for clusters of blocks, compiled for a CPU, where every thread is a fiber: see emulated/hopper.h."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from grc.kernels import cpp, nvrtc

HERE = Path(__file__).parent / "emulated"


def emulate(name: str, folder: Path, macros: Mapping[str, str]) -> ctypes.CDLL:
    """The kernel of a folder with these macros, and the function that emulated/NAME.cpp has for ctypes."""
    given = [f"-D{macro}={text}" for macro, text in macros.items()]
    sources = [
        HERE / f"{name}.cpp",
        HERE / "hopper.h",
        *folder.glob("*.cu"),
        *folder.glob("*.h"),
        *nvrtc.HEADERS.glob("*.h"),
    ]
    library = cpp.cached(".so", *(source.read_bytes() for source in sources), *given)
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-fno-strict-aliasing"]
    includes = [f"-I{path}" for path in (HERE, folder, nvrtc.HEADERS)]
    cpp.make(library, lambda out: [cpp.compiler(), *flags, *given, *includes, str(sources[0]), "-o", out])
    return ctypes.CDLL(str(library))
