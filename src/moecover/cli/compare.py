"""The verb `compare`: a grid of evaluations, from a YAML file or from options in place of its fields."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moecover.cli.corpus_options import add_mix, add_reading, corpus_arguments
from moecover.cli.dry_run import add_dry_run
from moecover.cli.values import dtype, share
from moecover.cli.verb import Outcome
from moecover.errors import InputError

HELP = "evaluate models x calibrations x methods x budgets x seeds and compare them; resumes where it stopped"
YAML = (".yaml", ".yml")


class Flag(NamedTuple):
    """An option that takes the place of a configuration's field: ``repeated``, or with commas if ``several``.

    Without a metavar it is a switch.
    """

    name: str
    field: str
    metavar: str
    help: str
    parse: Callable[[str], object] = str
    several: bool = False
    repeated: bool = False


POSITIONS = "(default: 2048, or the model's positions if fewer)"
FLAGS = (
    Flag("perplexity", "perplexity", "NAME[=PATH]", "text to measure perplexity on; repeat it", repeated=True),
    Flag("tasks", "tasks", "T,T", "benchmarks of lm-evaluation-harness, with commas", several=True),
    Flag("limit", "limit", "N", "items per task (default: all)", int),
    Flag("data-dir", "data_dir", "DIR", "local files of the tasks instead of the hub"),
    Flag("include-path", "include_path", "DIR", "folder with task definitions of your own"),
    Flag("window", "window", "N", f"tokens per window of a perplexity text {POSITIONS}", int),
    Flag("windows", "windows", "N", "windows of a perplexity text, from its beginning (default: 256)", int),
    Flag(
        "method",
        "methods",
        "NAME",
        "moecover ls methods; repeat it (default: those that papers compare, at their published settings)",
        repeated=True,
    ),
    Flag(
        "saliency", "saliencies", "NAME", "for methods that take one; repeat it (default: each method's)", repeated=True
    ),
    Flag(
        "retain",
        "retain",
        "R,R",
        "fractions of the experts that are kept, or as 50%% (default: 0.25,0.5,0.75)",
        share,
        several=True,
    ),
    Flag("keep", "keep", "K,K", "experts kept per layer, instead of --retain", int, several=True),
    Flag(
        "shapes",
        "shapes",
        "KxW,K,P%",
        "experts x channels of each, whole experts, or a percentage of them, instead of --retain",
        several=True,
    ),
    Flag(
        "merge",
        "merges",
        "NAME,NAME",
        "none, or moecover ls merges: every plan is also evaluated with the dropped experts merged (default: none)",
        several=True,
    ),
    Flag(
        "repair",
        "repairs",
        "KIND,KIND",
        "none, scale, ridge, refit: every plan is also evaluated with each (default: none)",
        several=True,
    ),
    Flag("repair-tokens", "repair_tokens", "N", "calibration tokens of merge and repair (default: 65536)", int),
    Flag(
        "top-k",
        "top_ks",
        "N,N",
        "experts per token, fewer than the model's: every plan also with each",
        int,
        several=True,
    ),
    Flag("skip", "skip", "", "every plan also with tokens that skip experts by the rule of evaluate --skip"),
    Flag("seeds", "seeds", "N,N", "of seeded methods (default: 0,1,2,3,4)", int, several=True),
    Flag("samples", "samples", "N,N", "seeds of the calibration samples (default: 0)", int, several=True),
    Flag("sequences", "sequences", "N", "calibration blocks per corpus (default: up to 128)", int),
    Flag("length", "length", "N", f"tokens per calibration block {POSITIONS}", int),
    Flag("bos", "bos", "WHEN", "what blocks and windows begin with: auto (as the tokenizer adds it), always, never"),
    Flag(
        "search-tokens",
        "search_tokens",
        "N",
        "tokens that methods which run the experts search on (default: 8192)",
        int,
    ),
    Flag("batch-size", "batch_size", "N", "sequences per forward pass (default: 4)", int),
    Flag("dtype", "dtype", "DTYPE", "auto (the checkpoint's), bfloat16, float16 or float32", dtype),
    Flag("device", "device", "DEVICE", "auto (a GPU where there is one), cpu, cuda, cuda:1 ..."),
    Flag(
        "device-map",
        "device_map",
        "MAP",
        "spread models over several devices: auto, balanced, or a JSON file with devices by name of a module",
    ),
    Flag(
        "memory-limit",
        "memory_limit",
        "SIZE",
        "memory that each of the --jobs may use, such as 4GB; a model that does not fit runs layer by layer",
    ),
    Flag("libllama", "libllama", "PATH", "shared library of llama.cpp, for GGUF files (default: that of the extra)"),
    Flag(
        "plugin",
        "plugins",
        "FILE.py",
        "your own methods, saliencies and corpora: a Python file, which is run; repeat it",
        repeated=True,
    ),
)


def _several(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    """Parser of values with commas between them."""

    def parsed(text: str) -> list[object]:
        return [parse(part) for part in text.split(",")]

    parsed.__name__ = f"list of {parse.__name__}"
    return parsed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "what",
        nargs="+",
        metavar="CONFIG.yaml|MODEL",
        help="a configuration (docs/compare.md), or models: local folders, hub ids, shipped:NAME, .gguf files",
    )
    group = parser.add_argument_group("in place of a configuration, or of fields of it")
    group.add_argument(
        "--corpus",
        action="append",
        default=None,
        metavar="NAME[=SOURCE]",
        help="calibration corpus, as in `profile`; repeat it: they are one calibration set",
    )
    group.add_argument(
        "--file",
        dest="files",
        action="append",
        default=None,
        metavar="FILE.gguf",
        help="another GGUF file of the one MODEL.gguf, quantised or pruned, as a row beside it; repeat it",
    )
    add_mix(group)
    add_reading(group)
    for one in FLAGS:
        if not one.metavar:
            group.add_argument(f"--{one.name}", action="store_const", const=True, help=one.help)
        elif one.repeated:
            group.add_argument(f"--{one.name}", action="append", default=None, metavar=one.metavar, help=one.help)
        else:
            parse = _several(one.parse) if one.several else one.parse
            group.add_argument(f"--{one.name}", type=parse, metavar=one.metavar, help=one.help)
    group.add_argument(
        "--trust-remote-code",
        dest="trusted",
        action="store_true",
        help="run the code that comes with each MODEL, for types and tokenizers that transformers does not know",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RUN_DIR", help="folder to write, or to extend"
    )
    add_dry_run(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes, each with a model of its own (default: 1)"
    )
    cluster = parser.add_argument_group("on a cluster (docs/cluster.md)")
    cluster.add_argument(
        "--engine",
        default="local",
        metavar="NAME",
        help="where jobs run: local (this machine), ray (default: local)",
    )
    cluster.add_argument(
        "--address", metavar="HOST:PORT", help="the Ray cluster: auto or HOST:PORT (default: one on this machine)"
    )
    cluster.add_argument("--gpus-per-job", type=float, default=0, metavar="N", help="GPUs of each job (default: 0)")


def run(args: argparse.Namespace) -> Outcome:
    """Fill the run; print a verdict and one line per failed cell, exit status 1 where there is one."""
    from moecover.comparison.reading import read
    from moecover.comparison.results import MARKDOWN
    from moecover.comparison.run import compare
    from moecover.comparison.verdict import verdict

    flags: dict[str, object] = {
        one.field: value for one in FLAGS if (value := getattr(args, one.name.replace("-", "_"))) is not None
    }
    if corpora := corpus_arguments(args):
        flags["calibration"] = [corpora]
    path: Path | None = None
    if any(what.endswith(YAML) for what in args.what):
        if len(args.what) > 1:
            raise InputError(f"give one configuration, or models: {' '.join(args.what)}")
        if args.files:
            raise InputError("--file goes with MODEL.gguf. In a configuration, list files in their model's entry")
        if args.trusted:
            raise InputError(
                "--trust-remote-code goes with MODEL. In a configuration, write trust_remote_code: true there"
            )
        path = Path(args.what[0])
    else:
        flags["models"] = args.what
        if args.files:
            if len(args.what) > 1:
                raise InputError(f"--file goes with one MODEL.gguf, here are {len(args.what)} models")
            flags["models"] = [{"model": args.what[0], "files": args.files}]
        if args.trusted:
            if args.files:
                raise InputError("--trust-remote-code and --file exclude each other: GGUF files hold no code")
            flags["models"] = [{"model": what, "trust_remote_code": True} for what in args.what]
        if args.corpus is None:
            raise InputError("give calibration corpora with --corpus NAME[=SOURCE], or a configuration CONFIG.yaml")
    made = compare(
        read(path, flags),
        args.output,
        jobs=args.jobs,
        engine=args.engine,
        address=args.address,
        gpus_per_job=args.gpus_per_job,
        command=shlex.join(["moecover", *args.argv]),
    )
    lines = [f"FAILED {name}: {reason}" for name, reason in made.failures.items()]
    lines += [
        *verdict(made.results),
        f"{made.summary()}; tables and every comparison in words: {args.output / MARKDOWN}",
        f"next: moecover report {shlex.quote(str(args.output))} -o report.html",
    ]
    problem = f"{len(made.failures)} cells failed, the first is {next(iter(made.failures))}" if made.failures else ""
    return Outcome(made.results, "\n".join(lines), 1 if problem else 0, problem)
