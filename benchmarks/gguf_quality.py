"""Quality against file size: GGUF files, each in several block types, on the same held-out text.

    python -m benchmarks.gguf_quality LABEL=F32.gguf ... --data DIR [--types F16 Q8_0 Q5_0 Q4_0] [--windows 16]

The files are one model's in F32: itself, and what `prune` or `shrink` left of it. Each is stored in every type
(matrices whose rows are whole blocks; norms and routers stay F32) by the package `gguf`, run in llama.cpp, and measured
on the texts of `benchmarks.thin`. Prints a row for every file, the largest first: bytes, perplexity by group of texts,
and the worst text by its perplexity over that of the first file. DIR is as in `benchmarks.thin`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import gguf
import numpy as np

from benchmarks.methods import sources
from benchmarks.thin import GROUPS, own_made, third_party
from moecover.evaluation.job import evaluate
from moecover.gguf.header import Header, read_header
from moecover.gguf.types import BLOCK_TYPES, BlockType
from moecover.gguf.writing import head_bytes, padding

LENGTH = 512
KEPT = ("ffn_gate_inp", "norm", "exp_probs_b", "bias")  # parts of names of what stays as it is
NUMBERS = {kind.name: kind for kind in BLOCK_TYPES.values()}


def stored_as(name: str, shape: tuple[int, ...], kind: BlockType) -> bool:
    """Whether a tensor is stored in a type."""
    return len(shape) > 1 and shape[-1] % kind.block == 0 and not any(part in name for part in KEPT)


def in_type(source: Path, output: Path, name: str) -> Path:
    """Write a file of one part in another block type."""
    header: Header = read_header(source)
    kind, f32 = NUMBERS[name], NUMBERS["F32"]
    rows, data = [], []
    with source.open("rb") as file:
        for info in header.tensors.values():
            file.seek(info.start)
            values = np.frombuffer(file.read(info.end - info.start), dtype="<f4").reshape(info.shape)
            chosen = kind if stored_as(info.name, info.shape, kind) else f32
            raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[chosen.name]).tobytes()
            rows.append((info.name, chosen.name, info.shape, len(raw)))
            data.append(raw + bytes(padding(len(raw), header.alignment)))
    with output.open("wb") as file:
        file.write(head_bytes(header, rows, numbers={}, added={}))
        for raw in data:
            file.write(raw)
    return output


def main() -> None:
    """Store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="LABEL=F32.gguf", help="the model itself first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0", "Q5_0", "Q4_0"])
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
                file = in_type(Path(path), folder / f"{number}-{kind}.gguf", kind)
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
