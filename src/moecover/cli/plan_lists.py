"""Lists of other tools in the verb `plan`: their options, and what they exclude."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TypeVar

from moecover import rehearsal
from moecover.cli.plan_bounds import BOUNDS, OF_TEXT, WIDTHS
from moecover.cli.verb import Outcome
from moecover.errors import InputError, flag

Number = TypeVar("Number", int, float)
ELSEWHERE = ("from_format", "export")  # options that go with --from
OF_PLANS = (
    *("profile", "imatrix", "method", "protect_super_experts", "option", "multiple_of", "width_multiple_of"),
    *("protect_channels", "channel_groups", "dtype", "device", "device_map", "memory_limit", "plugin"),
    *(bound for bound in BOUNDS if bound not in ("keep", "retain")),
    *WIDTHS,
    *OF_TEXT,
)


def add_lists(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of what is read from other tools or written for them."""
    from moecover.planning.keep_lists import FORMATS

    group = parser.add_argument_group("exchange lists of experts with other tools, instead of planning")
    group.add_argument(
        "--from",
        dest="list",
        type=Path,
        metavar="FILE",
        help="read a keep or prune list (JSON, JSON lines) as a plan of --model; of a ranking of all experts --keep or "
        "--retain says how many stay. A plan.json too, for --export",
    )
    names = ", ".join(FORMATS)
    group.add_argument("--from-format", metavar="NAME", help=f"format of --from where the file does not tell: {names}")
    group.add_argument(
        "--export", metavar="NAME", help="write the plan of --from as the list of another tool, in one of these formats"
    )


def refuse_without_list(args: argparse.Namespace) -> None:
    """Refuse options that go with --from where it is not there.

    Raises:
        InputError: names the option.
    """
    if stray := [name for name in ELSEWHERE if getattr(args, name) is not None]:
        raise InputError(f"{flag(stray[0])} goes with --from FILE, a plan.json or the list of another tool")


def run_list(args: argparse.Namespace) -> Outcome:
    """Write the plan of a list, or the list of a plan."""
    from moecover.checkpoints.opening import described
    from moecover.planning.exchange import export_plan, import_plan
    from moecover.planning.keep_lists import format_named
    from moecover.planning.lines import plan_line
    from moecover.progress import resolve
    from moecover.runtime.world import check_alone, world

    _check(args)
    check_alone(world(), "plan --from")
    if args.export is not None:
        format_named(args.export, "export")
    structure = described(args.model, revision=args.revision, progress=resolve())
    found = import_plan(
        args.list,
        structure,
        from_format=args.from_format,
        keep=_one(args.keep, "keep"),
        retain=_one(args.retain, "retain"),
    )
    experts = structure.topology.num_experts
    result = {"method": found.method, "options": found.options, "keep": found.keep, "experts": experts}
    if args.export is not None:
        path = export_plan(found, structure, args.output, export=args.export)
        return Outcome(
            {"list": str(path), "format": args.export, **result}, f"{path}: {plan_line(found, experts)}, {args.export}"
        )
    rehearsal.ahead("write", args.output)
    rehearsal.stop()
    path = found.save(args.output)
    model = shlex.quote(args.model)
    text = f"{path}: {plan_line(found, experts)}\nnext: moecover prune {model} --plan {shlex.quote(str(path))} -o OUT"
    return Outcome({"plan": str(path), **result}, text)


def _one(values: list[Number] | None, name: str) -> Number | None:
    if values is not None and len(values) > 1:
        raise InputError(f"{flag(name)} has {len(values)} numbers: --from gives one plan")
    return None if values is None else values[0]


def _check(args: argparse.Namespace) -> None:
    """Refuse a request without a model, and options that a list makes useless.

    Raises:
        InputError: names the option.
    """
    from moecover.planning.methods import options_of_all

    names = (*OF_PLANS, *(option.name for option, _ in options_of_all()))
    values = ((name, getattr(args, name)) for name in names)
    if given := [name for name, value in values if value is not None and value is not False and value != []]:
        named = "PROFILE_DIR" if given[0] == "profile" else flag(given[0])
        raise InputError(f"--from and {named} exclude each other: the list says what is kept")
    if args.shape != "experts":
        raise InputError("--from and --shape exclude each other: the list says what is kept")
    if not args.model:
        raise InputError("--from reads a list of a model's experts: give --model MODEL")
