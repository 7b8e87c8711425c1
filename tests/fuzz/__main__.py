"""Damaged files of every kind for a given time: ``python -m tests.fuzz --seconds 3600 [--only NAME] [--keep DIR]``.

Prints a line for every input that breaks the rule, keeps the input, and ends with status 1 if there was one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MOECOVER_CACHE", "off")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.base import made_base
from tests.fuzz.rule import broken
from tests.fuzz.targets import TARGETS, Target, tried

BATCH = 25  # examples of a target before the next one's turn


class FoundError(Exception):
    """An input that breaks the rule."""


def batch(
    target: Target, base: Path, at: Path, number: int, counts: Counter[str], name: str
) -> tuple[bytes, str] | None:
    """Some examples of a target; the first that breaks the rule, and how."""
    found: list[tuple[bytes, str]] = []

    @seed(number)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=target.damage(target.file(base).read_bytes()))
    def holds(content: bytes) -> None:
        for command in tried(target, base, at, content):
            counts[name] += 1
            if (how := broken(command)) is not None:
                found.append((content, f"{command.arguments[0]}: {how}"))
                raise FoundError

    try:
        holds()
    except Exception:  # hypothesis wraps what it cannot repeat
        if not found:
            raise
    return found[0] if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="folder for inputs that break the rule")
    parser.add_argument("--seed", type=int, default=None, help="of the examples; a new one each time by default")
    args = parser.parse_args()
    rng, until = random.Random(args.seed), time.monotonic() + args.seconds
    counts, failures = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        base = made_base(Path(folder) / "base")
        while time.monotonic() < until:
            for name in args.only or TARGETS:
                if time.monotonic() > until:
                    break
                found = batch(TARGETS[name], base, Path(folder) / "tried", rng.getrandbits(32), counts, name)
                if found is not None:
                    failures[name] += 1
                    args.keep.mkdir(parents=True, exist_ok=True)
                    kept = args.keep / f"{name}-{failures[name]}"
                    kept.write_bytes(found[0])
                    sys.stdout.write(f"{name}: {found[1]}\n  kept in {kept}\n")
                    sys.stdout.flush()
    sys.stdout.write(f"{sum(counts.values())} commands, {sum(failures.values())} broke the rule\n")
    for name, count in counts.items():
        sys.stdout.write(f"  {name}: {count}, {failures[name]} broke the rule\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
