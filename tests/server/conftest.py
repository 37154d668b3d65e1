"""Artifacts to serve, compiled once, and one server on them that tests share as long as they don't change it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grc
from tests.cli.session import MODEL, SERVED
from tests.server.running import Running, needs_extra, running

needs_extra()

ON_GPU = {"device": "cuda", "engine": "inductor"}
# Pre- and postprocessing that can be slow and can fail, as users' own may.
WORDS = """\
import sys
import time

import torch


def preprocess(request):
    \"\"\"One user and one item, with three numbers.\"\"\"
    time.sleep(request.get("sleep", 0))
    if request.get("exit") == "before":
        sys.exit(3)
    return torch.tensor([request["dense"]]), torch.tensor([[request["user"], request["item"]]])


def postprocess(outputs, request):
    if request.get("spoil"):
        raise RuntimeError("spoilt")
    if request.get("set"):
        return {1}
    time.sleep(request.get("sleep after", 0))
    if request.get("exit") == "after":
        sys.exit(3)
    return {"user": request["user"], "click": outputs[0]}
"""


class Bags(nn.Module):
    """Two jagged features with lengths feature after feature, and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 4) for n in (30, 40))
        self.top = nn.Linear(11, 1)

    def forward(self, dense: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        counts = lengths.view(2, -1)
        batch = counts.shape[1]
        owner = torch.repeat_interleave(torch.arange(2 * batch), lengths, output_size=values.shape[0])
        feature = owner // batch
        low = torch.where(feature == 0, values, 0)
        high = torch.where(feature == 1, values, 0)
        rows = torch.where((feature == 0).unsqueeze(1), self.tables[0](low), self.tables[1](high))
        pooled = torch.zeros(2 * batch, 4).index_add(0, owner, rows)
        return self.top(torch.cat([dense, pooled[:batch], pooled[batch:]], 1)).squeeze(1)


def bags_inputs(batch: int, seed: int = 0, longest: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(100 * seed + batch)
    lengths = torch.randint(1, longest, (2 * batch,), generator=make)
    values = torch.randint(30, (int(lengths.sum()),), generator=make)
    return torch.randn(batch, 3, generator=make), values, lengths


def forget_model_files() -> None:
    """Or another text of the same file would not be read."""
    for name in ("tiny", "words"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "tiny.py").write_text(MODEL)
    (folder / "served.py").write_text(SERVED + '\nassets = ["request.json"]\n')
    (folder / "request.json").write_text('{"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7}')
    (folder / "words.py").write_text(WORDS)
    return folder


@pytest.fixture(scope="session")
def compiled(models: Path) -> Callable[..., Path]:
    """Compile the model file with pre- and postprocessing; `edit` changes tiny.py's text for this artifact."""

    def build(output: Path, edit: Callable[[str], str] = lambda text: text, **options: object) -> Path:
        (models / "tiny.py").write_text(edit(MODEL))
        forget_model_files()
        try:
            chosen = {"engine": "eager", "batches": (4,), "force": True, **options}
            grc.compile(str(models / "served.py"), None, grc.Options(output=output, **chosen))  # type: ignore[arg-type]
        finally:
            (models / "tiny.py").write_text(MODEL)
            forget_model_files()
        return output

    return build


@pytest.fixture(scope="session")
def tiny(models: Path, compiled: Callable[..., Path]) -> Path:
    """Never to be changed."""
    return compiled(models / "tiny.grc", max_batch=64)


@pytest.fixture(scope="session")
def bags(models: Path) -> Path:
    torch.manual_seed(0)
    output = models / "bags.grc"
    grc.compile(Bags().eval(), bags_inputs, grc.Options(output=output, engine="eager", batches=(4,), max_batch=64))
    return output


@pytest.fixture(scope="session")
def server(models: Path, tiny: Path, bags: Path, compiled: Callable[..., Path]) -> Iterator[Running]:
    """One server for all tests that only ask; where there is a GPU, the tiny model is on it too."""
    served = [f"tiny={tiny}", f"bags={bags}"]
    if torch.cuda.is_available():
        served.append(f"gpu={compiled(models / 'gpu.grc', max_batch=64, **ON_GPU)}")
    with running(models, *served) as found:
        yield found


@pytest.fixture(params=["tiny", pytest.param("gpu", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest) -> str:
    """The tiny model's name where it runs on the CPU, and where it runs on a GPU."""
    return str(request.param)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    found = asyncio.new_event_loop()
    yield found
    found.close()
