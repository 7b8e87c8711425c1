"""Twenty ways to choose experts in one grid: both shipped models, text near, far, known, unseen, in another script.

    python -m benchmarks.field RUN_DIR --data DIR [--models NAME ...] [--samples 5] [--windows 4] [--parts none ...]

DIR holds wikitext2/, c4/, gutenberg/, gsm8k/ and benchmarks/ (see `benchmarks.methods`); the texts are those of
`benchmarks.thin`. Calibrates on WikiText2 and C4, 48 blocks of 512 tokens of each. Parts, each a run of `moecover
compare` in a folder of its own under RUN_DIR, which resumes: ``none`` (25, 50 and 75 % of the experts, all samples),
``ridge`` (the same, repaired, the first sample) and ``thin`` (about half of the bytes in two thirds of the
experts, three quarters as wide, the first sample). Prints one table a part: the gap in log perplexity to the full model
by group of texts, mean and standard deviation over samples, and the worst text. `-o` writes the same as JSON, the
source of the first part of docs/methods.md; `--costs` adds what every method's own part takes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.methods import sources
from benchmarks.processes import run
from benchmarks.thin import GROUPS, MODELS, own_made, third_party
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.comparison.run import compare
from moecover.planning.methods import METHODS as KNOWN

BLOCKS, LENGTH, RETAINS = 48, 512, (0.25, 0.5, 0.75)
PARTS = ("none", "ridge", "thin")
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "random", "label": "random"},
    {"method": "pooled", "saliency": "frequency", "label": "frequency"},
    {"method": "pooled", "saliency": "router-weight", "label": "soft counting"},
    {"method": "pooled", "saliency": "router-probability", "label": "Expert Drop (router probability)"},
    {"method": "pooled", "saliency": "ean", "label": "EAN"},
    {"method": "pooled", "saliency": "ean-mean", "label": "MAN"},
    {"method": "pooled", "saliency": "msan", "label": "MSAN"},
    {"method": "pooled", "saliency": "reap", "label": "REAP"},
    {"method": "pooled", "saliency": "reap-raw", "label": "REAP (raw weights)"},
    {"method": "pooled", "saliency": "easy-ep", "label": "EASY-EP"},
    {"method": "hope", "label": "HOPE"},
    {"method": "aimer", "label": "AIMER"},
    {"method": "mone", "label": "MoNE's score"},
    {"method": "c-prune", "label": "C-Prune, in layers"},
    {"method": "expert-sparsity", "label": "ExpertSparsity, greedy"},
    {"method": "hc-smoe", "label": "HC-SMoE's centres"},
    {"method": "pooled", "saliency": "contribution", "label": "contribution, pooled"},
    {"method": "tb-coverage", "saliency": "reap", "label": "TB-Coverage (reap)"},
    {"method": "tb-coverage", "saliency": "easy-ep", "label": "TB-Coverage (easy-ep)"},
    {"method": "tb-coverage", "saliency": "contribution", "label": "TB-Coverage"},
)


def texts(data: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Calibration corpora and held-out texts as `compare` takes them; files that are made here lie in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    calibrations, held_out = sources(data, folder)
    files = {**held_out, **third_party(data, folder), **own_made(folder)}
    asked = [name for group in GROUPS.values() for name in group]
    named = [name if files[name] is None else f"{name}={files[name]}" for name in asked]
    return [f"{name}={path}" for name, path in calibrations["wikitext2+c4"].items()], named


def thinner(model: str) -> int:
    """Channels of about three quarters of the width: a multiple of 8, as the library's matrix product wants."""
    structure = read_structure(shipped_model(model))
    assert not isinstance(structure.width, str)
    return structure.width.channels * 3 // 32 * 8


def budget(part: str, model: str) -> dict[str, Any]:
    """The budgets of a part."""
    structure = read_structure(shipped_model(model))
    experts = structure.topology.num_experts
    if part == "thin":
        return {"shapes": [f"{round(experts * 2 / 3)}x{thinner(model)}"]}
    return {"retain": [*RETAINS]}


def config(part: str, model: str, args: argparse.Namespace, named: tuple[list[str], list[str]]) -> dict[str, Any]:
    """The configuration of a part for a model."""
    return {
        "models": [f"shipped:{model}"],
        "calibration": [named[0]],
        "samples": list(range(args.samples)) if part == "none" else [0],
        "sequences": BLOCKS,
        "length": LENGTH,
        "search_tokens": 8192,
        "methods": [dict(one) for one in METHODS],
        "seeds": list(range(args.samples)) if part == "none" else [0],
        "repairs": ["ridge" if part == "ridge" else "none"],
        "repair_tokens": 16_384,
        "perplexity": named[1],
        "window": LENGTH,
        "windows": args.windows,
        "dtype": "float32",
        "batch_size": 8,
        **budget(part, model),
    }


Gaps = dict[str, list[float]]  # by text, one number for every sample or seed


def gaps(folder: Path) -> dict[tuple[str, float], Gaps]:
    """The gaps in log perplexity to the full model, in nats, by label and share of the bytes or experts."""
    import pandas

    table = pandas.read_csv(folder / "results.csv")
    table = table[table["metric"] == "perplexity"].assign(loss=lambda t: t["value"].map(math.log))
    full = table[table["method"] == "full"].set_index("name")["loss"]
    cut = table[table["method"] != "full"]
    cut = cut.assign(gap=cut["loss"] - cut["name"].map(full))
    found = cut.groupby(["label", "keep", "name"], sort=False)["gap"].apply(list)
    made: dict[tuple[str, float], Gaps] = {}
    for (label, keep, name), values in found.items():
        made.setdefault((label, int(keep)), {})[name] = values
    return made


def of_group(of_texts: Gaps, names: Sequence[str]) -> list[float]:
    """The mean gap over some texts, one number for every sample or seed."""
    return [statistics.fmean(values) for values in zip(*(of_texts[name] for name in names), strict=True)]


def table(found: dict[tuple[str, float], Gaps]) -> str:
    """A row for every method and budget."""
    lines = [
        f"| method | experts | {' | '.join(GROUPS)} | worst text | samples |",
        "|---|---:" + "|---:" * len(GROUPS) + "|---|---:|",
    ]
    for (label, keep), of_texts in found.items():
        cells = []
        for names in GROUPS.values():
            values = of_group(of_texts, names)
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        worst = max(of_texts, key=lambda name: statistics.fmean(of_texts[name]))
        number = len(of_texts[worst])
        lines.append(
            f"| {label} | {keep} | {' | '.join(cells)} | {worst} {statistics.fmean(of_texts[worst]):.2f} | {number} |"
        )
    return "\n".join(lines)


def costs(model: str, folder: Path, data: tuple[list[str], list[str]]) -> dict[str, dict[str, float]]:
    """Of every selection method, seconds and peak memory (MB) of `moecover plan` for half of the experts."""
    source = f"shipped:{model}"
    text = [word for one in data[0] for word in ("--corpus", one)]
    sizes = ["--sequences", str(BLOCKS), "--length", str(LENGTH), "--dtype", "float32", "--keep-inputs", "8192"]
    profile = folder / "profile"
    run(["profile", source, *text, *sizes, "-o", str(profile), "--overwrite"], 1)
    found = {}
    for method in dict.fromkeys(one["method"] for one in METHODS):
        live = [] if KNOWN[method].from_profile else ["--model", source]
        asked = ["--method", method, *live, "--retain", "0.5", "-o", str(folder / "plan.json")]
        took, peak = run(["plan", str(profile), *asked], 1)
        found[method] = {"seconds": round(took, 2), "megabytes": round(peak / 1e6)}
        print(f"{model}, {method}: {took:.1f} s, {peak / 1e6:,.0f} MB", flush=True)
    return found


def main() -> None:
    """Run the parts, print their tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--costs", action="store_true", help="time and memory of every method's own part, too")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.costs and not args.output:
        parser.error("--costs goes with -o")
    named, parts = texts(args.data, args.run / "texts"), dict[str, Any]()
    for part in args.parts:
        for model in args.models:
            file = args.run / f"{model}-{part}.yaml"
            file.write_text(yaml.safe_dump(config(part, model, args, named), sort_keys=False))
            made = compare(file, args.run / f"{model}-{part}")
            if made.failures:
                raise SystemExit("\n".join(f"{cell}: {why}" for cell, why in made.failures.items()))
            found = gaps(args.run / f"{model}-{part}")
            print(f"### {model}, {part}\n\n{table(found)}\n", flush=True)
            parts[f"{model}-{part}"] = [
                {"label": label, "keep": keep, "gaps": of_texts} for (label, keep), of_texts in found.items()
            ]
    if args.output:
        took: dict[str, Any] = {model: costs(model, args.run, named) for model in args.models} if args.costs else {}
        record = {
            "costs": took,
            "windows": args.windows,
            "length": LENGTH,
            "blocks": BLOCKS,
            "groups": GROUPS,
            "thin": {model: thinner(model) for model in args.models},
            "parts": parts,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
