"""How well artifacts rank beside the model they were compiled from: HR@10 and NDCG@10 of the test users, and bytes.

python examples/movielens/evaluate.py build/movielens.grc build/movielens-int8.grc
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import grc

sys.path.append(str(Path(__file__).resolve().parent.parent))

from movielens import data, model
from movielens.corpus import Corpus, Index
from movielens.train import rank

METRICS = ("hr@10", "ndcg@10")


def compared(path: Path, own: dict[str, float], corpus: Corpus, examples: Index) -> dict[str, float]:
    """HR@10 and NDCG@10 of an artifact, the share that it gains or loses of the model's `own`, and the bytes of its weights."""
    found = rank(grc.load(path), corpus, examples)
    return {
        **{name: found[name] for name in METRICS},
        **{f"change of {name}": found[name] / own[name] - 1 for name in METRICS},
        "bytes": (path / "weights.safetensors").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--size", choices=["small", "seed"], default="small")
    parser.add_argument("--data", help="folder with MovieLens-100K; fetched if not given")
    options = parser.parse_args()
    os.environ["GRC_MOVIELENS_SIZE"] = options.size
    corpus = Corpus(data.load(data.locate(options.data)))
    own = rank(model.get_model(), corpus, corpus.test)
    print(f"{'':28}HR@10   NDCG@10   weights")
    print(f"{'the model':28}{own['hr@10']:.4f}  {own['ndcg@10']:.4f}")
    for path in options.artifacts:
        found = compared(path, own, corpus, corpus.test)
        print(
            f"{path.name:28}{found['hr@10']:.4f}  {found['ndcg@10']:.4f}   {found['bytes'] / 1e6:.1f} MB   "
            f"{found['change of hr@10']:+.2%} and {found['change of ndcg@10']:+.2%}"
        )


if __name__ == "__main__":
    main()
