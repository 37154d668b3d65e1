"""AOTInductor: the only engine that carries our kernels. They are linked into the package, so it needs nothing beside it."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from grc.errors import LoweringError, first_line
from grc.graph.flat import quiet_export
from grc.graph.ids import id_ranges
from grc.graph.match import value
from grc.graph.rewrite import copy_graph
from grc.kernels import OPS, cpp
from grc.kernels.fusion import FusedOp
from grc.lowering.check_ids import with_checked_ids
from grc.lowering.engine import Built, Lowerable, Target
from grc.lowering.export import constants_of, export_graph
from grc.lowering.failures import failures_raised
from grc.lowering.pack import pack_linears


class Inductor:
    """`packed` gives linear layers to our packed GEMM; without it they go where Inductor sends them.

    `formats` names the weights that are kept in fewer bits, each with its format, and `label` this choice of them.
    """

    def __init__(self, packed: bool, formats: Mapping[str, str] = MappingProxyType({}), label: str = ""):
        self.packed, self.formats = packed, formats
        self.name = "-".join(["inductor" if packed else "aoti", *filter(None, [label])])

    def missing(self, target: Target) -> str | None:
        try:
            cpp.compiler()
        except LoweringError as error:
            return f"{error.message}: {error.hint}"
        return None

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        graph = lowerable.graph
        if self.packed:
            graph = with_checked_ids(pack_linears(graph, target.isa, self.formats, folder))
        packed = Lowerable(in_plain_operators(graph), lowerable.inputs, lowerable.shapes)
        used = {n.target for n in packed.graph.graph.nodes if n.op == "call_function"}
        ops = [op for op in OPS if op.overload in used and op.cpu is not None]
        program = export_graph(packed, [op for op in OPS if op.cpu is None])
        file = f"{self.name}.pt2"
        objects = [str(cpp.build(ops, target.isa))] if ops else []
        package(program, folder / file, settings(ops), objects)
        checks_ids = self.packed and all(entry.checked_by_kernel for entry in id_ranges(graph))
        return Built(self.name, file, packaged_constants(folder / file, graph, program), checks_ids=checks_ids)


def in_plain_operators(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph in which calls on dtypes that their C++ kernel does not compute in are in plain operators."""
    narrow = {op.overload: op.reference for op in OPS if op.only_float32}
    copy = copy_graph(graph)
    for node in copy.graph.nodes:
        if node.target in narrow and value(node.args[0]).dtype is not torch.float32:
            node.target = narrow[node.target]
    copy.recompile()
    return copy


def package(
    program: torch.export.ExportedProgram, file: Path, configs: dict[str, Any], objects: Sequence[str] = ()
) -> None:
    """Compile a program by AOTInductor into one file. Raises LoweringError with the first line of what went wrong."""
    try:
        with torch.no_grad(), quiet_export(), linking(objects), failures_raised():
            torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)
    except Exception as error:  # the C++ compiler, Inductor's lowering, or a full disk
        raise LoweringError(f"AOTInductor can't build the graph: {first_line(error)}") from error


def packaged_constants(
    file: Path, graph: fx.GraphModule, program: torch.export.ExportedProgram
) -> dict[str, torch.Tensor]:
    """The constants that a package reads, by the names it knows them under."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
    known = {**constants_of(graph), **dict(program.named_parameters()), **dict(program.named_buffers())}
    known |= {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    constants: dict[str, torch.Tensor] = {}
    for name in loader.get_constant_fqns():
        if name not in known:
            raise LoweringError(f"AOTInductor made a constant of its own, {name}, which can't be shared")
        constants[name] = known[name].detach()
    return constants


def settings(ops: Sequence[FusedOp]) -> dict[str, Any]:
    """Weights outside of the package, our ops called through their C shims, our objects linked in."""
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    return {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.custom_ops_to_c_shims": {op.overload: [cpp.declaration(op.schema)] for op in ops},
        "cpp.cxx": (None, str(linking_compiler())),
    }


OBJECTS = "GRC_LINK_OBJECTS"


@contextmanager
def linking(objects: Sequence[str]) -> Iterator[None]:
    """Link these objects into the shared libraries that are built meanwhile."""
    os.environ[OBJECTS] = " ".join(objects)
    try:
        yield
    finally:
        del os.environ[OBJECTS]


def linking_compiler() -> Path:
    """A compiler that links our objects into shared libraries, binds a library's symbols to itself, and lets AOTInductor's code
    print nothing of ids that our kernels refuse.

    Without -Bsymbolic, symbols of libtorch win over the package's own and a package may crash at load. The flag belongs
    only to links: on the command that precompiles headers it would make the compiler try to link. Libraries are linked
    with the libstdc++ that torch runs on: a compiler that links its own statically gives the package a second set of
    locale facets, and std::regex crashes on the mixture. Debug information is left out: it is four fifths of a package,
    and a fifth of the time to compile one. The path is the same for every build, because Inductor keeps its precompiled
    headers by the compiler's path.
    """
    cxx = cpp.compiler()
    runtime = " ".join(f"'{path}'" for path in loaded_libraries("libstdc++.so"))
    quiet = cpp.INCLUDE / "grc/quiet.h"
    script = (
        f"#!/bin/sh\n# {hashlib.sha256(quiet.read_bytes()).hexdigest()}\n"
        f'for a in "$@"; do\n'
        f'  [ "$a" = -shared ] && exec \'{cxx}\' "$@" ${OBJECTS} {runtime} -Wl,-Bsymbolic\ndone\n'
        f"exec '{cxx}' \"$@\" -g0 -include '{quiet}'\n"
    )
    folder = cpp.cache_folder() / f"cxx-{hashlib.sha256(script.encode()).hexdigest()[:12]}"
    wrapper = folder / Path(cxx).name
    if not wrapper.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(script)
        os.chmod(file.name, 0o755)
        os.replace(file.name, wrapper)
    return wrapper


def loaded_libraries(name: str) -> list[str]:
    """Paths of the libraries of this process whose file begins with `name`."""
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return sorted({path for path in paths if Path(path).name.startswith(name)})
