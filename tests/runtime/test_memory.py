"""Weights live once: loading an artifact adds no copy of its tables to the process, whichever engine reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grc

ROWS, DIM = 200_000, 64  # 51 MB

LOAD = """
import sys, torch
import grc.runtime.program as runtime
def anonymous():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) // 1024
program = runtime.load(sys.argv[1])
program(torch.zeros(2, 2, dtype=torch.int64))
del program
before = anonymous()
program = runtime.load(sys.argv[1])
program(torch.zeros(2, 2, dtype=torch.int64))
print(anonymous() - before)
"""


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS // 2, DIM)
        self.users = nn.Embedding(ROWS // 2, DIM)
        self.top = nn.Linear(2 * DIM, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(torch.cat([self.items(ids[:, 0]), self.users(ids[:, 1])], 1))


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_loading_copies_no_table(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "tables.grc"
    options = grc.Options(output=path, engine=engine, batches=(4,))
    grc.compile(Tables().eval(), lambda batch: (torch.zeros(batch, 2, dtype=torch.int64),), options)
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20, f"{done.stdout.strip()} MB of private memory for 51 MB of shared tables"
