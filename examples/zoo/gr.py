"""A generative recommender in the manner of OneRec (Deng et al. 2025) and of HSTU's setting (Zhai et al. 2024):
a user's last steps, already turned into features, go through a Transformer that feeds one head per task.

in   steps           [B, S, 1024] float32   (S = 10; 128 at size "long")
out  recommendation  [B, 10000] float32     scores over the catalogue
     engagement      [B] float32            probability
     retention       [B] float32            probability
     monetization    [B] float32            probability
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

SIZES = {
    "full": {"steps": 10, "features": 1024, "width": 512, "heads": 8, "ffn": 2048, "layers": 6, "items": 10_000},
    "long": {"steps": 128, "features": 1024, "width": 512, "heads": 8, "ffn": 2048, "layers": 6, "items": 10_000},
    "small": {"steps": 10, "features": 96, "width": 64, "heads": 4, "ffn": 128, "layers": 2, "items": 500},
}
input_names = ["steps"]


class GenerativeRecommender(nn.Module):
    def __init__(self, features: int, width: int, heads: int, ffn: int, layers: int, items: int):
        super().__init__()
        self.project = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=ffn, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.recommendation = nn.Linear(width, items)
        self.engagement = nn.Linear(width, 1)
        self.retention = nn.Linear(width, 1)
        self.monetization = nn.Linear(width, 1)

    def forward(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        user = self.encoder(self.project(steps)).mean(dim=1)
        return (
            self.recommendation(user),
            torch.sigmoid(self.engagement(user)).squeeze(-1),
            torch.sigmoid(self.retention(user)).squeeze(-1),
            torch.sigmoid(self.monetization(user)).squeeze(-1),
        )


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    sizes = dict(_sizes(size))
    sizes.pop("steps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GenerativeRecommender(**sizes)
        # TransformerEncoder copies one layer, so without this all layers would hold the same weights.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif "norm" in name and name.endswith("weight"):
                nn.init.normal_(parameter, mean=1.0, std=0.1)
            else:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def get_inputs(batch: int, seed: int = 0, ids: str = "uniform", size: str | None = None) -> tuple[Tensor]:
    """Steps of `batch` users. The model reads no ids, so `ids` changes nothing here."""
    sizes = _sizes(size)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, sizes["steps"], sizes["features"], generator=generator),)


def _sizes(size: str | None) -> dict[str, int]:
    name = size or os.environ.get("GRC_ZOO_SIZE", "full")
    if name not in SIZES:
        raise ValueError(f"gr has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
