"""How specialised a model's routers are: the table of the model card.

Reads a model and a folder of corpora (see train_tiny.py), profiles held-out text of several domains, and prints per
layer: the share of routed tokens that goes to the busiest quarter of the experts on each domain, and how much these
quarters overlap between domains (Jaccard index; about 1/7 for two random quarters).

    python training/specialisation.py MODEL --data DIR
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

import moecover


def main() -> None:
    """Profile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/ and c4/")
    args = parser.parse_args()
    structure = moecover.read_structure(args.model)
    paths = {
        "wikitext2": args.data / "wikitext2" / "test.txt",
        "c4": args.data / "c4" / "validation.jsonl",
        "python": None,
    }
    corpora = [
        moecover.load_corpus(name if path else "python-heldout", path, structure=structure, sequences=200, length=256)
        for name, path in paths.items()
    ]
    profile = moecover.profile(structure, corpora, batch_size=16)
    names = [corpus.name for corpus in corpora]
    quarter = structure.topology.num_experts // 4
    pairs = list(itertools.combinations(names, 2))
    print("| layer | " + " | ".join(names) + " | " + " | ".join(f"{a} & {b}" for a, b in pairs) + " |")
    print("|---|" + "---:|" * (len(names) + len(pairs)))
    for layer in range(len(structure.topology.decoder_layers)):
        counts = {name: profile.statistics[name]["count"][layer] for name in names}
        busiest = {name: set(np.argsort(-c, kind="stable")[:quarter].tolist()) for name, c in counts.items()}
        shares = [f"{counts[n][list(busiest[n])].sum() / counts[n].sum():.0%}" for n in names]
        overlaps = [f"{len(busiest[a] & busiest[b]) / len(busiest[a] | busiest[b]):.2f}" for a, b in pairs]
        print(f"| {layer} | " + " | ".join(shares + overlaps) + " |")


if __name__ == "__main__":
    main()
