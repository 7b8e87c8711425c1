"""The verb `compare`: reads its arguments, a YAML file or flags, gives one configuration to `comparison`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecover.errors import InputError

YAML = (".yaml", ".yml")
# Flag, how its value is read, and what it says; each takes the place of the field of the same name.
FLAGS: tuple[tuple[str, str, Any, str, str], ...] = (
    ("perplexity", "perplexity", None, "NAME[=PATH]", "text to measure perplexity on; repeat it"),
    ("tasks", "tasks", str, "T,T", "benchmarks of lm-evaluation-harness, with commas"),
    ("limit", "limit", int, "N", "items per task (default: all)"),
    ("data-dir", "data_dir", None, "DIR", "local files of the tasks instead of the hub"),
    ("include-path", "include_path", None, "DIR", "folder with task definitions of your own"),
    ("window", "window", int, "N", "tokens per window of a perplexity text (default: 2048, or the model's positions if fewer)"),
    ("windows", "windows", int, "N", "windows of a perplexity text, from its beginning (default: 256)"),
    ("method", "methods", None, "NAME", "moecover ls methods; repeat it (default: random, pooled with saliency reap, expert-sparsity, tb-coverage)"),
    ("saliency", "saliencies", None, "NAME", "for methods that take one; repeat it (default: contribution)"),
    ("retain", "retain", float, "R,R", "fractions of the experts that are kept (default: 0.25,0.5,0.75)"),
    ("keep", "keep", int, "K,K", "experts kept per layer, instead of --retain"),
    ("repair", "repairs", str, "KIND,KIND", "none, scale, ridge: every plan also so repaired (default: none)"),
    ("repair-tokens", "repair_tokens", int, "N", "calibration tokens that a repair runs on (default: 65536)"),
    ("seeds", "seeds", int, "N,N", "of random plans (default: 0,1,2,3,4)"),
    ("samples", "samples", int, "N,N", "seeds of the calibration samples (default: 0)"),
    ("sequences", "sequences", int, "N", "calibration blocks per corpus (default: up to 128)"),
    ("length", "length", int, "N", "tokens per calibration block (default: 2048, or the model's positions if fewer)"),
    ("search-tokens", "search_tokens", int, "N", "tokens that expert-sparsity and worst-corpus search on (default: 8192)"),
    ("batch-size", "batch_size", int, "N", "sequences per forward pass (default: 4)"),
    ("dtype", "dtype", None, "DTYPE", "auto (the checkpoint's), bfloat16, float16 or float32"),
    ("device", "device", None, "DEVICE", "auto (a GPU where there is one), cpu, cuda, cuda:1 ..."),
    ("memory-limit", "memory_limit", None, "SIZE", "memory that each of the --jobs may use, such as 4GB; a model that does not fit runs layer by layer"),
    ("plugin", "plugins", None, "FILE.py", "your own saliencies and methods: a Python file, which is run; repeat it"),
)  # fmt: skip
REPEATED = ("perplexity", "method", "saliency", "plugin")
LISTS = ("tasks", "repairs", "retain", "keep", "seeds", "samples")


def _several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Parser of values with commas between them."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def add_verb(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Enter the verb into the command line."""
    p = verb(
        "compare",
        "evaluate models x calibrations x methods x budgets x seeds and compare them; goes on where it stopped",
    )
    p.add_argument("what", nargs="+", metavar="CONFIG.yaml|MODEL", help="a configuration (docs/compare.md), or models: local folders, hub ids, shipped:NAME")  # fmt: skip
    group = p.add_argument_group("instead of a configuration's fields, or in their place")
    group.add_argument("--corpus", action="append", default=None, metavar="NAME[=PATH]", help="calibration corpus (moecover ls corpora); repeat it: they are one calibration set")  # fmt: skip
    for flag, _, kind, metavar, text in FLAGS:
        if flag in REPEATED:
            group.add_argument(f"--{flag}", action="append", default=None, metavar=metavar, help=text)
        else:
            group.add_argument(f"--{flag}", type=_several(kind) if flag in LISTS else kind or str, metavar=metavar, help=text)  # fmt: skip
    p.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RUN_DIR", help="folder to write, or to fill further"
    )
    p.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes, each with a model of its own (default: 1)"
    )


def compare_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb; one line a failed cell, exit status 1 where there is one."""
    from moecover import progress
    from moecover.comparison.reading import read
    from moecover.comparison.results import MARKDOWN
    from moecover.comparison.run import compare

    flags = {name: value for flag, name, *_ in FLAGS if (value := getattr(args, flag.replace("-", "_"))) is not None}
    if args.corpus is not None:
        flags["calibration"] = [args.corpus]
    path: Path | None = None
    if any(what.endswith(YAML) for what in args.what):
        if len(args.what) > 1:
            raise InputError(f"give one configuration, or models: {' '.join(args.what)}")
        path = Path(args.what[0])
    else:
        flags["models"] = args.what
        if args.corpus is None:
            raise InputError("give calibration corpora with --corpus NAME or NAME=PATH, or a configuration CONFIG.yaml")
    outcome = compare(
        read(path, flags),
        args.output,
        jobs=args.jobs,
        command=shlex.join(["moecover", *args.argv]),
        say=progress.say,
        bar=progress.bar,
        spinner=progress.spinner,
    )
    lines = [(args.output / MARKDOWN).read_text(encoding="utf-8").rstrip(), ""]
    lines += [f"FAILED {name}: {reason}" for name, reason in outcome.failures.items()]
    lines.append(outcome.summary())
    return outcome.results, "\n".join(lines), 1 if outcome.failures else 0
