"""Cost of evaluating plans: time as a ratio to the same number of plain evaluations, in one run.

    python -m benchmarks.evaluation [--plans 3] [--repeats 9] [--batches 4] [--threads 2]

A plain evaluation is a loop over the windows with ``model(tokens)`` and torch's cross-entropy, no mask. The passes
alternate, so that noise on the machine affects all of them alike. Each ratio is one of medians, followed by the median
of the ratios within each round:

    plans        M plans, perplexity only, over M plain evaluations
    with KL      M plans and the model itself, with KL divergence and agreement, over M + 1 plain evaluations
    25 %         one plan that keeps a quarter of the experts, over the unmasked model evaluated by the same code
    streamed     M plans layer by layer over one plan, and how often a layer's weights were read
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import VOCABULARY, make_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus, make_corpus
from moecover.evaluation.run import evaluate
from moecover.planning.artifact import LayerPlan, Plan
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from moecover.runtime.weights import Weights

LENGTH, BATCH = 512, 4


def random_plan(structure: Structure, keep: int, seed: int) -> Plan:
    """A plan that keeps a random set of ``keep`` experts in every layer."""
    topology, chance = structure.topology, np.random.default_rng(seed)
    layers = [
        LayerPlan(decoder_layer=d, kept=sorted(map(int, chance.choice(topology.num_experts, keep, replace=False))))
        for d in topology.decoder_layers
    ]
    return Plan(schema=1, keep=keep, layers=layers)


def plain(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood, as a script would compute it."""
    total = 0.0
    for batch in tokens.split(BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return total / tokens[:, 1:].numel()


def turns(repeats: int, **turn: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of every named call, run in alternating rounds; two warm-up rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in turn}
    for repeat in range(repeats + 2):
        for name, run in turn.items():
            start = time.perf_counter()
            run()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str, times: int = 1) -> str:
    """Ratio of the medians over ``times``, and the median of the ratios within each round."""
    pairs = zip(seconds[one], seconds[other], strict=True)
    whole = statistics.median(seconds[one]) / statistics.median(seconds[other]) / times
    return f"{whole:.3f}   (neighbours {statistics.median(a / b for a, b in pairs) / times:.3f})"


def reads(structure: Structure, plans: dict[str, Plan], text: Corpus) -> tuple[float, int]:
    """Seconds of a streamed evaluation, and the largest number of reads of any part of the weights."""
    count: Counter[str] = Counter()
    load = Weights.load

    def counted(self: Weights, prefix: str) -> None:
        count[prefix] += 1
        load(self, prefix)

    Weights.load = counted  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        with streamed(structure) as model:
            evaluate(structure, plans, model=model, texts=[text], full=False, batch_size=BATCH)
        return time.perf_counter() - start, max(count.values())
    finally:
        Weights.load = load  # type: ignore[method-assign]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plans", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, default=4, help=f"batches of {BATCH} x {LENGTH} tokens a plan")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(0, VOCABULARY, (BATCH * args.batches, LENGTH), generator=torch.Generator().manual_seed(0))
    text = make_corpus("random", tokens.numpy(), np.ones(tokens.shape, dtype=bool), {})
    print(f"60 experts top-4, hidden 512, expert width 352, 4 layers, {tokens.numel()} tokens, {args.threads} threads")
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            structure = read_structure(make_model(Path(folder), getattr(torch, dtype)))
            model = load_model(structure)
            shares = [(0.25, 0.5, 0.75)[i % 3] for i in range(args.plans)]
            plans = {f"p{i}": random_plan(structure, round(60 * share), i) for i, share in enumerate(shares)}

            def ours(
                chosen: dict[str, Plan], *, full: bool, structure: Structure = structure, model: torch.nn.Module = model
            ) -> object:
                return evaluate(structure, chosen, model=model, texts=[text], full=full, batch_size=BATCH)

            seconds = turns(
                args.repeats,
                plain=lambda model=model: plain(model, tokens),
                plans=lambda plans=plans: ours(plans, full=False),
                close=lambda plans=plans: ours(plans, full=True),
                unmasked=lambda: ours({}, full=True),
                quarter=lambda plans=plans: ours({"p0": plans["p0"]}, full=False),
            )
            one, _ = reads(structure, {"p0": plans["p0"]}, text)
            all_of_them, most = reads(structure, plans, text)
        print(f"{dtype}: plain evaluation {1000 * statistics.median(seconds['plain']):.0f} ms")
        print(f"  {args.plans} plans          {ratio(seconds, 'plans', 'plain', args.plans)}")
        print(f"  {args.plans} plans with KL  {ratio(seconds, 'close', 'plain', args.plans + 1)}")
        print(f"  25 %             {ratio(seconds, 'quarter', 'unmasked')}")
        print(
            f"  streamed         {all_of_them / one:.3f} of one plan's time for {args.plans}, "
            f"every part of the weights read {most} time{'s' * (most > 1)}"
        )


if __name__ == "__main__":
    main()
