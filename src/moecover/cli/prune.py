"""The verb `prune`: reads a plan, or profiles and plans in one shot; repairs if asked to, writes the checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.cli.arguments import (
    check_pass,
    check_profile_folder,
    fetched,
    headers,
    keep_of,
    load_corpora,
    memory_limit,
    method_of,
)
from moecover.cli.plan import KEEP_INPUTS, plan_line, search_bar
from moecover.cli.profile import profiled
from moecover.errors import InputError
from moecover.text import size_text

ONE_SHOT = (
    "corpus", "keep", "retain", "multiple_of", "method", "saliency", "protect", "weight", "protect_super_experts", "mode", "search",
    "option", "plugin", "sequences", "length", "batch_size", "seed", "dtype", "device", "memory_limit", "save_profile", "keep_inputs",
)  # fmt: skip


OF_REPAIR = ("corpus", "sequences", "length", "batch_size", "seed", "dtype", "device", "memory_limit")


def _check_prune(args: argparse.Namespace) -> None:
    """Refuse a request that contradicts itself."""
    if args.repair == "none" and args.repair_tokens is not None:
        raise InputError("--repair-tokens says what a repair runs on: give --repair scale or --repair ridge")
    if args.repair != "none" and args.evaluation:
        raise InputError("--evaluation measured the plan without a repair: evaluate the repaired checkpoint itself")
    if args.repair_tokens is not None and args.repair_tokens < 1:
        raise InputError(f"--repair-tokens {args.repair_tokens} is out of range: 1 or more")
    if args.plan is None:
        if not args.corpus:
            raise InputError("give --plan PLAN, or --corpus with --keep or --retain for one shot")
        if (args.keep is None) == (args.retain is None):
            raise InputError("give exactly one of --keep (experts per layer) and --retain (fraction in (0, 1])")
        if args.evaluation:
            raise InputError("--evaluation goes with --plan: in one shot there is no plan yet that was evaluated")
        return
    given = [
        name for name in ONE_SHOT if (value := getattr(args, name)) is not None and value is not False and value != []
    ]
    if args.repair != "none":
        given = [name for name in given if name not in OF_REPAIR]
        if not args.corpus:
            raise InputError(f"--repair {args.repair} fits weights on calibration text: give --corpus NAME[=PATH]")
    if given:
        raise InputError(f"--plan and --{given[0].replace('_', '-')} do not go together: the plan says what is kept")


def _repair_bytes(args: argparse.Namespace, structure: Any, keep: int) -> int:
    """Memory that the repair takes beside the model, 0 without one; refuses a model that cannot be repaired."""
    from moecover.repairing.layers import TOKENS, needed_bytes
    from moecover.repairing.targets import check_dtype, places_on_disk

    if args.repair == "none":
        return 0
    where, dtype = places_on_disk(structure), args.dtype or "auto"
    check_dtype(structure, where, dtype)
    return needed_bytes(structure, where, keep=keep, tokens=args.repair_tokens or TOKENS, dtype=dtype)


def _repaired(
    args: argparse.Namespace, structure: Any, chosen: Any, corpora: Any, model: Any, extra: int, state: Path
) -> Any:
    """The repair that was asked for; ``model`` is there already or None."""
    from moecover.profiling.layer_inputs import sample_of
    from moecover.repairing.layers import TOKENS
    from moecover.repairing.store import repair
    from moecover.runtime.memory import opened

    sample = sample_of(corpora, args.repair_tokens or TOKENS, flag="--repair-tokens")
    batch_size, dtype, device = args.batch_size or 4, args.dtype or "auto", args.device or "auto"
    opening = contextlib.nullcontext(model) if model is not None else opened(
        structure, tokens=sum(c.num_tokens for c in sample), batch_tokens=batch_size * max(c.tokens.shape[1] for c in sample),
        dtype=dtype, device=device, memory_limit=memory_limit(args), extra=extra, say=progress.say,
    )  # fmt: skip
    with progress.bar("repairing", len(chosen.layers), unit="layers") as advance:
        return repair(
            structure, chosen, sample, model=opening, kind=args.repair, folder=state, batch_size=batch_size,
            dtype=dtype, device=device, advance=advance, say=progress.say,
        )  # fmt: skip


def _check_saved_profile(args: argparse.Namespace) -> None:
    check_profile_folder(args.save_profile, overwrite=args.overwrite)
    folder = args.save_profile.resolve()
    for other in (args.output.resolve(), Path(args.model).resolve()):
        if folder == other or other in folder.parents:
            raise InputError(f"--save-profile {args.save_profile} lies in {other}. Choose another folder")


def prune_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.corpora.sources import parse_corpora
    from moecover.files.atomic import locked
    from moecover.planning.artifact import Plan
    from moecover.pruning.writer import check_target
    from moecover.registry import unknown_name
    from moecover.repairing.targets import check_stored
    from moecover.runtime.loading import check_loadable

    _check_prune(args)
    chosen, one_shot = None, None
    if args.plan is not None:
        chosen = Plan.load(args.plan)
    if chosen is None or args.repair != "none":
        check_pass(args)
    if chosen is None:
        method, options = method_of(args)
        corpora = parse_corpora(args.corpus)
        if unknown := sorted(options.get("weights", {}).keys() - corpora.keys()):
            raise unknown_name("corpus in --weight", unknown[0], corpora)
        if args.save_profile:
            _check_saved_profile(args)
    structure = headers(args)
    if args.repair != "none":
        check_stored(structure)
    if chosen is None or args.repair != "none":
        check_loadable(structure)
    if chosen is None:
        keep = keep_of(structure.topology, keep=args.keep, retain=args.retain, multiple_of=args.multiple_of)
        one_shot = (method, keep, options)
    extra = _repair_bytes(args, structure, chosen.keep if chosen else keep)
    with locked(check_target(structure, args.output, overwrite=args.overwrite)):
        return _prune_held(args, structure, chosen, one_shot, extra)


def _prune_held(
    args: argparse.Namespace, structure: Any, chosen: Any, one_shot: Any, extra: int
) -> tuple[Any, str, int]:
    """The long part of `prune_verb`, while no other run can write the same output."""
    from moecover.checkpoints.servers import SERVERS, unmet
    from moecover.evaluation.artifact import Evaluation
    from moecover.files.atomic import PARTIAL
    from moecover.planning.artifact import check_plan
    from moecover.planning.run import plan, runs_experts
    from moecover.profiling.layer_inputs import sample_of
    from moecover.pruning.writer import prune
    from moecover.repairing.store import kept_for_later
    from moecover.runtime.pass_state import remove

    evaluations = {str(folder): Evaluation.load(folder) for folder in args.evaluation}
    structure, repaired, model = fetched(args, structure), None, None
    state = args.output.resolve().with_name(f".{args.output.resolve().name}.repair{PARTIAL}")
    with kept_for_later(state):
        with contextlib.ExitStack() as stack:
            if chosen is None:
                method, keep, options = one_shot
                profile, model, corpora = stack.enter_context(profiled(args, structure, args.save_profile, extra=extra))  # fmt: skip
                if runs_experts(method):
                    advance = stack.enter_context(search_bar(args, structure, 1))
                    sample = sample_of(corpora, args.keep_inputs or KEEP_INPUTS)
                    options |= {"model": model, "structure": structure, "sample": sample, "advance": advance}
                chosen = plan(profile, method=method, keep=keep, **options)
                progress.say(plan_line(args.output, chosen, structure.topology.num_experts))
            elif args.repair != "none":
                check_plan(chosen, structure, other_weights=args.other_weights)
                corpora = load_corpora(args, structure)
            if args.repair != "none":
                repaired = _repaired(args, structure, chosen, corpora, model, extra, state)
        del model
        before, after = structure.checkpoint.num_bytes, structure.num_bytes(chosen.keep, mtp=args.mtp)
        with progress.bar("writing", after, unit="bytes") as advance:
            out = prune(
                structure, chosen, args.output, overwrite=args.overwrite, other_weights=args.other_weights, mtp=args.mtp,
                repaired=repaired, command=shlex.join(["moecover", *args.argv]), evaluations=evaluations,
                advance=advance, say=progress.say,
            )  # fmt: skip
    remove(state)
    if servers := [s for s in SERVERS if unmet(structure.topology, chosen.keep, s)]:
        progress.say(f"note: {chosen.keep} experts are not what {', '.join(servers)} ask for: moecover inspect {shlex.quote(args.model)} --for {servers[0]}")  # fmt: skip
    experts = structure.topology.num_experts
    revision = f" --revision {shlex.quote(args.revision)}" if args.revision else ""
    result = {"output": str(out), "keep": chosen.keep, "bytes_before": before, "bytes": after}
    text = f"{args.output}: {chosen.keep} of {experts} experts per layer, {size_text(before)} -> {size_text(after)} ({after / before:.0%})"
    if repaired is not None:
        errors = repaired.mean_errors()
        result["repair"] = {"kind": args.repair, "tensors": len(repaired.hashes), "before": errors[0], "after": errors[1]}  # fmt: skip
        text += f"\nrepaired ({args.repair}): {len(repaired.hashes)} down projections; squared error of a layer's output on the calibration text {errors[0]:.3f} -> {errors[1]:.3f} of its square"
    text += f"\nnext: moecover verify {shlex.quote(args.model)} {shlex.quote(str(args.output))}{revision}"
    return result, text, 0
