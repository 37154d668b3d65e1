"""C++ kernels: built for one ISA, called in this process, and linked into AOTInductor packages.

A kernel is one translation unit with `aoti_torch_cpu_NAME`, the C function that AOTInductor's generated code calls. Its object
goes into a package, where its exceptions rise to AOTInductor's handler, which keeps their message. To be called here, the
same object is linked behind CALLED, which does so for ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from grc.errors import LoweringError
from grc.kernels.fusion import FusedOp

INCLUDE = Path(__file__).parent / "include"

# no -ffast-math: NaN, infinity and the order of sums are part of a kernel's answer
FLAGS = ("-O3", "-fPIC", "-fopenmp", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden", "-Wall")
ISA_FLAGS = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    "default": ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
}

# No exception may cross into C.
CALLED = """\
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <exception>
#include <string>
static thread_local std::string message;
extern "C" {{
{declaration};
__attribute__((visibility("default"))) const char* grc_last_error() {{ return message.c_str(); }}
__attribute__((visibility("default"))) AOTITorchError grc_call({parameters}) {{
  try {{
    return aoti_torch_cpu_{name}({names});
  }} catch (const std::exception& error) {{
    message = error.what();
    return AOTI_TORCH_FAILURE;
  }}
}}
}}
"""

_NAMES = {"Tensor": "AtenTensorHandle", "int": "int64_t", "bool": "int32_t", "float": "double"}
_CTYPES = {"Tensor": ctypes.c_void_p, "int": ctypes.c_int64, "bool": ctypes.c_int32, "float": ctypes.c_double}


def target_isa() -> str:
    """The ISA this host runs best: "avx512", "avx2" or "default". ATEN_CPU_CAPABILITY lowers it."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ISA_FLAGS else "default"


def isa_flags(isa: str) -> tuple[str, ...]:
    """The compiler flags of an ISA, at::vec's macros among them. Raises LoweringError for an unknown one."""
    if isa not in ISA_FLAGS:
        raise LoweringError(f'there is no ISA "{isa}"', f"choose one of {', '.join(ISA_FLAGS)}")
    return ISA_FLAGS[isa]


def compiler() -> str:
    """The path of $CXX or g++. Raises LoweringError if there is none."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise LoweringError(f"no C++ compiler: {name} is not on PATH", "apt-get install g++, or set CXX")
    return path


def declaration(schema: str, device: str = "cpu") -> str:
    """The C signature of the shim that AOTInductor calls for an op of this schema on a device.

    Tensor is AtenTensorHandle, Tensor? a pointer to one (null for None), int[] a pointer and a length, and each
    result a pointer to a handle that the callee fills.
    """
    return f"AOTITorchError aoti_torch_{device}_{_name(schema)}({', '.join(_parameters(schema))})"


def _parameters(schema: str) -> list[str]:
    parsed = _parse(schema)
    parameters: list[str] = []
    for argument in parsed.arguments:
        kind, name = _kind(argument), argument.name
        if kind == "int[]":
            parameters += [f"const int64_t* {name}", f"int64_t {name}_len_"]
        elif kind == "Tensor?":
            parameters.append(f"AtenTensorHandle* {name}")
        else:
            parameters.append(f"{_NAMES[kind]} {name}")
    return [*parameters, *(f"AtenTensorHandle* ret{i}" for i in range(len(parsed.returns)))]


def build(ops: Sequence[FusedOp], isa: str) -> Path:
    """Compile the ops for `isa` into one relocatable object.

    Results are kept in $GRC_CACHE, else ~/.cache/grc, under a hash of everything that shapes them; processes that
    build the same file at once each write their own and rename it. Raises LoweringError with the compiler's words.
    """
    cxx, flags, sources = compiler(), isa_flags(isa), [_source(op) for op in ops]
    with ThreadPoolExecutor(max_workers=max(1, min(len(sources), os.cpu_count() or 1))) as pool:
        objects = list(pool.map(lambda source: compile_object(source, flags), sources))
    if len(objects) == 1:
        return objects[0]
    return make(
        cached(".o", *[o.name for o in objects]), lambda out: [cxx, "-r", "-nostdlib", *map(str, objects), "-o", out]
    )


def call(op: FusedOp, *args: Any, isa: str | None = None) -> Any:
    """Call the op's C++ kernel in this process, as AOTInductor would. Arguments follow the schema, all positional; its
    defaults may be left out.

    Raises IndexError for an id outside its table and RuntimeError for any other failure, with the kernel's message.
    """
    library = _library(op, isa or target_isa())
    parsed = _parse(op.schema)
    args = (*args, *(argument.default_value for argument in parsed.arguments[len(args) :]))
    if len(args) != len(parsed.arguments):
        raise TypeError(f"{op.name} takes {len(parsed.arguments)} arguments, not {len(args)}")
    values: list[Any] = []
    capsules: list[Any] = []
    try:
        for argument, value in zip(parsed.arguments, args, strict=True):
            kind = _kind(argument)
            if kind == "int[]":
                values += [(ctypes.c_int64 * len(value))(*value) if value else None, ctypes.c_int64(len(value))]
            elif kind.startswith("Tensor") and value is not None:
                if value.device.type != "cpu":
                    raise RuntimeError(f"{op.name}: {argument.name} is on {value.device}, the C++ kernel reads CPU")
                capsules.append(_capsule(value))
                pointer = ctypes.c_void_p(_address(capsules[-1], None))
                values.append(pointer if kind == "Tensor" else ctypes.byref(pointer))
            else:
                values.append(None if value is None else _CTYPES[kind](value))
        results = (ctypes.c_void_p * len(parsed.returns))()
        size = ctypes.sizeof(ctypes.c_void_p)
        values += [ctypes.byref(results, i * size) for i in range(len(parsed.returns))]
        if library.grc_call(*values) != 0:
            message = library.grc_last_error().decode()
            raise (IndexError if "is outside" in message else RuntimeError)(message)
    finally:
        _tensors(capsules)
    tensors = _tensors([_wrap(result, None, None) for result in results])
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def register(op: FusedOp) -> None:
    """Define `grc::NAME`: the reference is its fake and its code on every device, the C++ kernel its code on CPU.

    The kernel is built at the first call. On a host without a compiler the reference answers on CPU too: slower, the
    same numbers, but an id past its table is then only caught at the arena's end.
    """
    name = f"grc::{op.name}"
    torch.library.define(name, op.schema[len(op.name) :], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd")(op.reference)
    torch.library.register_fake(name)(op.reference)
    if op.cpu is not None:
        torch.library.impl(name, "CPU")(functools.partial(_on_cpu, op))


def _on_cpu(op: FusedOp, *args: Any) -> Any:
    foreign = op.only_float32 and args[0].dtype is not torch.float32
    return call(op, *args) if _has_compiler() and not foreign else op.reference(*args)


@functools.cache
def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX") or "g++") is not None


@functools.cache
def _parse(schema: str) -> Any:
    return torch._C.parse_schema(f"grc::{schema}")


def _name(schema: str) -> str:
    return schema.split("(")[0]


def _kind(argument: Any) -> str:
    kind = {"Optional[Tensor]": "Tensor?", "List[int]": "int[]"}.get(str(argument.type), str(argument.type))
    if kind not in ("Tensor?", "int[]", *_NAMES):
        raise LoweringError(f"argument {argument.name} has type {kind}, which the C shim does not carry")
    return kind


def _source(op: FusedOp) -> Path:
    if op.cpu is None:
        raise LoweringError(f"{op.name} has no C++ kernel")
    return op.cpu


def cache_folder() -> Path:
    """Where built kernels are kept: $GRC_CACHE, else ~/.cache/grc."""
    folder = Path(os.environ.get("GRC_CACHE") or Path.home() / ".cache" / "grc")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(suffix: str, *parts: str | bytes) -> Path:
    """Where a file that all these parts shape is kept."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return cache_folder() / f"{digest.hexdigest()[:32]}{suffix}"


@functools.cache
def _version(cxx: str) -> str:
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout


def compile_object(source: Path, flags: Sequence[str]) -> Path:
    """Compile a file with FLAGS and these into an object, which is kept. Raises LoweringError with the compiler's words."""
    cxx, flags = compiler(), [*FLAGS, *flags]
    headers = [
        h.read_bytes()
        for folder in (INCLUDE / "grc", INCLUDE / "cuda", source.parent)
        for h in sorted(folder.glob("*.h"))
    ]
    target = cached(".o", source.read_bytes(), *headers, *flags, torch.__version__, _version(cxx))
    return make(target, lambda out: [cxx, *flags, *_includes(), "-c", str(source), "-o", out])


def _includes() -> list[str]:
    return [f"-I{INCLUDE}", f"-I{Path(torch.__file__).parent / 'include'}"]


def make(target: Path, command: Any, text: str = "") -> Path:
    """Make a file by a command that writes it, given its name and on standard input a text."""
    if target.exists():
        return target
    descriptor, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(descriptor)
    try:
        done = subprocess.run(command(name), input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise LoweringError(f"the C++ compiler failed:\n{done.stderr[-4000:]}", "grc needs g++ 12 or newer")
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


@functools.cache
def _library(op: FusedOp, isa: str) -> ctypes.CDLL:
    """The kernel behind `grc_call`, and `grc_last_error`."""
    kernel, cxx, parameters = build([op], isa), compiler(), _parameters(op.schema)
    names = ", ".join(parameter.split()[-1] for parameter in parameters)
    text = CALLED.format(
        declaration=declaration(op.schema), name=op.name, parameters=", ".join(parameters), names=names
    )
    link = ["-shared", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [cxx, *FLAGS, *_includes(), "-x", "c++", "-", "-x", "none", str(kernel), *link, "-o"]
    file = make(cached(".so", kernel.name, text), lambda out: [*command, out], text)
    library = ctypes.CDLL(str(file))
    library.grc_last_error.restype = ctypes.c_char_p
    return library


def _capsule(tensor: torch.Tensor) -> Any:
    return torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])[0]


def _tensors(capsules: list[Any]) -> list[torch.Tensor]:
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_wrap = ctypes.pythonapi.PyCapsule_New
_wrap.restype, _wrap.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
