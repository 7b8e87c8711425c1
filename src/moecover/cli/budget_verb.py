"""The options of `plan` that find the number of experts: reads arguments, checks them before the model runs, gives the plan."""

from __future__ import annotations

import argparse
import io
from typing import TYPE_CHECKING, Any

from moecover import progress
from moecover.cli.arguments import fetched, loadable, memory_limit
from moecover.errors import InputError

if TYPE_CHECKING:
    from moecover.planning.artifact import Plan
    from moecover.profiling.artifact import Profile

BOUNDS = ("keep", "retain", "max_size", "max_perplexity_increase")
OF_PERPLEXITY = ("perplexity", "corpus", "windows", "batch_size")  # options that go with a bound on perplexity alone


def add_options(parser: argparse.ArgumentParser) -> Any:
    """Add the options to `plan`; returns their group."""
    group = parser.add_argument_group("find the number of experts, instead of --keep or --retain")
    group.add_argument("--max-perplexity-increase", metavar="PERCENT", help="the fewest experts with which the perplexity of every held-out text is at most so much above the model's own (runs the model), such as 10%%")  # fmt: skip
    group.add_argument("--max-size", metavar="SIZE", help="the most experts whose checkpoint is at most so large, such as 12GB (headers alone)")  # fmt: skip
    group.add_argument("--perplexity", action="append", default=[], metavar="NAME[=PATH]", help="held-out text to hold the bound on; repeat it (default: blocks of the calibration corpora that the profile did not use)")  # fmt: skip
    group.add_argument("--corpus", action="append", default=[], metavar="NAME=PATH", help="file of a calibration corpus, to find the blocks that the profile did not use; repeat it; named corpora need none")  # fmt: skip
    group.add_argument("--windows", type=int, metavar="N", help="windows or blocks per text at most (default: 64)")
    group.add_argument("--batch-size", type=int, metavar="N", help="windows per forward pass (default: 1)")
    return group


def check_bounds(args: argparse.Namespace) -> str:
    """Which bound was given; refuses none, several, and options that belong to another one."""
    given = [name for name in BOUNDS if getattr(args, name) is not None]
    if len(given) != 1:
        raise InputError("give exactly one of --keep (experts per layer), --retain (fraction in (0, 1]), --max-size and --max-perplexity-increase")  # fmt: skip
    stray = [name for name in OF_PERPLEXITY if getattr(args, name) not in (None, [])]
    if stray and given[0] != "max_perplexity_increase":
        raise InputError(f"--{stray[0].replace('_', '-')} goes with --max-perplexity-increase, --{given[0].replace('_', '-')} measures nothing")  # fmt: skip
    if given[0] in ("max_size", "max_perplexity_increase") and not args.model:
        raise InputError(f"--{given[0].replace('_', '-')} looks at the model: give --model MODEL")
    for name in ("windows", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: 1 or more")
    return given[0]


def keep_of_size(args: argparse.Namespace, profile: Profile, structure: Any) -> int:
    """Experts per layer of ``--max-size``; a quantised sibling of the profile's model has the same topology."""
    from moecover.evaluation.budget_search import largest_within
    from moecover.runtime.memory import parse_size

    size = parse_size(args.max_size)
    if structure.topology.fingerprint != profile.topology.fingerprint:
        raise InputError(f"the profile is of another model ({profile.model['name']}), not of {args.model}: their topologies differ")  # fmt: skip
    keep = largest_within(structure, size, multiple_of=args.multiple_of)
    progress.say(f"--max-size {args.max_size}: {keep} of {structure.topology.num_experts} experts, {structure.num_bytes(keep):,} bytes")  # fmt: skip
    return keep


def found_plan(args: argparse.Namespace, profile: Profile, method: str, options: dict[str, Any]) -> Plan:
    """The plan of ``--max-perplexity-increase``, checked, searched for and with its curve."""
    from moecover.cli.evaluate import texts_of
    from moecover.corpora.overlap import WORTH_SAYING, overlap
    from moecover.corpora.sources import parse_corpora
    from moecover.corpora.windows import load_windows
    from moecover.evaluation.budget_search import (
        BLOCKS,
        TOGETHER,
        check_held_out,
        find,
        held_out,
        parse_percent,
        possible_keeps,
    )
    from moecover.planning.run import plan_budgets, runs_experts
    from moecover.runtime.loading import check_device
    from moecover.runtime.memory import opened

    most = parse_percent(args.max_perplexity_increase, "--max-perplexity-increase")
    if args.perplexity and args.corpus:
        raise InputError("--perplexity and --corpus do not go together: the one is held-out text, the other finds some in the calibration text")  # fmt: skip
    texts = dict(texts_of(args.perplexity))
    files = {} if texts else check_held_out(profile.corpora, parse_corpora(args.corpus) if args.corpus else {})
    limit = memory_limit(args)
    dtype = args.dtype or profile.settings["dtype"]
    check_device(dtype, args.device or "auto")
    keeps = possible_keeps(profile, multiple_of=args.multiple_of, protect_super_experts=args.protect_super_experts)
    structure = fetched(args, loadable(args))
    if structure.model_fingerprint != profile.model["fingerprint"]:
        raise InputError(f"the profile is of another model ({profile.model['name']}), not of {args.model}: topology or routers differ. Give the --model that was profiled")  # fmt: skip
    windows = args.windows or BLOCKS
    with progress.spinner("reading held-out text"):
        loaded = [load_windows(name, path, structure=structure, windows=windows) for name, path in texts.items()]
        loaded = loaded or held_out(profile, files, structure, blocks=windows)
    for text in loaded:
        calibration = [record for records in profile.corpora.values() for record in records]
        share = overlap(text.tokens, text.mask, calibration)
        if share >= WORTH_SAYING:
            progress.say(f"note: {share:.0%} of the text {text.name} is in the calibration text too: that perplexity says little of other text")  # fmt: skip
        progress.say(f"held out: {text.num_tokens:,} tokens of {text.name}")
    batch_size = args.batch_size or 1
    with opened(
        structure, tokens=sum(text.num_tokens for text in loaded) * (1 + TOGETHER), head=True,
        batch_tokens=batch_size * max(text.tokens.shape[1] for text in loaded), dtype=dtype,
        device=args.device or "auto", memory_limit=limit, say=progress.say,
    ) as model:  # fmt: skip
        search: dict[str, Any] = {"model": model, "structure": structure} if runs_experts(method) else {}
        return find(
            profile, structure, lambda asked: plan_budgets(profile, method=method, keeps=asked, **search, **options),
            keeps=keeps, most=most, model=model, texts=loaded, batch_size=batch_size, bar=progress.bar, say=progress.say,
        )  # fmt: skip


def curve_table(found: dict[str, Any], keep: int) -> str:
    """The curve of a found plan as aligned text, the chosen number marked."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    unit, bytes_of, digits = ("GB", 1e9, 2) if found["curve"][-1]["num_bytes"] >= 1e9 else ("MB", 1e6, 1)
    for heading in ("experts", unit, *found["full"], "worst", ""):
        drawn.add_column(heading, justify="right")
    for point in found["curve"]:
        cells = [f"{point['perplexity'][text]:.2f} ({point['increase'][text]:+.1%})" for text in found["full"]]
        mark = "chosen" if point["keep"] == keep else "holds" if point["holds"] else ""
        drawn.add_row(str(point["keep"]), f"{point['num_bytes'] / bytes_of:.{digits}f}", *cells, f"{max(point['increase'].values()):+.1%}", mark)  # fmt: skip
    drawn.add_row("all", "", *(f"{value:.2f}" for value in found["full"].values()), "", "")
    out = io.StringIO()
    Console(file=out, width=max(110, 40 + 22 * len(found["full"]))).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
