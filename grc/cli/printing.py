"""--print-after: the graph as text after the passes that were named, on stderr as mlir-opt does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grc.cli.errors import say
from grc.cli.parameters import check_passes


def graph_printer(names: Sequence[str], known: Sequence[str]) -> Callable[[Any, Any], None] | None:
    """What to call after each pass, or None where nothing is to be printed. Raises GrcError for an unknown pass."""
    check_passes([name for name in names if name != "all"], known)
    if not names:
        return None
    from grc.graph.show import show

    def after(step: Any, graph: Any) -> None:
        if "all" in names or step.name in names:
            say(f"// after {step.name}\n{show(graph)}")

    return after
