"""Large models: memory stays near the model's own, and grc's passes take less time than torch's export before them."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import nn

from grc.compiler import optimise, traced
from grc.graph.model_file import from_module
from grc.options import Options
from grc.progress import Silent
from tests.graph.test_capture import Forward, ids, rows

PEAK = """
import resource
import torch
from torch import nn
from grc.compiler import optimise, traced
from grc.progress import Silent
from grc.graph.model_file import from_module
from grc.options import Options

class Model(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 16) for _ in range(8))

    def forward(self, x):
        return torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1).relu()

def peak(rows):
    inputs = lambda b: (torch.randint(0, rows, (b, 8), generator=torch.Generator().manual_seed(b)),)
    optimise(traced(from_module(Model(rows).eval(), inputs), Silent()), Options(), Silent())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = peak(10)
print((peak({rows}) - small) / ({rows} * 16 * 4 * 8))
"""


def test_peak_memory_is_at_most_half_above_the_models_own() -> None:
    """200 MB of tables: one more table at a time may exist twice while they move into the arena."""
    program = PEAK.replace("{rows}", "400_000")
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(shown.stdout) < 1.5


def test_passes_on_thousands_of_nodes_take_less_than_the_export() -> None:
    tables = nn.ModuleList(nn.Embedding(10 + i, 8) for i in range(150))
    towers = nn.ModuleList(nn.Linear(150 * 8, 8) for _ in range(40))

    def forward(self, x, dense):
        flat = torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1)
        found = []
        for tower in self.towers:
            h = torch.relu(tower(flat))
            for _ in range(8):
                h = (h.unsqueeze(1).squeeze(1) * 0.5 + dense.pow(2)).contiguous()
            found.append(h)
        t = torch.stack(found, 1)
        return torch.bmm(t, t.transpose(1, 2)).flatten(1).sum(1)

    model = Forward(forward, tables=tables, towers=towers).eval()
    start = time.process_time()
    source = traced(from_module(model, lambda b: (ids(b, 150), rows(b, 8))), Silent())
    exported = time.process_time()
    optimised = optimise(source, Options(), Silent())
    assert len(source.graph.graph.nodes) > 2000
    assert [r.rolled_back for r in optimised.records if r.rolled_back] == []
    assert time.process_time() - exported < exported - start
