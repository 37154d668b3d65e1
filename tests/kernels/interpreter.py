"""Where tests of the Triton kernels run: on a GPU as they are, elsewhere each file once more in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU: test_in_the_interpreter runs this one")
elsewhere = pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above run the kernels themselves")


def crossed(cases: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every case with every combination of the others; in the interpreter, which is slow, the combinations take turns."""
    combinations = list(itertools.product(*others))
    if GPU:
        return [(case, *each) for case in cases for each in combinations]
    count = max(len(cases), len(combinations))
    return [(cases[at % len(cases)], *combinations[at % len(combinations)]) for at in range(count)]


def patch_the_language_once() -> None:
    """Triton's interpreter looks through its whole language at every call of a device function, for what it has to replace:
    a fourth of its time. Once for each module of a kernel that runs is enough.
    """
    from triton.runtime import interpreter

    look_through, seen = interpreter._patch_lang, set[int]()

    def once(function: Any) -> Any:
        if id(function.__globals__) in seen:
            return None
        scope = look_through(function)
        if not seen:  # the kernel's own: what it calls restores nothing
            restore = scope.restore
            scope.restore = lambda: (seen.clear(), restore())
        seen.add(id(function.__globals__))
        return scope

    interpreter._patch_lang = once


if INTERPRETED and not GPU:
    patch_the_language_once()


def passes(file: str, least: int) -> None:
    """Run a file of tests in the interpreter: none may fail, and at least so many must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= least, done.stdout[-400:]
