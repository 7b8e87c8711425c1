"""The verb `profile`: statistics of every expert on every corpus."""

from __future__ import annotations

import argparse
import shlex

from moecover.cli.corpus_options import add_corpora, corpus_arguments, text_arguments
from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import (
    add_keep_inputs,
    add_libllama,
    add_model,
    add_output,
    add_plugin,
    load_plugins,
    pass_arguments,
    searching_methods,
)
from moecover.cli.verb import Outcome

HELP = "run corpora through a model and record the statistics of every expert"
SHARED = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser, note=", or a .gguf file (of a split one the first part)")
    add_corpora(parser)
    add_output(parser, "PROFILE_DIR", "folder for profile.safetensors", replaced="a profile that is there")
    add_keep_inputs(parser, f"for methods {searching_methods()}")
    parser.add_argument(
        "--mtp",
        action="store_true",
        help="profile multi-token-prediction layers too, so that a plan rates their experts for `prune --mtp prune`; "
        "costs one more layer each, and the whole model in memory",
    )
    add_libllama(parser)
    add_plugin(parser)
    add_dry_run(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Write the profile; print what it holds."""
    from moecover.planning.explaining.stability import settled_text
    from moecover.planning.lines import stability_at_half
    from moecover.profiling.artifact import FILE
    from moecover.profiling.job import profile
    from moecover.profiling.statistics import OF_MTP
    from moecover.runtime.world import world

    load_plugins(args)
    made = profile(
        args.model,
        corpus_arguments(args),
        output=args.output,
        overwrite=args.overwrite,
        keep_inputs=args.keep_inputs,
        mtp=args.mtp,
        libllama=args.libllama,
        here=world(),
        **text_arguments(args),
        **pass_arguments(args),
    )
    path = args.output / FILE
    shape = [len(made.topology.decoder_layers), made.topology.num_experts]
    tokens = {name: records[0]["tokens"] for name, records in made.corpora.items()}
    of_mtp = None if made.mtp is None else len(made.mtp.topology.decoder_layers)
    more = "" if of_mtp is None else f", and of {of_mtp} {OF_MTP if of_mtp > 1 else OF_MTP.removesuffix('s')}"
    lines = [f"{path}: statistics of {shape[0]} layers x {shape[1]} experts{more}"]
    lines += [f"  {name}: {count:,} tokens" for name, count in tokens.items()]
    stable = stability_at_half(made)
    lines += [f"stability of a plan for half of the experts: {settled_text(stable)}"] if stable else []
    lines.append(f"next: moecover plan {shlex.quote(str(args.output))} --retain 0.5 -o plan.json")
    result = {
        "profile": str(path),
        "shape": shape,
        **({} if of_mtp is None else {"mtp_layers": of_mtp}),
        "tokens": tokens,
        "fingerprint": made.fingerprint,
        "stability": stable,
    }
    return Outcome(result, "\n".join(lines))
