"""The verb `plan`: which experts stay, for a number of experts, or for a bound on size or perplexity."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.cli.corpus_options import add_bos
from moecover.cli.options import add_device, add_method, add_output, add_revision, method_arguments
from moecover.cli.plan_tables import curve_table, shapes_table
from moecover.cli.verb import Outcome
from moecover.errors import InputError, flag

if TYPE_CHECKING:
    from moecover.planning.artifact import Plan
    from moecover.planning.shapes import Shape
    from moecover.profiling.artifact import Profile

HELP = "choose the experts to keep from a profile"
BOUNDS = ("keep", "retain", "budget", "max_size", "max_perplexity_increase")
OF_BYTES = ("budget", "max_size")
WIDTHS = ("width", "retain_width")
OF_TEXT = ("perplexity", "corpus", "windows", "bos", "batch_size")  # options of what is measured on held-out text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("profile", type=Path, metavar="PROFILE_DIR", help="folder that `moecover profile` wrote")
    add_method(parser, several=True, has_seed=False)
    _add_bounds(parser)
    group = parser.add_argument_group("the model, for bounds and for methods that run the experts")
    group.add_argument("--model", metavar="MODEL", help="the model that was profiled: local folder or hub id")
    add_revision(group)
    add_device(group)
    text = "plan.json to write (replaced if it exists); for several a folder, which gets keep-K[-width-W].json"
    add_output(parser, "PLAN", text)


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("find the shape, instead of --keep or --retain")
    group.add_argument(
        "--budget",
        metavar="SHARE",
        help="share of the experts' bytes that stays, such as 50%%",
    )
    group.add_argument(
        "--max-perplexity-increase",
        metavar="PERCENT",
        help="the fewest experts with which the perplexity of every held-out text is at most this much above "
        "the model's "
        "own (runs the model), such as 10%%",
    )
    group.add_argument(
        "--max-size",
        metavar="SIZE",
        help="the most whose checkpoint is at most this large, such as 12GB (reads headers of the model)",
    )
    group.add_argument(
        "--shape",
        default="experts",
        metavar="SHAPE",
        help="what --budget or --max-size is spent on: experts, whole ones; KxW, K experts of W channels; auto, of "
        "the shapes of equal bytes the one that loses least on held-out text (runs MODEL) (default: experts)",
    )
    group.add_argument(
        "--perplexity",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="held-out text to measure on; repeat it (default: blocks of the calibration corpora that the profile did "
        "not use)",
    )
    group.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="file of a calibration corpus, to find the blocks that the profile did not use; repeat it; named corpora "
        "need none",
    )
    group.add_argument("--windows", type=int, metavar="N", help="windows or blocks per text at most (default: 64)")
    add_bos(group, "a window")
    group.add_argument("--batch-size", type=int, metavar="N", help="windows per forward pass (default: 1)")


def run(args: argparse.Namespace) -> Outcome:
    """Write the plan or plans; print a line for each, and the curve of a search for the number of experts."""
    from moecover.planning.job import check_search
    from moecover.planning.lines import plan_line
    from moecover.planning.methods import METHODS
    from moecover.profiling.artifact import Profile

    method, options = method_arguments(args, shared_seed=False)
    bound = which_bound(args)
    needs_model = METHODS[method].runs_experts or bound in (*OF_BYTES, "max_perplexity_increase")
    if args.model and not needs_model:
        raise InputError(f"--model is no option of method {method}: it plans from the profile alone")
    check_model_options(args, bound, method)
    profile = Profile.load(args.profile)
    if METHODS[method].runs_experts:
        check_search(method, profile, args.model, name=str(args.profile))
    made = _plans(args, bound, profile, method, options)
    several = len(made) > 1
    lines, results, experts = [], [], profile.topology.num_experts
    for one in made:
        path = args.output / file_name(one) if several else args.output
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
    lines.append(f"next: moecover explain {first} --profile {shlex.quote(str(args.profile))}")
    return Outcome(results if several else results[0], "\n".join(lines))


def which_bound(args: argparse.Namespace) -> str:
    """Which bound was given.

    Raises:
        InputError: none, several, or an option that belongs to another one.
    """
    given = [name for name in BOUNDS if getattr(args, name) is not None]
    thin = [name for name in WIDTHS if getattr(args, name) is not None]
    if len(thin) > 1:
        raise InputError("give one of --width (channels of an expert) and --retain-width (fraction in (0, 1])")
    if not given and thin:
        given = thin
    if len(given) != 1:
        raise InputError(
            "give exactly one of --keep (experts per layer), --retain (fraction in (0, 1]), --budget, --max-size and "
            "--max-perplexity-increase"
        )
    (bound,) = given
    measures = bound == "max_perplexity_increase" or (bound in OF_BYTES and args.shape == "auto")
    stray = [name for name in OF_TEXT if getattr(args, name) not in (None, [])]
    if stray and not measures:
        raise InputError(
            f"{flag(stray[0])} goes with --max-perplexity-increase and --shape auto; {flag(bound)} measures nothing"
        )
    if args.shape != "experts" and bound not in OF_BYTES:
        raise InputError(f"--shape {args.shape} says what --budget or --max-size is spent on: give one of them")
    if bound in (*OF_BYTES, "max_perplexity_increase") and thin:
        raise InputError(f"{flag(bound)} and {flag(thin[0])} exclude each other: give --shape KxW, or --shape auto")
    if (measures or bound == "max_size") and not args.model:
        raise InputError(f"{flag(bound)} looks at the model: give --model MODEL")
    return bound


def check_model_options(args: argparse.Namespace, bound: str, method: str) -> None:
    """Refuse options on a model that does not run, or is not read at all.

    Raises:
        InputError: names the option.
    """
    from moecover.planning.methods import METHODS

    runs = METHODS[method].runs_experts or bound == "max_perplexity_increase"
    runs = runs or (bound in OF_BYTES and args.shape == "auto")
    names = ("dtype", "device", "memory_limit") if not runs else ()
    names = (*names, "revision") if not args.model else names
    if stray := [name for name in names if getattr(args, name) is not None]:
        raise InputError(f"{flag(stray[0])} has no use here: no model runs for {flag(bound)} with method {method}")


def _plans(
    args: argparse.Namespace, bound: str, profile: Profile, method: str, options: dict[str, object]
) -> list[Plan]:
    """The plans that a bound asks for."""
    from moecover.planning.job import plans
    from moecover.progress import resolve

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
    return plans(
        profile,
        [shape.keep for shape in shapes],
        [shape.width for shape in shapes],
        method=method,
        options=options,
        model=args.model,
        dtype=dtype,
        device=device,
        memory_limit=args.memory_limit,
        revision=revision,
        progress=resolve(),
    )


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
