"""C++ that Inductor generates: an index without a place is refused, wherever it fails, and the process lives on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grc
from grc.errors import LoweringError
from grc.lowering.failures import raising

MODELS = """\
import torch
from torch import nn

STEPS = 3000  # enough for Inductor to give them to several threads


class Hide(nn.Module):
    \"\"\"Hides the items that a user has seen.\"\"\"

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(4, 3000)

    def forward(self, x, ids):
        return self.scores(x).scatter(1, ids, -1e9)


class Gather(Hide):
    def forward(self, x, ids):
        return self.scores(x).gather(1, ids)


class Place(nn.Module):
    \"\"\"Reads a buffer at places that are computed.\"\"\"

    def __init__(self):
        super().__init__()
        self.register_buffer("popular", torch.rand(6001))

    def forward(self, x, ids):
        return x.sum(1, keepdim=True) * self.popular[2 * ids + 1]


class Count(nn.Module):
    \"\"\"Adds up by libtorch's scatter, whatever the number of threads.\"\"\"

    def forward(self, x, ids):
        ones = torch.ones_like(ids)
        return torch.zeros(ids.shape[0], 3000, dtype=torch.int64).scatter_add(1, ids, ones)


def inputs(batch):
    return torch.rand(batch, 4), torch.arange(batch * STEPS).view(batch, STEPS) % 3000
"""
ASK = """\
import sys, torch, grc, models
program, (x, ids) = grc.load(sys.argv[1]), models.inputs(3)
expected = program(x, ids)
for bad in (3000, -6001, 2**40):
    wrong = ids.clone()
    wrong[1, 2] = bad
    try:
        program(x, wrong)
        print("answered")
    except grc.errors.EngineError:
        print("refused")
    assert torch.equal(program(x, ids), expected)
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "engine"), [("Hide", "inductor"), ("Gather", "aoti"), ("Place", "inductor"), ("Count", "aoti")]
)
def test_an_index_without_a_place_is_refused(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    namespace: dict = {}
    exec(MODELS, namespace)
    torch.manual_seed(0)
    output = tmp_path / "a.grc"
    grc.compile(namespace[name]().eval(), namespace["inputs"], grc.Options(output=output, engine=engine, batches=(4,)))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    done = subprocess.run([sys.executable, "-c", ASK, str(output)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, ["refused"] * 3), done.stderr


REGION = """\
void kernel()
{
    #pragma omp parallel num_threads(2)
    {
        int tid = omp_get_thread_num();
        {
            #pragma omp for collapse(2)
            for(a)
            {
                for(b)
                {
                    AOTI_TORCH_CHECK(x, "index");
                }
            }
        }
    }
}
"""


def test_what_is_thrown_in_the_innermost_collapsed_loop_is_kept_and_thrown_again() -> None:
    text = "".join(raising(REGION).split())
    assert 'for(b){try{AOTI_TORCH_CHECK(x,"index");}catch(...){' in text
    assert text.endswith("}}}if(grc_thrown)std::rethrow_exception(grc_thrown);}}")
    assert raising(REGION.replace("AOTI_TORCH_CHECK", "other")) == REGION.replace("AOTI_TORCH_CHECK", "other")


def test_a_region_of_another_form_is_refused() -> None:
    with pytest.raises(LoweringError, match="of a form that grc does not know"):
        raising("#pragma omp parallel { AOTI_TORCH_CHECK(x); }\n")
