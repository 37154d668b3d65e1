"""Converting weights streams: beside the source and the mapped files nothing of their size is in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grc.kernels import cpp
from grc.lowering.pack import pack_linears
from grc.precision.sites import find_sites
from tests.precision.models import Retriever, captured, retriever_inputs

PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from torch import nn
from grc.kernels import cpp
from grc.lowering.pack import pack_linears
from grc.precision.apply import graphs_of
from grc.precision.calibration import calibration_of
from grc.precision.quality import budget
from grc.precision.search import Search
from grc.precision.sites import find_sites
from tests.precision.models import captured

COUNT, WIDTH, WIDE = 125_000, 128, 4096

class Items(nn.Module):
    def __init__(self):
        super().__init__()
        self.items, self.user = nn.Embedding(COUNT, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, history):
        return torch.topk(self.user(self.items(history).mean(1)) @ self.items.weight.t(), 5)

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 1)

    def forward(self, x):
        return self.head(torch.relu(self.wide(x))).squeeze(1)

def ids(batch):
    return (torch.randint(COUNT, (batch, 4), generator=torch.Generator().manual_seed(batch)),)

def rows(batch):
    return (torch.randn(batch, WIDE, generator=torch.Generator().manual_seed(batch)),)

def anonymous():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

model, inputs = {"items": (Items, ids), "layers": (Layers, rows)}[sys.argv[1]]
source, graph = captured(model(), inputs)
start = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
sites = find_sites(graph)
search = Search(graph, sites, calibration_of(source, None), budget(["max-error=1"]), sys.argv[2], lambda text: None)
found = search.run()
assert set(found.formats.values()) == {sys.argv[2]}, found.formats
graphs, _ = next(graphs_of(found, sites, graph, "cpu", Path(sys.argv[3])))
packed = pack_linears(graphs[""], cpp.target_isa(), found.formats, Path(sys.argv[3]))
print((peak - start) / max(site.bytes for site in sites))
"""


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("model", ["items", "layers"])
def test_converting_takes_a_fifth_of_the_weights_at_most(model: str, precision: str, tmp_path: Path) -> None:
    """From the search on, for an item table of 64 MB that is looked up too, and for a layer of as many."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, model, precision, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 0.2 + 0.25  # 16 MB: the calibration rows and their activations


@pytest.mark.parametrize("form", [None, "int8", "bf16"])
def test_what_is_packed_into_files_is_what_is_packed_into_memory(
    form: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grc.graph.rewrite.SMALL", 1000)
    source, graph = captured(Retriever(), retriever_inputs)
    formats = {site.name: form for site in find_sites(graph) if form is not None and site.kind != "table"}
    plain = dict(pack_linears(graph, cpp.target_isa(), formats).state_dict())
    filed = pack_linears(graph, cpp.target_isa(), formats, tmp_path)
    assert plain.keys() == filed.state_dict().keys() and not list(tmp_path.iterdir())
    for name, tensor in filed.state_dict().items():
        assert torch.equal(tensor, plain[name]) and tensor.dtype is plain[name].dtype
    assert filed.state_dict()["items_weight_packed"].untyped_storage().filename is not None
    torch.testing.assert_close(filed(*source.inputs(9))[0], graph(*source.inputs(9))[0], atol=0.1, rtol=0)
