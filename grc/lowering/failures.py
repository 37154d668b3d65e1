"""What fails in C++ that Inductor generates is raised: an index without a place is refused, as the model itself refuses it.

Inductor checks an index where it reads or writes by it. It throws inside of OpenMP's threads too, where nothing catches: the
process dies. And it drops the error of a scatter that libtorch does, which then is half done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from grc.errors import LoweringError
from grc.lowering.replaced import replaced

CHECK = "AOTI_TORCH_CHECK("
KEEP = """} catch (...) {
  #pragma omp critical
  grc_thrown = std::current_exception();
}
}"""


@contextmanager
def failures_raised() -> Iterator[None]:
    """C++ that Inductor generates within this block raises what fails in it."""
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    define = CppScheduling.define_kernel

    def define_raising(self: Any, source: str, *rest: Any, **more: Any) -> str:
        return str(define(self, raising(source), *rest, **more))

    with ExitStack() as stack:
        stack.enter_context(replaced(CppScheduling, "define_kernel", define_raising))
        for name in ("_generate_scatter_fallback", "_generate_index_put_fallback"):
            stack.enter_context(replaced(CppWrapperCpu, name, checked(getattr(CppWrapperCpu, name))))
        yield


def checked(generate: Any) -> Any:
    """A generator of code whose calls of libtorch's C functions have their error codes looked at."""

    def generate_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        write = self.writeline

        def write_checked(line: Any) -> None:
            bare = isinstance(line, str) and line.startswith("aoti_torch_")
            write(f"AOTI_TORCH_ERROR_CODE_CHECK({line.rstrip(';')});" if bare else line)

        with replaced(self, "writeline", write_checked):
            generate(self, *args, **kwargs)

    return generate_checked


def raising(source: str) -> str:
    """The source of a C++ kernel in which what the threads of a parallel region throw is thrown again at the region's end.

    Raises LoweringError where a region is written in a form that is not known.
    """
    if CHECK not in source:
        return source
    lines = source.splitlines()
    for i, line in enumerate(lines):
        if line.lstrip().startswith(("#pragma omp for", "#pragma omp single")):
            loops = int((re.search(r"collapse\((\d+)\)", line) or [0, 1])[1])
            first, last = block(lines, i, loops)
            lines[first] = "{ try {"
            lines[last] = KEEP
        elif line.lstrip().startswith("#pragma omp parallel"):
            _, last = block(lines, i, 1)
            lines[i] = f"{{ std::exception_ptr grc_thrown;\n{line}"
            lines[last] += "\nif (grc_thrown) std::rethrow_exception(grc_thrown); }"
    return "\n".join(["#include <exception>", *lines, ""])


def block(lines: list[str], start: int, depth: int) -> tuple[int, int]:
    """The first and the last line of the `depth`-th block that opens below line `start`."""
    opens = [i for i in range(start, len(lines)) if lines[i].strip() == "{"][:depth]
    if len(opens) == depth:
        last = lines[opens[-1]].replace("{", "}")
        for i in range(opens[-1], len(lines)):
            if lines[i] == last:
                return opens[-1], i
    raise LoweringError("Inductor generates C++ of a form that grc does not know", "use an older torch")
