"""What each verb does: reads the parsed arguments, gives the result, the text to print and the exit status.

The work itself is in the stage's module. Verbs with many checks, or long work, have a module NAME_verb; the short ones are here.
"""

from __future__ import annotations

import argparse
from typing import Any

from moecover import progress
from moecover.cli.arguments import load_plugins, memory_limit
from moecover.cli.compare import compare_verb
from moecover.cli.evaluate import evaluate_verb
from moecover.cli.generate import generate_verb
from moecover.cli.plan import plan_verb
from moecover.cli.profile import merge_verb, profile_verb
from moecover.cli.prune import prune_verb
from moecover.cli.split import split_verb
from moecover.errors import InputError
from moecover.text import size_text


def _inspect(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.checkpoints.inspection import inspect

    facts = inspect(args.model, revision=args.revision, server=args.server)
    lines = [f"{'model':18}{facts['model']}", f"{'family':18}{facts['family']}"]
    if "experts" in facts:
        shared = f", {facts['shared_experts']} shared" if facts["shared_experts"] else ""
        share = facts["routed_bytes"] / facts["total_bytes"]
        lines += [
            f"{'MoE layers':18}{len(facts['moe_layers'])} of {facts['decoder_layers']} decoder layers",
            f"{'experts':18}{facts['experts']} per layer, top-{facts['top_k']}{shared}",
            f"{'one expert':18}{size_text(facts['expert_bytes'])}; all routed experts {size_text(facts['routed_bytes'])}, {share:.0%} of the model",
            f"{'size now':18}{size_text(facts['total_bytes'])} in {facts['shards']} file{'s' if facts['shards'] != 1 else ''}",
            *(
                line
                for s in facts["sizes"]
                for line in (
                    f"{'retain ' + str(s['percent']) + ' %':18}{size_text(s['bytes'])}, keep {s['keep']}",
                    *(f"{'':18}{text}" for text in s.get("unmet", ())),
                )
            ),
        ]
    else:
        lines.append(f"{'size now':18}{size_text(facts['total_bytes'])}")
    if facts.get("quantised"):
        lines.append(f"{'quantised':18}{facts['quantised']}: cut as it is stored, profile the original that it was made from")  # fmt: skip
    lines += [f"{'note':18}{warning}" for warning in facts["warnings"]]
    lines += [f"{'refused':18}{reason}" for reason in facts["refused"]] or [f"{'refused':18}nothing, it can be pruned"]
    return facts, "\n".join(lines), 1 if facts["refused"] else 0


def _verify(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.corpora.sources import parse_corpora
    from moecover.verification.verify import verify

    if args.tolerance < 0:
        raise InputError(f"--tolerance {args.tolerance} is out of range: 0 or more")
    corpora = list(parse_corpora(args.corpus).items()) if args.corpus else []
    with progress.spinner("reading both checkpoints") as advance:
        result = verify(
            args.model, args.pruned, revision=args.revision, corpora=corpora,
            dtype=args.dtype or "auto", device=args.device or "auto",
            tolerance=args.tolerance, memory_limit=memory_limit(args), advance=advance,
        ).to_dict()  # fmt: skip
    on = f"{result['tokens']:,} tokens of {', '.join(result['corpora'])}"
    if result["equal"]:
        repaired = f" with its {result['repaired']} repaired tensors in place, all others its own" if result["repaired"] else ""  # fmt: skip
        text = f"equal: {args.pruned} gives what the masked original gives{repaired}, largest difference {result['max_abs_difference']:g}, on {on}"
        return result, text, 0
    if result["changed_files"]:
        text = f"NOT equal: files changed since they were written: {', '.join(result['changed_files'])}"
        if result["first_difference"]:
            text += f"; first difference at {result['first_difference']}"
    elif result["changed_tensors"]:
        text = f"NOT equal: {len(result['changed_tensors'])} tensors are neither the original's nor what the repair made, the first is {result['changed_tensors'][0]}"
    else:
        where = result["first_difference"]
        text = f"NOT equal: first difference at {where} ({result['layers'][where]:g}), largest {result['max_abs_difference']:g}, on {on}"
    return result, text, 1


def _demo(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.cli.demo import demo

    return (*demo(args.output, name=args.model), 0)


def _explain(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.planning.artifact import Plan
    from moecover.planning.explaining.facts import explain, text_of
    from moecover.profiling.artifact import Profile
    from moecover.reporting.figures.plan_figures import NAMES, check_folder, draw

    load_plugins(args)
    if not 0 < args.change < 1:
        raise InputError(f"--change {args.change} is out of range: a share of the kept experts, above 0 and below 1")
    if args.output:
        check_folder(args.output, NAMES, overwrite=args.overwrite)
    made, other = Plan.load(args.plan), Plan.load(args.against) if args.against else None
    profile = Profile.load(args.profile) if args.profile else None
    facts = explain(made, profile=profile, against=other, saliency=args.saliency, change=args.change)
    text = text_of(facts, layers=args.layers)
    if args.output:
        pictures = draw(facts, args.output, overwrite=args.overwrite)
        facts["pictures"] = [str(path) for path in pictures]
        text += "\n" + "\n".join(f"picture: {path}" for path in pictures)
    return facts, text, 0


def _report(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.reporting.page import report

    with progress.spinner("drawing the page"):
        made = report(args.run, args.output, figures=args.figures, overwrite=args.overwrite)
    folder = f", {len(made['pictures'])} pictures in {made['figures']}" if made["pictures"] else ""
    return made, f"{made['page']}: {size_text(made['bytes'])}{folder}", 0


def _ls(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.cli.listing import listing

    load_plugins(args)
    rows = listing(args.what)
    width = max(len(row["name"]) for row in rows) + 2
    text = "\n".join(
        f"{row['name']:{width}}{row['summary']}" + (f"  [{row['source']}]" if row["source"] else "") for row in rows
    )
    return rows, text, 0


VERBS = {
    "inspect": _inspect, "generate": generate_verb, "split": split_verb, "profile": profile_verb, "merge": merge_verb,
    "plan": plan_verb, "explain": _explain, "prune": prune_verb, "verify": _verify, "evaluate": evaluate_verb, "compare": compare_verb,
    "report": _report, "demo": _demo, "ls": _ls,
}  # fmt: skip
