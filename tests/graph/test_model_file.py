"""Model files: what they import from beside them."""

from __future__ import annotations

from pathlib import Path

from grc.graph.model_file import load_model

MODEL = """
import torch
from features import WIDTH
from parts.heads import OUTPUTS


def get_model():
    return torch.nn.Linear(WIDTH, OUTPUTS).eval()


def get_inputs(batch):
    return (torch.ones(batch, WIDTH),)
"""


def test_files_of_the_same_names_beside_two_model_files_are_not_mixed_up(tmp_path: Path) -> None:
    for width in (3, 5):
        folder = tmp_path / str(width)
        (folder / "parts").mkdir(parents=True)
        (folder / "model.py").write_text(MODEL)
        (folder / "features.py").write_text(f"WIDTH = {width}\n")
        (folder / "parts" / "__init__.py").write_text("")
        (folder / "parts" / "heads.py").write_text(f"OUTPUTS = {2 * width}\n")
    for width in (3, 5, 3):
        module = load_model(str(tmp_path / str(width) / "model.py")).module
        assert (module.in_features, module.out_features) == (width, 2 * width)
