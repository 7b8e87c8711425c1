"""False alarms of the paired bootstrap at levels far below 5 %: made-up scores of two methods that do not differ.

    python -m benchmarks.false_alarms [--repetitions 30000] [--resamples 1000] [--seed 0]

A correction for many comparisons asks for p values of 0.001 and less, where few draws lie beyond zero and the tail is
fitted (docs/statistics.md). For accuracy on three tasks (40, 150 and 80 items) and on one of 100 items, and for
perplexity on 15 and on 60 windows: prints which share of the tests has a p below each level, with its standard error,
and which share had too few differing items for a test; that counts as no alarm. Says on stderr how far it is.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import numpy as np

from moecover.comparison.bootstrap import Difference, paired_bootstrap, perplexity_difference
from tests.support.scores import SIZES, answers, windows

LEVELS = (0.05, 0.01, 0.001, 0.0002)
STEPS = 10  # lines on stderr for each kind of data
KINDS: dict[str, Callable[[np.random.Generator, int, int], Difference]] = {
    "accuracy, 3 tasks, 270 items": lambda rng, resamples, seed: paired_bootstrap(
        *answers(rng, SIZES), resamples=resamples, seed=seed
    ),
    "accuracy, 1 task, 100 items": lambda rng, resamples, seed: paired_bootstrap(
        *answers(rng, {"t": 100}), resamples=resamples, seed=seed
    ),
    "perplexity, 15 windows": lambda rng, resamples, seed: perplexity_difference(
        *windows(rng, 15), resamples=resamples, seed=seed
    ),
    "perplexity, 60 windows": lambda rng, resamples, seed: perplexity_difference(
        *windows(rng, 60), resamples=resamples, seed=seed
    ),
}


def rates(kind: str, repetitions: int, resamples: int, seed: int) -> tuple[list[float], float]:
    """How often p is below each level where there is no difference.

    Args:
        kind: of the data, a key of `KINDS`.
        repetitions: number of tests.
        resamples: bootstrap samples of a test.
        seed: of the data and of the draws.

    Returns:
        For each of `LEVELS` the share of the tests, and the share without a test.
    """
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    alarms, untested = [0] * len(LEVELS), 0
    for number in range(repetitions):
        p = KINDS[kind](rng, resamples, seed + number).p
        untested += p is None
        alarms = [found + (p is not None and p < level) for found, level in zip(alarms, LEVELS, strict=True)]
        if (number + 1) % max(1, repetitions // STEPS) == 0:
            print(f"{kind}: {number + 1:,} of {repetitions:,}", file=sys.stderr)
    return [found / repetitions for found in alarms], untested / repetitions


def main() -> None:
    """Simulate and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=30_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| data | " + " | ".join(f"p < {level}" for level in LEVELS) + " | no test |")
    print("|---|" + "---:|" * (len(LEVELS) + 1))
    for kind in KINDS:
        found, untested = rates(kind, args.repetitions, args.resamples, args.seed)
        cells = [f"{rate:.5f} ± {math.sqrt(rate * (1 - rate) / args.repetitions):.5f}" for rate in found]
        print(f"| {kind} | {' | '.join(cells)} | {untested:.4f} |", flush=True)


if __name__ == "__main__":
    main()
