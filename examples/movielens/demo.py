"""From a user's behaviours to ten films: train (once), compile, load the artifact, answer, and compare with the model.

python examples/movielens/demo.py --size small
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import grc

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
CALLS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["small", "seed"], default="small")
    parser.add_argument("--artifact", type=Path, default=Path("build/movielens.grc"))
    parser.add_argument("--data", type=Path, help="folder of ml-100k.inter, .user and .item")
    options = parser.parse_args()
    os.environ["GRC_MOVIELENS_SIZE"] = options.size
    console = Console()
    train(options.size, options.data)
    step(console, "Compile")
    run(sys.executable, "-m", "grc", "compile", HERE / "model.py", "-o", options.artifact, "--force")
    answer(console, options.artifact)


def step(console: Console, title: str) -> None:
    console.rule(f"[bold]{title}", align="left")


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command])
    if done.returncode != 0:
        sys.exit(done.returncode)


def train(size: str, data: Path | None) -> None:
    """Train the model and print how well it ranks, unless a checkpoint of this size is there."""
    if (HERE / ".data" / f"checkpoint-{size}" / "config.json").is_file():
        print(f"the checkpoint of size {size} is there; delete {HERE / '.data'} to train it again")
        return
    run(sys.executable, HERE / "train.py", "--size", size, *(["--data", data] if data else []))


def answer(console: Console, artifact: Path) -> None:
    """Ask the artifact and the model the same thing, show the films, and fail unless they agree."""
    from movielens import model as model_file
    from movielens.schema import Request

    program = grc.load(artifact)
    model = model_file.get_model()
    request = json.loads((model_file.checkpoint() / "requests.json").read_text())[0]
    folder = model_file.checkpoint()
    inputs = model_file.preprocess(request, assets=folder)
    with torch.no_grad():
        expected = model_file.postprocess(model(*inputs), request, assets=folder)
    found = program.recommend(request)

    step(console, "A user's behaviours, newest last")
    titles = {film["id"]: film["title"] for film in model_file.vocabulary(folder).films}
    for behaviour in Request.from_json(request).behaviours[-10:]:
        console.print(f"  {titles.get(behaviour.item, behaviour.item):<50} {describe(behaviour)}")
    step(console, "Recommended")
    table = Table(box=None, pad_edge=True)
    for name in ("", "film", "score", "the model's own"):
        table.add_column(name, justify="right" if name in ("score", "the model's own") else "left")
    for rank, (film, own) in enumerate(zip(found["films"], expected["films"], strict=True), 1):
        table.add_row(str(rank), film["title"], f"{film['score']:.4f}", f"{own['score']:.4f}")
    console.print(table)
    console.print(
        "  " + "   ".join(f"{name} {found[name]:.3f}" for name in ("engagement", "retention", "monetization"))
    )
    step(console, "The same answer, sooner")
    with torch.no_grad():
        ours, eager = interleaved(lambda: program(*inputs), lambda: model(*inputs))
    engine = program.engine_at(1)
    console.print(f"  engine {engine}: {ours:.0f} us a request, eager PyTorch {eager:.0f} us: {eager / ours:.1f}x")
    same = [f["item"] for f in found["films"]] == [f["item"] for f in expected["films"]]
    console.print(f"  the ten films of the artifact and of the model are {'the same' if same else 'NOT the same'}")
    if not same:
        sys.exit(1)


def describe(behaviour: Any) -> str:
    return f"{behaviour.interaction:<8} watched {behaviour.watched:.0%}"


def interleaved(ours: Callable[[], object], eager: Callable[[], object]) -> tuple[float, float]:
    """Medians in microseconds of two calls that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(CALLS + 10):
        for call, kept in zip((ours, eager), times, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 10:
                kept.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
