"""What every test shares: few threads, a place for an artifact, and a visible reason where there is no GPU."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Two threads, so that races between the threads of a kernel can show; and threads that sleep when they wait, because
# two workers of two threads on two cores would otherwise spend their time spinning. OpenMP reads these as torch loads.
THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(THREADS))
# The code around the kernels runs once or twice here, and to optimise it takes a quarter of a build.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import pytest
import torch

from grc.lowering.timing import interleave
from grc.runtime.triton_repository import launcher

torch.set_num_threads(min(THREADS, torch.get_num_threads()))

LONGEST = ("test_wheel.py", "test_thirdparty.py", "test_versions.py", "test_server.py", "test_lifecycle.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The files that take longest go first: one of them, begun last, would keep a worker after the others have ended. The
    # wheel check mostly waits for an install, and the other worker computes meanwhile.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    items.sort(key=lambda item: item.path.name != LONGEST[0])
    no_server = launcher.missing()
    for item in items:
        if no_server and "triton" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"{no_server}: {launcher.HINT}"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        # Not `in item.keywords`: those hold the names of folders too, and a checkout may lie in one called gpu.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def artifact_path(tmp_path: Path) -> Path:
    """A folder name for one artifact, not yet there, in a directory of the test's own."""
    return tmp_path / "model.grc"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run: bounds on rounding errors hold for most draws, not for all."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def quick_measurements() -> Iterator[None]:
    """Tests ask what is measured, not how well."""
    quick = functools.partial(interleave, burst=0.01, settle=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grc.lowering.choose.SECONDS", 0.01)
        patch.setattr("grc.lowering.choose.interleave", quick)
        patch.setattr("grc.bench.measure.interleave", quick)
        yield


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """What is alive when a file begins is left out of collections: to look through torch's objects takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def operators_found_once() -> Iterator[None]:
    """At every export, and for every namespace, torch looks for the operators of its C++ libraries: a third of a capture."""
    name = "_materialize_cpp_cia_ops"
    find = getattr(torch._export.utils, name, lambda: None)
    once = functools.cache(lambda libraries: find())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._export.utils, name, lambda: once(len(torch.ops.loaded_libraries)), raising=False)
        yield
