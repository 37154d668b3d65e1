"""grc: a compiler for PyTorch recommenders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grc.errors import GrcError
from grc.options import Options
from grc.runtime.artifact import Artifact
from grc.runtime.program import Program, load
from grc.runtime.version import VERSION as __version__

if TYPE_CHECKING:
    from grc.compiler import compile

__all__ = ["Artifact", "GrcError", "Options", "Program", "__version__", "compile", "load"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """`grc.compile` brings the compiler with it; `grc.load` on a serving host does not."""
    if name == "compile":
        from grc.compiler import compile

        return compile
    raise AttributeError(f"module 'grc' has no attribute {name!r}")
