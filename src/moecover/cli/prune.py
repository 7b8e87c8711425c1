"""The verb `prune`: the pruned checkpoint, from a plan or in one shot from corpora."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.cli.corpus_options import add_corpora, corpus_arguments, text_arguments
from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import (
    add_keep_inputs,
    add_method,
    add_model,
    add_output,
    load_plugins,
    method_arguments,
    pass_arguments,
    searching_methods,
)
from moecover.cli.upload import add_push, check_push, pushed
from moecover.cli.verb import Outcome
from moecover.errors import InputError, flag
from moecover.gguf.parts import is_gguf
from moecover.merging.method import NONE

if TYPE_CHECKING:
    from moecover.pruning.request import Pruned

HELP = "write the pruned checkpoint, from a plan or in one shot from corpora"
SHARED = True
OF_PASS = (
    "corpus",
    "text_field",
    "chat_template",
    "parse_special",
    "sequences",
    "length",
    "batch_size",
    "seed",
    "bos",
    "dtype",
    "device",
    "device_map",
    "memory_limit",
    "plugin",
)
ONE_SHOT = (
    *OF_PASS,
    "keep",
    "retain",
    "multiple_of",
    "width",
    "retain_width",
    "width_multiple_of",
    "protect_channels",
    "channel_groups",
    "method",
    "protect_super_experts",
    "option",
    "save_profile",
    "keep_inputs",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser, note=", or a .gguf file (of a split one the first part)")
    parser.add_argument(
        "--plan", type=Path, metavar="PLAN", help="plan.json; without it, give --corpus and --keep or --retain"
    )
    add_corpora(parser)
    add_method(parser, several=False, has_seed=True)
    add_output(parser, "OUT", "folder, or .gguf file, to write", replaced="OUT if moecover wrote it")
    parser.add_argument(
        "--save-profile", type=Path, metavar="PROFILE_DIR", help="one shot: save the profile, for other budgets"
    )
    add_keep_inputs(parser, f"one shot with {searching_methods()}; default 8192")
    _add_repair(parser)
    add_dry_run(parser)
    parser.add_argument(
        "--other-weights", action="store_true", help="accept a plan made on other weights of the same shape"
    )
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="an evaluation of PLAN, or a cell of `compare`, whose numbers go on the model card; repeat it",
    )
    parser.add_argument(
        "--mtp",
        choices=("drop", "prune"),
        default="drop",
        help="multi-token-prediction layers that have experts of their own: leave them out, or keep in them what the "
        "plan chose by their own statistics (`profile --mtp`; in one shot where they can run), else the ids of the "
        "last MoE layer, of experts and channels (default: drop)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help="send every token to N experts from now on, fewer than before: one number in config.json (measure it with "
        "evaluate --top-k N)",
    )
    add_push(parser)


def _add_repair(parser: argparse.ArgumentParser) -> None:
    """What becomes of the experts that are dropped, and of those that stay."""
    group = parser.add_argument_group("merge and repair")
    group.add_argument(
        "--merge",
        default=NONE,
        metavar="NAME",
        help="merge the experts that are dropped into those that stay, on the text of --corpus, before the repair "
        "(moecover ls merges; default: none, they are removed)",
    )
    group.add_argument(
        "--repair",
        choices=(NONE, "scale", "ridge", "refit"),
        default=NONE,
        help="refit what stays on the text of --corpus: the down projections in closed form, a factor each (scale) or "
        "all weights (ridge); or then all parameters of the experts and the router by gradient steps (refit) "
        "(default: none)",
    )
    group.add_argument(
        "--repair-tokens",
        type=int,
        metavar="TOKENS",
        help="calibration tokens of merge and repair, shared by the corpora, whole sequences (default: 65536)",
    )


def run(args: argparse.Namespace) -> Outcome:
    """Write the checkpoint; print what became of the size, and how to prove it."""
    from moecover.evaluation.artifact import Evaluation
    from moecover.pruning.job import prune
    from moecover.runtime.world import world

    check(args)
    check_push(args)
    if args.plan is not None:  # in one shot the method's arguments load them
        load_plugins(args)
    merge, repair = (None if name == NONE else name for name in (args.merge, args.repair))
    method, options = method_arguments(args, shared_seed=True) if args.plan is None else (None, {})
    made = prune(
        args.model,
        args.plan,
        args.output,
        corpora=corpus_arguments(args) or None,
        keep=args.keep,
        retain=args.retain,
        multiple_of=args.multiple_of,
        width=args.width,
        retain_width=args.retain_width,
        width_multiple_of=args.width_multiple_of,
        method=method,
        method_options=options,
        merge=merge,
        repair=repair,
        repair_tokens=args.repair_tokens,
        save_profile=args.save_profile,
        keep_inputs=args.keep_inputs,
        overwrite=args.overwrite,
        other_weights=args.other_weights,
        mtp=args.mtp,
        top_k=args.top_k,
        here=world(),
        evaluations={str(folder): Evaluation.load(folder) for folder in args.evaluation},
        command=shlex.join(["moecover", *args.argv]),
        **text_arguments(args),
        **pass_arguments(args),
    )
    return _printed(made, args)


def _printed(made: Pruned, args: argparse.Namespace) -> Outcome:
    """What became of the size and of the tensors, and the command that proves it; a note on servers first."""
    from moecover import progress
    from moecover.checkpoints.servers import SERVERS, unmet
    from moecover.planning.artifact import shape_text
    from moecover.planning.lines import kept_line

    repair = None if args.repair == NONE else args.repair
    keep, model, written = made.plan.keep, shlex.quote(args.model), args.output
    if is_gguf(written):  # of a split model the first part
        written = written.with_name(made.output.name)
    if servers := [server for server in SERVERS if unmet(made.topology, keep, server, width=made.plan.width)]:
        names = ", ".join(servers)
        shape = f"--keep {keep}" + ("" if made.plan.width is None else f" --width {made.plan.width}")
        progress.say(f"note: {shape_text(made.plan)} do not suit {names}: moecover inspect {model} {shape}")
    result: dict[str, object] = {
        "output": str(made.output),
        "keep": keep,
        **({"width": made.plan.width} if made.plan.width is not None else {}),
        **({"top_k": made.plan.top_k} if made.plan.top_k is not None else {}),
        "bytes_before": made.bytes_before,
        "bytes": made.num_bytes,
    }
    text = f"{written}: {made.sizes()}"
    if line := kept_line(made.plan):
        text += f"\n{line}"
    if made.repaired is not None:
        before, after = made.repaired.mean_errors()
        tensors, what = len(made.repaired.hashes), "merged" if repair is None else "repaired"
        removed, took = made.repaired.merged
        did = f"{removed} removed experts into {took}" if repair is None else f"{tensors} tensors"
        result["repair"] = {
            "kind": args.repair,
            "merge": args.merge,
            "tensors": tensors,
            "before": before,
            "after": after,
        }
        text += (
            f"\n{what} ({made.repaired.what}): {did}; squared error of a layer's output on the "
            f"calibration text {before:.3f} -> {after:.3f} of its square"
        )
    revision = f" --revision {shlex.quote(args.revision)}" if args.revision else ""
    trusted = " --trust-remote-code" if args.trust_remote_code else ""
    text += f"\nnext: moecover verify {model} {shlex.quote(str(written))}{revision}{trusted}"
    return Outcome(result, text + pushed(args, written))


def check(args: argparse.Namespace) -> None:
    """Refuse a request that contradicts itself.

    Raises:
        InputError: names the options.
    """
    asked = [f"--{name} {value}" for name in ("repair", "merge") if (value := getattr(args, name)) != NONE]
    if not asked and args.repair_tokens is not None:
        raise InputError("--repair-tokens says what merge and repair run on: give --merge or --repair")
    if asked and args.evaluation:
        raise InputError("--evaluation measured the plan without merge and repair: evaluate the checkpoint itself")
    if args.plan is None:
        if not args.corpus:
            raise InputError("give --plan PLAN, or --corpus with --keep or --retain for one shot")
        thin = args.width is not None or args.retain_width is not None
        if (args.keep is None) == (args.retain is None) and not (thin and args.keep is None):
            raise InputError("give exactly one of --keep (experts per layer) and --retain (fraction in (0, 1])")
        if args.evaluation:
            raise InputError("--evaluation goes with --plan: in one shot no plan has been evaluated yet")
        return
    from moecover.planning.methods import options_of_all

    names = (*ONE_SHOT, *(option.name for option, _ in options_of_all()))
    given = [
        name for name in names if (value := getattr(args, name)) is not None and value is not False and value != []
    ]
    if asked:
        given = [name for name in given if name not in OF_PASS]
        if not args.corpus:
            raise InputError(f"{asked[0]} fits weights on calibration text: give --corpus NAME[=PATH]")
    if given:
        raise InputError(f"--plan and {flag(given[0])} exclude each other: the plan says what is kept")
