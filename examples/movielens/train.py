"""Train the recommender on MovieLens-100K, and measure it beside the most popular films.

    python examples/movielens/train.py --size small
    python examples/movielens/train.py --size seed --device cuda

Writes config.json, vocabulary.json, requests.json, targets.json and model.safetensors to .data/checkpoint-SIZE, which
model.py reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder

from movielens import data
from movielens.corpus import TASKS, Corpus, Index, Labels
from movielens.model import CHECKPOINTS, SIZES, Recommender


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train.

    `ahead` is how many of the films that follow a window are its targets. Half of all ratings share their second with
    the one before, so the order of neighbours is mostly chance: one window may learn several of them at the cost of
    one. An epoch is therefore a random one in `ahead` of the windows.
    """

    epochs: int
    ahead: int
    batch: int
    rate: float
    dropout: float
    decay: float
    task_weight: float = 0.1


RECIPES = {
    "small": Recipe(epochs=5, ahead=3, batch=256, rate=2e-3, dropout=0.2, decay=0.1),
    "seed": Recipe(epochs=6, ahead=3, batch=256, rate=5e-4, dropout=0.3, decay=0.1),
}


def train(
    corpus: Corpus, size: dict[str, int], recipe: Recipe, seed: int = 0, quiet: bool = False, device: str = "cpu"
) -> Recommender:
    """Learn the films that follow a window, and the tasks beside them, from the training part alone."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    model = Recommender(films=len(corpus.vocabulary.films), dropout=recipe.dropout, **size).to(device).train()
    optimizer = torch.optim.AdamW(_groups(model, recipe.decay), lr=recipe.rate)
    examples_per_epoch = max(1, len(corpus.train) // recipe.ahead)
    batches = -(-examples_per_epoch // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * batches, pct_start=0.1
    )
    for epoch in range(recipe.epochs):
        total = 0.0
        for examples in np.array_split(order.permutation(corpus.train)[:examples_per_epoch], batches):
            optimizer.zero_grad(set_to_none=True)
            outputs = model(torch.from_numpy(corpus.inputs(examples)).to(device))
            cost = loss(outputs, corpus.labels(examples, recipe.ahead), recipe.task_weight)
            cost.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += cost.item()
        if not quiet:
            hit = rank(model, corpus, corpus.validation)["hr@10"]
            print(f"epoch {epoch + 1}: loss {total / batches:.3f}, validation HR@10 {hit:.4f}", file=sys.stderr)
    return model.cpu().eval()


Model = Recommender | Callable[[Tensor], dict[str, Tensor]]
"""The module, or an artifact of it."""


def loss(outputs: dict[str, Tensor], labels: Labels, task_weight: float) -> Tensor:
    """Cross-entropy over all films, plus `task_weight` times the tasks' own over the labels that are known."""
    device = outputs["recommendation"].device
    targets = torch.from_numpy(labels.films).to(device)
    real = (targets >= 0).float()
    likelihood = F.log_softmax(outputs["recommendation"], dim=1).gather(1, targets.clamp(min=0))
    cost = -((likelihood * real).sum(dim=1) / real.sum(dim=1)).mean()
    tasks = torch.from_numpy(labels.tasks).to(device)
    for column, name in enumerate(TASKS):
        known = tasks[:, column] >= 0
        if known.any():
            cost = cost + task_weight * F.binary_cross_entropy(outputs[name][known], tasks[known, column])
    return cost


def rank(model: Model | None, corpus: Corpus, examples: Index) -> dict[str, float]:
    """HR@10 and NDCG@10 among all films the user has not rated before; of the most popular films if `model` is None.

    With a model also the area under the ROC curve of engagement and monetization. Not of retention: nothing follows a
    user's last rating, so leave-one-out can't measure it.
    """
    outputs = predict(model, corpus, examples) if model else {}
    places = []
    for row, example in enumerate(examples.tolist()):
        scores = (outputs["recommendation"][row] if model else corpus.popularity).astype(np.float64)
        scores[corpus.seen(example)] = -np.inf
        # A film as good as the target counts as better: constant scores must not look like skill.
        places.append(np.count_nonzero(scores >= scores[corpus.film[example]]) - 1)
    place = np.array(places)
    hits = place < 10
    figures = {"hr@10": float(hits.mean()), "ndcg@10": float((hits / np.log2(place + 2)).mean())}
    for name in ("engagement", "monetization") if model else ():
        figures[f"{name}_auc"] = area(outputs[name], corpus.labels(examples).tasks[:, TASKS.index(name)])
    return figures


def predict(model: Model, corpus: Corpus, examples: Index) -> dict[str, NDArray[np.float32]]:
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(corpus.inputs(some)).to(device))
            for some in np.array_split(examples, -(-len(examples) // 512))
        ]
    if isinstance(model, nn.Module):
        model.train(training)
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def area(scores: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, a tie being half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None] - negative[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def save(model: Recommender, corpus: Corpus, size: dict[str, int], facts: dict[str, Any], folder: Path) -> None:
    """Write what model.py and the serving features read. config.json comes last: with it the checkpoint is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    corpus.vocabulary.write(folder / "vocabulary.json")
    examples = np.random.default_rng(0).permutation(corpus.validation)
    requests = [asdict(corpus.request(example)) for example in examples.tolist()]
    (folder / "requests.json").write_text(json.dumps(requests))
    (folder / "targets.json").write_text(json.dumps(corpus.film[examples].tolist()))
    config = {"model": {"films": len(corpus.vocabulary.films), **size}, **facts}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: norms and biases have no scale to hold down."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the recommender on MovieLens-100K.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--data", help="folder with MovieLens-100K; fetched if not given")
    parser.add_argument("--output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--epochs", type=int, help="instead of the size's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    try:
        corpus = Corpus(data.load(data.locate(options.data)))
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    recipe = RECIPES[options.size]
    if options.epochs:
        recipe = Recipe(**{**asdict(recipe), "epochs": options.epochs})
    begun = time.perf_counter()
    model = train(corpus, SIZES[options.size], recipe, options.seed, device=options.device)
    seconds = round(time.perf_counter() - begun, 1)
    figures = {
        "size": options.size,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "test": rank(model, corpus, corpus.test),
        "popularity": rank(None, corpus, corpus.test),
    }
    folder = options.output or CHECKPOINTS / f"checkpoint-{options.size}"
    save(model, corpus, SIZES[options.size], {"recipe": asdict(recipe), "figures": figures}, folder)
    if options.json:
        print(json.dumps(figures))
    else:
        print(f"{'':12}HR@10   NDCG@10   ({len(corpus.test)} users, {len(corpus.vocabulary.films)} films)")
        for name in ("test", "popularity"):
            row: dict[str, float] = figures[name]  # type: ignore[assignment]
            print(f"{'model' if name == 'test' else name:12}{row['hr@10']:.4f}  {row['ndcg@10']:.4f}")
        print(f"trained in {seconds} s; checkpoint in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
