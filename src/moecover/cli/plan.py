"""The verb `plan`: which experts stay, for a number of experts, or for a bound on size or perplexity."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moecover import rehearsal
from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import add_device, add_method, add_output, add_revision, method_arguments, pairs
from moecover.cli.plan_bounds import OF_BYTES, add_bounds, check_model_options, which_bound
from moecover.cli.plan_lists import add_lists, refuse_without_list, run_list
from moecover.cli.plan_tables import curve_table, shapes_table
from moecover.cli.verb import Outcome
from moecover.errors import InputError, flag

if TYPE_CHECKING:
    from moecover.planning.artifact import Plan
    from moecover.planning.shapes import Shape
    from moecover.profiling.artifact import Profile

HELP = "choose the experts to keep from a profile, or take over a list of another tool"
SHARED = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "profile", type=Path, nargs="?", metavar="PROFILE_DIR", help="folder that `moecover profile` wrote"
    )
    parser.add_argument(
        "--imatrix",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="plan from importance matrices of llama.cpp (imatrix.gguf) instead of a profile, one a corpus; repeat it. "
        "With --model, the GGUF file that they are of, by estimated activation norms, else by counts",
    )
    add_method(parser, several=True, has_seed=False)
    add_bounds(parser)
    add_lists(parser)
    group = parser.add_argument_group("the model, for bounds, for lists and for methods that run the experts")
    group.add_argument(
        "--model", metavar="MODEL", help="the model that was profiled: local folder, hub id or shipped:NAME"
    )
    add_revision(group)
    add_device(group)
    add_dry_run(parser)
    text = "plan.json to write (replaced if it exists); for several a folder, which gets keep-K[-width-W].json"
    add_output(parser, "PLAN", text)


def run(args: argparse.Namespace) -> Outcome:
    """Write the plan or plans; print a line for each, and the curve of a search for the number of experts."""
    from moecover.planning.job import check_search
    from moecover.planning.lines import plan_line
    from moecover.planning.methods import METHODS
    from moecover.planning.saliency import default_saliency
    from moecover.runtime.world import check_alone, world

    if args.list is not None:
        return run_list(args)
    refuse_without_list(args)
    method, options = method_arguments(args, shared_seed=False)
    bound = which_bound(args)
    searches, from_profile = METHODS[method].runs_experts, METHODS[method].from_profile
    needs_model = not from_profile or bound in (*OF_BYTES, "max_perplexity_increase") or args.imatrix
    if args.model and not needs_model:
        raise InputError(f"--model is no option of method {method}: it plans from the profile alone")
    check_model_options(args, bound, method)
    if not searches or bound in (*OF_BYTES, "max_perplexity_increase"):
        check_alone(world(), f"plan {flag(bound)} with method {method}")
    profile = _profile(args)
    if args.imatrix and any(option.name == "saliency" for option in METHODS[method].options):
        options = {"saliency": default_saliency(profile), **options}
    if not from_profile:
        check_search(method, profile, args.model, name=str(args.profile))
    rehearsal.ahead("write", args.output)
    made = _plans(args, bound, profile, method, options)
    several = len(made) > 1
    rehearsal.stop()
    lines, results, experts = [], [], profile.topology.num_experts
    for one in made:
        path = args.output / file_name(one) if several else args.output
        if world().rank == 0:
            one.save(path)
        result = {"plan": str(path), "method": method, "options": one.options, "keep": one.keep, "experts": experts}
        if profile.width is not None:
            result |= {"width": one.width or profile.width, "channels": profile.width}
        if one.found:
            lines.append((shapes_table(one) if "shapes" in one.found else curve_table(one)) + "\n")
            result["found"] = one.found
        lines.append(f"{path}: {plan_line(one, experts)}")
        results.append(result)
    first = shlex.quote(str(results[0]["plan"]))
    beside = f" --profile {shlex.quote(str(args.profile))}" if args.profile else ""
    lines.append(f"next: moecover explain {first}{beside}")
    return Outcome(results if several else results[0], "\n".join(lines))


def _profile(args: argparse.Namespace) -> Profile:
    """The profile that was named, or what importance matrices tell.

    Raises:
        InputError: both or neither, or they cannot be read.
    """
    from moecover.profiling.artifact import Profile
    from moecover.profiling.imatrix import imatrix_profile

    if (args.profile is None) == (not args.imatrix):
        raise InputError("give either PROFILE_DIR or --imatrix NAME=FILE")
    if args.profile is not None:
        return Profile.load(args.profile)
    files = {name: Path(str(path)) for name, path in pairs(args.imatrix, "imatrix", Path).items()}
    return imatrix_profile(files, model=args.model)


def _plans(
    args: argparse.Namespace, bound: str, profile: Profile, method: str, options: dict[str, object]
) -> list[Plan]:
    """The plans that a bound asks for."""
    from moecover.planning.job import plans
    from moecover.planning.lines import calibration_notes
    from moecover.progress import resolve
    from moecover.runtime.world import world

    dtype, device, revision = args.dtype, args.device, args.revision
    if bound == "max_perplexity_increase":
        from moecover.evaluation.bounds import plan_within

        found = plan_within(
            profile,
            args.model,
            args.max_perplexity_increase,
            texts=args.perplexity,
            corpora=args.corpus,
            windows=args.windows,
            bos=args.bos,
            multiple_of=args.multiple_of,
            method=method,
            batch_size=args.batch_size,
            device_map=args.device_map,
            memory_limit=args.memory_limit,
            method_options=options,
            dtype=dtype,
            device=device,
            revision=revision,
        )
        return [found]
    if bound in OF_BYTES and (bound == "budget" or args.shape != "experts"):
        return [_for_budget(args, profile, method, options)]
    if bound == "max_size":
        from moecover.evaluation.bounds import keep_within_size
        from moecover.planning.shapes import Shape

        size, multiple_of = args.max_size, args.multiple_of
        shapes = [Shape(keep_within_size(profile, args.model, size, multiple_of=multiple_of, revision=revision))]
    else:
        shapes = _shapes(args, profile)
    if len(shapes) > 1 and args.output.is_file():
        raise InputError(f"{args.output} is a file. Give a folder for {len(shapes)} plans")
    made = plans(
        profile,
        [shape.keep for shape in shapes],
        [shape.width for shape in shapes],
        method=method,
        options=options,
        model=args.model,
        dtype=dtype,
        device=device,
        device_map=args.device_map,
        memory_limit=args.memory_limit,
        revision=revision,
        here=world(),
        progress=resolve(),
    )
    remedy = "Make the importance matrices of more text" if args.imatrix else None
    for line in calibration_notes(min(made, key=lambda one: one.keep), profile, remedy=remedy):
        resolve().say(line)
    return made


def _for_budget(args: argparse.Namespace, profile: Profile, method: str, options: dict[str, object]) -> Plan:
    """The plan of the shape that a budget of bytes is spent on."""
    from moecover.evaluation.budgets import plan_for_budget

    return plan_for_budget(
        profile,
        args.model,
        budget=args.budget,
        max_size=args.max_size,
        shape=args.shape,
        texts=args.perplexity,
        corpora=args.corpus,
        windows=args.windows,
        bos=args.bos,
        multiple_of=args.multiple_of,
        width_multiple_of=args.width_multiple_of,
        method=method,
        method_options=options,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        device_map=args.device_map,
        memory_limit=args.memory_limit,
        revision=args.revision,
    )


def _shapes(args: argparse.Namespace, profile: Profile) -> list[Shape]:
    """Every number of experts with every width that is asked for; says when a number was rounded."""
    from moecover import progress
    from moecover.planning.shapes import resolve_shape

    experts = [*({"keep": n} for n in args.keep or ()), *({"retain": r} for r in args.retain or ())] or [{}]
    channels = [*({"width": n} for n in args.width or ()), *({"retain_width": r} for r in args.retain_width or ())]
    names = ("multiple_of", "width_multiple_of", "channel_groups")
    multiples = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    found = []
    for asked in [{**one, **two} for one in experts for two in channels or [{}]]:
        shape = resolve_shape(profile.topology, profile.width, **asked, **multiples)
        if multiples and asked not in ({"keep": shape.keep}, {"keep": shape.keep, "width": shape.width}):
            given = " ".join(f"{flag(name)} {value}" for name, value in asked.items())
            rounded = " ".join(f"{flag(name)} {value}" for name, value in multiples.items())
            progress.say(f"{given} with {rounded}: {shape}")
        found.append(shape)
    if len(set(found)) < len(found):
        raise InputError(f"the budgets keep {', '.join(map(str, found))}: give every one once")
    return found


def file_name(plan: Plan) -> str:
    """The name of a plan's file beside others of the same profile."""
    return f"keep-{plan.keep}.json" if plan.width is None else f"keep-{plan.keep}-width-{plan.width}.json"
