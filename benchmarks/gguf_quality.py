"""Quality against file size: GGUF files, each in several quantisations, on the same held-out text.

    python -m benchmarks.gguf_quality LABEL=F32.gguf ... --data DIR [--types F16 Q8_0 Q6_K Q4_K_M] [--windows 16]

The files are one model's in F32: itself, and what `prune` or `shrink` left of it. Each is stored in every type as
llama-quantize does it (`benchmarks.gguf_types`), run in llama.cpp, and measured on the texts of `benchmarks.thin`.
Prints a row for every file, the largest first: bytes, perplexity by group of texts, and the worst text by its
perplexity over that of the first file. DIR is as in `benchmarks.thin`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from benchmarks.gguf_types import quantise
from benchmarks.methods import sources
from benchmarks.thin import GROUPS, own_made, third_party
from moecover.evaluation.job import evaluate

LENGTH = 512


def main() -> None:
    """Store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="LABEL=F32.gguf", help="the model itself first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0", "Q6_K", "Q4_K_M"])
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, held_out = sources(args.data, folder)
        places = {**held_out, **third_party(args.data, folder), **own_made(folder)}
        texts = {text: places[text] for group in GROUPS.values() for text in group}
        made = dict[str, tuple[str, str, Path]]()
        for number, one in enumerate(args.files):
            label, _, path = one.partition("=")
            for kind in args.types:
                file = quantise(Path(path), folder / f"{number}-{kind}.gguf", kind)
                made[file.stem] = (label, kind, file)
        first, *others = [file for _, _, file in made.values()]
        found = evaluate(
            first, files=others, texts=texts, windows=args.windows, length=LENGTH, output=folder / "out", progress=False
        )
        rows = dict(zip(made, found.rows, strict=True))
        print(
            f"| model | type | MB | {' | '.join(GROUPS)} | worst text |\n|---|---|---:|"
            + "---:|" * len(GROUPS)
            + "---|"
        )
        base = rows[next(iter(made))].perplexity
        for stem in sorted(made, key=lambda stem: -made[stem][2].stat().st_size):
            label, kind, file = made[stem]
            measured = rows[stem].perplexity
            cells = [
                f"{math.exp(statistics.fmean(math.log(measured[text].perplexity) for text in group)):.2f}"
                for group in GROUPS.values()
            ]
            ratio = {text: one.perplexity / base[text].perplexity for text, one in measured.items()}
            worst = max(ratio, key=lambda text: ratio[text])
            size = file.stat().st_size / 1e6
            print(f"| {label} | {kind} | {size:.2f} | {' | '.join(cells)} | {worst} x {ratio[worst]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
