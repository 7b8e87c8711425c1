"""The verb `plan`: reads a profile, for some methods and budgets the model too; writes plans, says what they keep."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.cli.arguments import fetched, headers, keep_of, loadable, method_of
from moecover.errors import InputError

KEEP_INPUTS = 8192  # tokens that a search runs on when nothing else is said


def plan_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.cli.budget_verb import check_bounds, curve_table, found_plan, keep_of_size
    from moecover.planning.run import plan_budgets, runs_experts
    from moecover.profiling.artifact import Profile

    method, options = method_of(args)
    bound, searches = check_bounds(args), runs_experts(method)
    if args.model and not searches and bound in ("keep", "retain"):
        raise InputError(f"--model is no option of method {method}: it plans from the profile alone")
    profile = Profile.load(args.profile)
    if searches:
        _check_search(args, method, profile)
    several = len(getattr(args, bound)) > 1 if bound in ("keep", "retain") else False
    if bound == "max_perplexity_increase":
        made = [found_plan(args, profile, method, options)]
    else:
        keeps = _keeps(args, profile) if bound != "max_size" else [keep_of_size(args, profile, headers(args))]
        if several and args.output.is_file():
            raise InputError(f"{args.output} is a file, a folder for {len(keeps)} plans is to be written there")
        with contextlib.ExitStack() as stack:
            if searches:
                options |= stack.enter_context(_searching(args, profile, len(keeps)))
            made = plan_budgets(profile, method=method, keeps=keeps, **options)
    experts, lines, results = profile.topology.num_experts, [], list[dict[str, Any]]()
    for one in made:
        path = args.output / f"keep-{one.keep}.json" if several else args.output
        one.save(path)
        lines.append(plan_line(path, one, experts))
        result = {"plan": str(path), "method": method, "options": one.options, "keep": one.keep, "experts": experts}
        if one.found:
            lines.insert(0, curve_table(one.found, one.keep) + "\n")
            result["found"] = one.found
        results.append(result)
    lines.append(f"next: moecover explain {shlex.quote(results[0]['plan'])} --profile {shlex.quote(str(args.profile))}")
    return results if several else results[0], "\n".join(lines), 0


def _keeps(args: argparse.Namespace, profile: Any) -> list[int]:
    """Experts per layer of ``--keep`` or ``--retain``."""
    budgets = [{"keep": k, "retain": None} for k in args.keep or ()] + [{"keep": None, "retain": r} for r in args.retain or ()]  # fmt: skip
    keeps = [keep_of(profile.topology, **budget, multiple_of=args.multiple_of) for budget in budgets]
    if len(set(keeps)) < len(keeps):
        raise InputError(f"the budgets keep {', '.join(map(str, keeps))} experts: give every one once")
    return keeps


def plan_line(path: Path, made: Any, experts: int) -> str:
    """A plan in one line, and where it is."""
    text = f"{path}: {made.method} keeps {made.keep} of {experts} experts in {len(made.layers)} layers"
    if any(layer.protected for layer in made.layers):
        counts = {c: len(ids) for c, ids in made.layers[0].protected.items()}
        text += "; protected per layer: " + ", ".join(f"{n} by {c}" for c, n in counts.items())
    if required := sum(len(layer.required) for layer in made.layers):
        text += f"; {required} super experts kept"
    if losses := [layer.loss for layer in made.layers if layer.loss is not None]:
        ways = " and ".join(sorted({layer.search for layer in made.layers}))
        text += f"; {ways} search on {made.layers[0].tokens:,} tokens, loss {sum(losses):.4g}"
    return text


def _check_search(args: argparse.Namespace, method: str, profile: Any) -> None:
    if not args.model:
        raise InputError(f"--method {method} runs the experts: give --model MODEL, the model of the profile")
    if profile.inputs is None:
        raise InputError(f"{args.profile} keeps no inputs of the layers, which {method} needs. Make it with `moecover profile ... --keep-inputs {KEEP_INPUTS}`")  # fmt: skip


@contextlib.contextmanager
def _searching(args: argparse.Namespace, profile: Any, budgets: int) -> Iterator[dict[str, Any]]:
    """The model of a profile, loaded for a search, and a bar."""
    from moecover.runtime.loading import check_device, load_model

    dtype = args.dtype or profile.settings["dtype"]
    check_device(dtype, args.device or "auto")
    structure = fetched(args, loadable(args))
    with progress.spinner(f"loading {args.model}"):
        model = load_model(structure, dtype=dtype, device=args.device or "auto")
    with search_bar(args, structure, budgets) as advance:
        yield {"model": model, "structure": structure, "advance": advance}


def search_bar(args: argparse.Namespace, structure: Any, budgets: int) -> Any:
    """Progress of a search over all layers, for so many budgets."""
    rounds = budgets if args.mode == "progressive" else 1
    return progress.bar("searching", rounds * len(structure.topology.decoder_layers), unit="layers")
