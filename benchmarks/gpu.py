"""What a GPU does: the same numbers as the CPU, how often the same bits, how fast, in how much memory.

    python -m benchmarks.gpu OUT [--device cuda] [--parts NAME ...] [--models NAME ...]
        [--layers N] [--scratch DIR]
    python -m benchmarks.gpu OUT --device cpu --small       in a minute, so that it keeps running

Needs no network and no file but the project's: the shipped models are compared with the CPU (`gpu_checks`), and a
random model in the shape of Qwen1.5-MoE-A2.7B (28.6 GB, made in DIR; --small: a shipped model) is timed. Every time is
taken when the device has finished, and stands as a ratio to a plain forward pass of the same run where there is one.
Writes OUT/gpu.json after every part, and prints it as a table. Exit status 1: a part failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.full_size import make
from benchmarks.gpu_checks import Figures, against_cpu
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.batches import batches
from moecover.corpora.generation import write_generated
from moecover.corpora.packing import Corpus, make_corpus
from moecover.evaluation.run import evaluate
from moecover.files.atomic import write_text
from moecover.planning.artifact import Plan
from moecover.planning.run import plan_budgets
from moecover.profiling.run import profile
from moecover.repairing.layers import repair_layers
from moecover.runtime.cost import cost
from moecover.runtime.devices import check_device, kind_of, name_of, peak_memory, release
from moecover.runtime.loading import backbone_of, load_model
from moecover.runtime.streaming import streamed
from moecover.version import VERSION

MODELS = ("qwen2-moe-tiny", "deepseek-moe-tiny")
SHAPE = "qwen1.5-moe-a2.7b"
ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        checked: blocks of every calibration corpus in the checks, and tokens of a block.
        rows: blocks of random tokens that are profiled, and tokens of a block.
        batch: blocks in a batch.
        searched: blocks that searches and repairs run on.
        written: sequences that the model writes.
    """

    checked: tuple[int, int]
    rows: tuple[int, int]
    batch: int
    searched: int
    written: int


FULL = Size(checked=(32, 512), rows=(64, 2048), batch=4, searched=4, written=64)
SMALL = Size(checked=(1, 32), rows=(2, 32), batch=1, searched=1, written=1)


class Bench:
    """The timed model.

    Args:
        structure: its checkpoint.
        device: torch device by name.
        size: how much is run.
    """

    def __init__(self, structure: Structure, device: str, size: Size) -> None:
        self.structure, self.device, self.size = structure, device, size
        chance = np.random.default_rng(0)
        tokens = chance.integers(0, structure.checkpoint.config["vocab_size"], size=size.rows)
        self.texts = [self._corpus(n, t) for n, t in zip("ab", np.array_split(tokens, 2), strict=True)]
        self.sample = [self._corpus(one.name, one.tokens[: size.searched]) for one in self.texts]

    @staticmethod
    def _corpus(name: str, tokens: Any) -> Corpus:
        return make_corpus(name, tokens, np.ones_like(tokens, dtype=bool), {})

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The model in memory."""
        return load_model(self.structure, device=self.device)

    @functools.cached_property
    def plan(self) -> Plan:
        """A plan that keeps half of the experts."""
        made = profile(self.structure, self.sample, model=self.model, batch_size=self.size.batch)
        return plan_budgets(made, method="tb-coverage", keeps=[self.structure.topology.num_experts // 2])[0]

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of a call, until the device has finished."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the device."""
        module = getattr(torch, kind_of(self.device))
        if hasattr(module, "synchronize"):
            module.synchronize()

    def forget_peak(self) -> None:
        """Count the device's memory anew."""
        release(self.device)
        module = getattr(torch, kind_of(self.device))
        if hasattr(module, "reset_peak_memory_stats"):
            module.reset_peak_memory_stats()

    def tokens(self, corpora: list[Corpus]) -> int:
        """Number of tokens."""
        return sum(one.num_tokens for one in corpora)

    def forward(self) -> None:
        """A plain forward pass over the text, without the head."""
        with torch.inference_mode():
            for one in (batch for corpus in self.texts for batch in batches(corpus, self.size.batch)):
                backbone_of(self.model)(**{k: v.to(self.device) for k, v in one.items()}, use_cache=False)


def loading(bench: Bench) -> Figures:
    """How long loading takes, and in how much memory."""
    bench.forget_peak()
    seconds = bench.seconds(lambda: bench.model)
    size = bench.structure.checkpoint.num_bytes
    return {"seconds": seconds, "GB a second": size / 1e9 / seconds, "memory over the weights": _over(bench, size)}


def _over(bench: Bench, expected: float) -> float | None:
    peak = peak_memory(torch.device(bench.device))
    return None if peak is None else peak / expected


def profiling(bench: Bench) -> Figures:
    """The profile over the plain pass, in turns; peak memory over the estimate."""
    text = {"tokens": bench.tokens(bench.texts), "batch_tokens": bench.size.batch * bench.size.rows[1]}
    bench.forget_peak()
    given = {"model": bench.model, "batch_size": bench.size.batch}
    turns = [
        (bench.seconds(bench.forward), bench.seconds(lambda: profile(bench.structure, bench.texts, **given)))
        for _ in range(ROUNDS + 1)
    ][1:]
    plain, profiled = (statistics.median(column) for column in zip(*turns, strict=True))
    expected = cost(bench.structure, **text, limit=10**15).whole
    return {
        "plain, tokens a second": text["tokens"] / plain,
        "profile over plain": profiled / plain,
        "profile over plain, best and worst round": [f(b / a for a, b in turns) for f in (min, max)],
        "peak memory over the estimate": _over(bench, expected),
    }


def layer_by_layer(bench: Bench) -> Figures:
    """The profile layer by layer over the one in memory, the reading of the checkpoint included."""
    given = {"batch_size": bench.size.batch}
    resident = bench.seconds(lambda: profile(bench.structure, bench.texts, model=bench.model, **given))
    del bench.model
    bench.forget_peak()

    def streaming() -> None:
        with streamed(bench.structure, device=bench.device) as stream:
            profile(bench.structure, bench.texts, model=stream, **given)

    seconds = bench.seconds(streaming)
    text = {"tokens": bench.tokens(bench.texts), "batch_tokens": bench.size.batch * bench.size.rows[1]}
    expected = cost(bench.structure, **text, limit=1).streamed
    return {
        "seconds": seconds,
        "over the profile in memory": seconds / resident,
        "GB a second": bench.structure.checkpoint.num_bytes / 1e9 / seconds,
        "peak memory over the estimate": _over(bench, expected),
    }


def evaluation(bench: Bench) -> Figures:
    """Perplexity of the model and of a plan."""
    given = {"model": bench.model, "texts": bench.texts, "batch_size": bench.size.batch}
    plain = bench.seconds(bench.forward)
    seconds = bench.seconds(lambda: evaluate(bench.structure, {"half": bench.plan}, **given))
    return {
        "tokens a second, model and plan": 2 * bench.tokens(bench.texts) / seconds,
        "over two plain passes": seconds / 2 / plain,
    }


def generation(bench: Bench) -> Figures:
    """Text that the model writes."""
    length = min(256, bench.size.rows[1])
    with tempfile.TemporaryDirectory() as folder:
        seconds = bench.seconds(
            lambda: write_generated(
                bench.structure,
                bench.model,
                Path(folder) / "text.jsonl",
                sequences=bench.size.written,
                length=length,
                seed=0,
                batch_size=bench.size.written,
            )
        )
    return {"tokens a second": bench.size.written * length / seconds}


def searches(bench: Bench) -> Figures:
    """Search and elimination for half of the experts."""
    made = profile(bench.structure, bench.sample, model=bench.model, batch_size=bench.size.batch)
    layers, found = len(bench.structure.topology.decoder_layers), {}
    for method in ("expert-sparsity", "worst-corpus"):
        seconds = bench.seconds(
            functools.partial(
                plan_budgets,
                made,
                method=method,
                keeps=[bench.plan.keep],
                model=bench.model,
                structure=bench.structure,
                sample=bench.sample,
            )
        )
        found[f"{method}, seconds a layer"] = seconds / layers
    return {"tokens": bench.tokens(bench.sample), **found}


def repairs(bench: Bench) -> Figures:
    """Ridge of half of the experts."""
    plan = bench.plan
    seconds = bench.seconds(
        lambda: list(
            repair_layers(bench.model, bench.structure, plan, bench.sample, kind="ridge", batch_size=bench.size.batch)
        )
    )
    return {
        "tokens": bench.tokens(bench.sample),
        "ridge, seconds a layer": seconds / len(bench.structure.topology.decoder_layers),
    }


# The streamed part gives back the model that the others have loaded.
PARTS: dict[str, Callable[[Bench], Figures]] = {
    "loading": loading,
    "profile": profiling,
    "evaluate": evaluation,
    "generate": generation,
    "search": searches,
    "repair": repairs,
    "layer by layer": layer_by_layer,
}


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    lines = [
        f"{record['name']}, torch {record['torch']}, {record['model']}",
        "",
        "| part | figure | |",
        "|---|---|---:|",
    ]
    for part, figures in record["parts"].items():
        for name, value in figures.items():
            if isinstance(value, list):
                value = " to ".join(f"{one:.3g}" for one in value)
            elif isinstance(value, float):
                value = f"{value:.3g}"
            lines.append(f"| {part} | {name} | {'-' if value is None else value} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of gpu.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", default=["checks", *PARTS], choices=["checks", *PARTS])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="shipped models to check (all)")
    parser.add_argument("--layers", type=int, help="of the timed model (24)")
    parser.add_argument("--scratch", type=Path, help="where the timed model is made (a temporary folder)")
    parser.add_argument("--small", action="store_true", help="little text, and a shipped model is the timed one")
    args = parser.parse_args()
    device, size = check_device("auto", args.device), SMALL if args.small else FULL
    args.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "name": name_of(torch.device(device)),
        "device": device,
        "torch": torch.__version__,
        "moecover": VERSION,
        "model": MODELS[0] if args.small else f"{SHAPE}, {args.layers or 24} layers, random",
        "parts": {},
    }
    failed = False

    def measured(part: str, work: Callable[[], Figures]) -> None:
        nonlocal failed
        started = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # the other parts are measured all the same
            traceback.print_exc()
            found, failed = {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}, True
        record["parts"][part] = {**found, "seconds of this part": time.perf_counter() - started}
        write_text(args.output / "gpu.json", json.dumps(record, indent=1) + "\n")
        print(f"{part}: {record['parts'][part]}", file=sys.stderr, flush=True)

    if "checks" in args.parts:
        sequences, length = size.checked
        for name in args.models:
            check = functools.partial(against_cpu, name, device, sequences=sequences, length=length)
            measured(f"checks, {name}", check)
    if any(part in PARTS for part in args.parts):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            folder = shipped_model(MODELS[0]) if args.small else make(SHAPE, Path(scratch) / SHAPE, layers=args.layers)
            bench = Bench(read_structure(folder), device, size)
            for part in (part for part in PARTS if part in args.parts):
                measured(part, functools.partial(PARTS[part], bench))
    print(markdown(record))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
