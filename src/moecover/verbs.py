"""What each verb does: reads the parsed arguments, gives the result, the text to print and the exit status.

The work itself is in the stage's module; here are the checks that come before it, the log, and the words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.compare_verb import compare_verb
from moecover.errors import InputError
from moecover.evaluate_verb import evaluate_verb
from moecover.generate_verb import generate_verb
from moecover.split_verb import split_verb

KEEP_INPUTS = 8192  # tokens that a search runs on when nothing else is said


def _inspect(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.inspection import inspect

    facts = inspect(args.model, revision=args.revision, server=args.server)
    lines = [f"{'model':18}{facts['model']}", f"{'family':18}{facts['family']}"]
    if "experts" in facts:
        shared = f", {facts['shared_experts']} shared" if facts["shared_experts"] else ""
        share = facts["routed_bytes"] / facts["total_bytes"]
        lines += [
            f"{'MoE layers':18}{len(facts['moe_layers'])} of {facts['decoder_layers']} decoder layers",
            f"{'experts':18}{facts['experts']} per layer, top-{facts['top_k']}{shared}",
            f"{'one expert':18}{_size(facts['expert_bytes'])}; all routed experts {_size(facts['routed_bytes'])}, {share:.0%} of the model",
            f"{'size now':18}{_size(facts['total_bytes'])} in {facts['shards']} file{'s' if facts['shards'] != 1 else ''}",
            *(
                line
                for s in facts["sizes"]
                for line in (
                    f"{'retain ' + str(s['percent']) + ' %':18}{_size(s['bytes'])}, keep {s['keep']}",
                    *(f"{'':18}{text}" for text in s.get("unmet", ())),
                )
            ),
        ]
    else:
        lines.append(f"{'size now':18}{_size(facts['total_bytes'])}")
    if facts.get("quantised"):
        lines.append(f"{'quantised':18}{facts['quantised']}: cut as it is stored, profile the original that it was made from")  # fmt: skip
    lines += [f"{'note':18}{warning}" for warning in facts["warnings"]]
    lines += [f"{'refused':18}{reason}" for reason in facts["refused"]] or [f"{'refused':18}nothing, it can be pruned"]
    return facts, "\n".join(lines), 1 if facts["refused"] else 0


def _check_pass(args: argparse.Namespace) -> None:
    """Refuse what is wrong with the corpora or the pass, before anything is fetched or read."""
    from moecover.corpora import parse_corpora
    from moecover.model import check_device

    parse_corpora(args.corpus)
    for name in ("sequences", "length", "batch_size", "keep_inputs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: 1 or more")
    check_device(args.dtype or "auto", args.device or "auto")
    _memory_limit(args)


def _check_profile_folder(folder: Path, *, overwrite: bool) -> None:
    from moecover.profiles import FILE

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, a folder is to be written there")
    if (folder / FILE).exists() and not overwrite:
        raise InputError(f"{folder / FILE} exists. Choose another folder, or give --overwrite")


def _load_corpora(args: argparse.Namespace, structure: Any) -> list[Any]:
    from moecover.corpora import parse_corpora
    from moecover.corpus import SEQUENCES, load_corpus

    corpora = []
    for name, path in parse_corpora(args.corpus).items():
        with progress.spinner(f"reading corpus {name}"):
            corpus = load_corpus(
                name,
                path or None,
                structure=structure,
                sequences=args.sequences,
                length=args.length,
                seed=args.seed or 0,
            )
        record = corpus.record
        if "length" in record and args.sequences is None and record["sequences"] < SEQUENCES:
            progress.say(f"corpus {name}: only {record['blocks_available']} blocks of {record['length']} tokens are there, {SEQUENCES} are usual")  # fmt: skip
        corpora.append(corpus)
    return corpora


@contextlib.contextmanager
def _profiled(
    args: argparse.Namespace, structure: Any, folder: Path | None, *, extra: int = 0
) -> Iterator[tuple[Any, Any, Any]]:
    """The profile, saved into ``folder`` if there is one; the model, still open; the corpora.

    The memory that is looked for has room for ``extra`` bytes beside.
    """
    from moecover.distributed import own_device, wait_for_all, world
    from moecover.files import PARTIAL
    from moecover.fitting import opened
    from moecover.inputs import num_bytes, sample_of
    from moecover.model import dtype_of
    from moecover.profiling import profile
    from moecover.states import kept_for_later, of_process, remove, remove_all

    here = world()
    corpora = _load_corpora(args, structure)
    keep_inputs = None
    if args.keep_inputs is not None and folder is not None:
        sample = sample_of(corpora, args.keep_inputs)
        keep_inputs = (args.keep_inputs, folder)
    tokens, batch_size = sum(c.num_tokens for c in corpora), args.batch_size or 4
    batch_tokens = batch_size * max(c.tokens.shape[1] for c in corpora)
    states = args.output.with_name(f".{args.output.name}.profile{PARTIAL}")
    state = of_process(states, here.rank) if here.size > 1 else states
    device = own_device(here, args.device or "auto")
    with kept_for_later(state), opened(
        structure, tokens=-(-tokens // here.size), batch_tokens=batch_tokens, dtype=args.dtype or "auto", device=device,
        memory_limit=_memory_limit(args), extra=extra, processes=here.local_size, scratch=state, say=progress.say,
    ) as model:  # fmt: skip
        if keep_inputs:
            topology, width = structure.topology, dtype_of(model).itemsize
            size = num_bytes(sample, len(topology.decoder_layers), topology.hidden_size, width)
            progress.say(f"keeping the inputs of {len(topology.decoder_layers)} layers for {sum(c.num_tokens for c in sample):,} tokens: {_size(size)} in {folder}")  # fmt: skip
        with progress.bar("profiling", -(-tokens // here.size)) as advance:
            made = profile(
                structure, corpora, model=model, batch_size=batch_size, keep_inputs=keep_inputs, state=state,
                here=here, advance=advance, say=progress.say,
            )  # fmt: skip
        if folder is not None and here.rank == 0:
            made.save(folder)
        wait_for_all(here)
        yield made, model, corpora
        remove(state)
        if here.local_rank == 0:
            remove_all(states)


def _memory_limit(args: argparse.Namespace) -> int | None:
    from moecover.fitting import parse_size

    return None if args.memory_limit is None else parse_size(args.memory_limit)


def _headers(args: argparse.Namespace) -> Any:
    """The model's structure; of a hub model from its headers alone, so that a refusal comes before the download."""
    from moecover.source import open_checkpoint
    from moecover.topology import read_structure

    with progress.spinner(f"reading {args.model}"):
        structure = read_structure(open_checkpoint(args.model, revision=args.revision, headers_only=True))
    for warning in structure.warnings:
        progress.say(f"note: {warning}")
    return structure


def _loadable(args: argparse.Namespace) -> Any:
    """The structure of a model that is going to run."""
    from moecover.model import check_loadable

    structure = _headers(args)
    check_loadable(structure)
    return structure


def _files(args: argparse.Namespace, structure: Any) -> Any:
    """The structure with its files on this machine, fetched if they are not."""
    from moecover.topology import read_structure

    if structure.checkpoint.folder is not None:
        return structure
    progress.say(f"fetching {args.model}, {_size(structure.checkpoint.num_bytes)}")
    return read_structure(args.model, revision=args.revision)


def _profile(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.distributed import joined, own_device, world
    from moecover.files import locked
    from moecover.profiles import FILE
    from moecover.profiling import check_alone

    here = world()
    _check_pass(args)
    _check_profile_folder(args.output, overwrite=args.overwrite)
    if args.keep_inputs is not None:
        check_alone(here)
    held = locked(args.output.resolve()) if here.rank == 0 else contextlib.nullcontext()
    group = joined(here, own_device(here, args.device or "auto"))
    with held, group, _profiled(args, _files(args, _loadable(args)), args.output) as (profile, _, _):
        pass
    path = args.output / FILE
    shape = [len(profile.topology.decoder_layers), profile.topology.num_experts]
    tokens = {name: records[0]["tokens"] for name, records in profile.corpora.items()}
    lines = [f"{path}: statistics of {shape[0]} layers x {shape[1]} experts"]
    lines += [f"  {name}: {count:,} tokens" for name, count in tokens.items()]
    lines.append(f"next: moecover plan {shlex.quote(str(args.output))} --retain 0.5 -o plan.json")
    result = {"profile": str(path), "shape": shape, "tokens": tokens, "fingerprint": profile.fingerprint}
    return result, "\n".join(lines), 0


def _load_plugins(args: argparse.Namespace) -> None:
    from moecover.registry import load_plugin

    if args.plugin:
        pass  # so that a plugin cannot take the name of what is built in
    for path in args.plugin:
        load_plugin(path)


def _pairs(arguments: list[str], flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` arguments; values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not name or not equals:
            raise InputError(f"--{flag} {argument}: give NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _method(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Method and options as given, checked."""
    from moecover.planning import DEFAULT_METHOD, check_options

    _load_plugins(args)
    method = args.method or DEFAULT_METHOD
    options = {
        k: v for k in ("saliency", "protect", "seed", "mode", "search") if (v := getattr(args, k)) is not None
    } | _pairs(args.option, "option")
    if args.weight:
        options["weights"] = _pairs(args.weight, "weight")
    if method != "random":
        options.pop("seed", None)  # the others choose nothing by chance; in one shot it is the seed of the sample
    check_options(method, options)
    if args.protect_super_experts:
        options["protect_super_experts"] = True
    return method, options


def _keep(topology: Any, *, keep: int | None, retain: float | None, multiple_of: int | None) -> int:
    """Experts kept per layer; says when they were rounded."""
    from moecover.plans import resolve_keep

    count = resolve_keep(topology, keep=keep, retain=retain, multiple_of=multiple_of)
    given = f"--keep {keep}" if keep is not None else f"--retain {retain}"
    if multiple_of is not None and count != keep:
        progress.say(f"{given} with --multiple-of {multiple_of}: {count} of {topology.num_experts} experts")
    return count


def _plan(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.budget_verb import check_bounds, curve_table, found_plan, keep_of_size
    from moecover.planning import plan_budgets, runs_experts
    from moecover.profiles import Profile

    method, options = _method(args)
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
        keeps = _keeps(args, profile) if bound != "max_size" else [keep_of_size(args, profile, _headers(args))]
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
        lines.append(_plan_line(path, one, experts))
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
    keeps = [_keep(profile.topology, **budget, multiple_of=args.multiple_of) for budget in budgets]
    if len(set(keeps)) < len(keeps):
        raise InputError(f"the budgets keep {', '.join(map(str, keeps))} experts: give every one once")
    return keeps


def _plan_line(path: Path, made: Any, experts: int) -> str:
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
    from moecover.model import check_device, load_model

    dtype = args.dtype or profile.settings["dtype"]
    check_device(dtype, args.device or "auto")
    structure = _files(args, _loadable(args))
    with progress.spinner(f"loading {args.model}"):
        model = load_model(structure, dtype=dtype, device=args.device or "auto")
    with _search_bar(args, structure, budgets) as advance:
        yield {"model": model, "structure": structure, "advance": advance}


def _search_bar(args: argparse.Namespace, structure: Any, budgets: int) -> Any:
    rounds = budgets if args.mode == "progressive" else 1
    return progress.bar("searching", rounds * len(structure.topology.decoder_layers), unit="layers")


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
    from moecover.repair_files import places_on_disk
    from moecover.repairable import check_dtype
    from moecover.repairing import TOKENS, needed_bytes

    if args.repair == "none":
        return 0
    where, dtype = places_on_disk(structure), args.dtype or "auto"
    check_dtype(structure, where, dtype)
    return needed_bytes(structure, where, keep=keep, tokens=args.repair_tokens or TOKENS, dtype=dtype)


def _repaired(
    args: argparse.Namespace, structure: Any, chosen: Any, corpora: Any, model: Any, extra: int, state: Path
) -> Any:
    """The repair that was asked for; ``model`` is there already or None."""
    from moecover.fitting import opened
    from moecover.inputs import sample_of
    from moecover.repair_files import repair
    from moecover.repairing import TOKENS

    sample = sample_of(corpora, args.repair_tokens or TOKENS, flag="--repair-tokens")
    batch_size, dtype, device = args.batch_size or 4, args.dtype or "auto", args.device or "auto"
    opening = contextlib.nullcontext(model) if model is not None else opened(
        structure, tokens=sum(c.num_tokens for c in sample), batch_tokens=batch_size * max(c.tokens.shape[1] for c in sample),
        dtype=dtype, device=device, memory_limit=_memory_limit(args), extra=extra, say=progress.say,
    )  # fmt: skip
    with progress.bar("repairing", len(chosen.layers), unit="layers") as advance:
        return repair(
            structure, chosen, sample, model=opening, kind=args.repair, folder=state, batch_size=batch_size,
            dtype=dtype, device=device, advance=advance, say=progress.say,
        )  # fmt: skip


def _check_saved_profile(args: argparse.Namespace) -> None:
    _check_profile_folder(args.save_profile, overwrite=args.overwrite)
    folder = args.save_profile.resolve()
    for other in (args.output.resolve(), Path(args.model).resolve()):
        if folder == other or other in folder.parents:
            raise InputError(f"--save-profile {args.save_profile} lies in {other}. Choose another folder")


def _prune(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.checkpoint import check_target
    from moecover.corpora import parse_corpora
    from moecover.files import locked
    from moecover.model import check_loadable
    from moecover.plans import Plan
    from moecover.registry import unknown_name
    from moecover.repairable import check_stored

    _check_prune(args)
    chosen, one_shot = None, None
    if args.plan is not None:
        chosen = Plan.load(args.plan)
    if chosen is None or args.repair != "none":
        _check_pass(args)
    if chosen is None:
        method, options = _method(args)
        corpora = parse_corpora(args.corpus)
        if unknown := sorted(options.get("weights", {}).keys() - corpora.keys()):
            raise unknown_name("corpus in --weight", unknown[0], corpora)
        if args.save_profile:
            _check_saved_profile(args)
    structure = _headers(args)
    if args.repair != "none":
        check_stored(structure)
    if chosen is None or args.repair != "none":
        check_loadable(structure)
    if chosen is None:
        keep = _keep(structure.topology, keep=args.keep, retain=args.retain, multiple_of=args.multiple_of)
        one_shot = (method, keep, options)
    extra = _repair_bytes(args, structure, chosen.keep if chosen else keep)
    with locked(check_target(structure, args.output, overwrite=args.overwrite)):
        return _prune_held(args, structure, chosen, one_shot, extra)


def _prune_held(
    args: argparse.Namespace, structure: Any, chosen: Any, one_shot: Any, extra: int
) -> tuple[Any, str, int]:
    """The long part of `_prune`, while no other run can write the same output."""
    from moecover.checkpoint import prune
    from moecover.files import PARTIAL
    from moecover.inputs import sample_of
    from moecover.planning import plan, runs_experts
    from moecover.plans import check_plan
    from moecover.repair_files import kept_for_later
    from moecover.servers import SERVERS, unmet
    from moecover.states import remove

    structure, repaired, model = _files(args, structure), None, None
    state = args.output.resolve().with_name(f".{args.output.resolve().name}.repair{PARTIAL}")
    with kept_for_later(state):
        with contextlib.ExitStack() as stack:
            if chosen is None:
                method, keep, options = one_shot
                profile, model, corpora = stack.enter_context(_profiled(args, structure, args.save_profile, extra=extra))  # fmt: skip
                if runs_experts(method):
                    advance = stack.enter_context(_search_bar(args, structure, 1))
                    sample = sample_of(corpora, args.keep_inputs or KEEP_INPUTS)
                    options |= {"model": model, "structure": structure, "sample": sample, "advance": advance}
                chosen = plan(profile, method=method, keep=keep, **options)
                progress.say(_plan_line(args.output, chosen, structure.topology.num_experts))
            elif args.repair != "none":
                check_plan(chosen, structure, other_weights=args.other_weights)
                corpora = _load_corpora(args, structure)
            if args.repair != "none":
                repaired = _repaired(args, structure, chosen, corpora, model, extra, state)
        del model
        before, after = structure.checkpoint.num_bytes, structure.num_bytes(chosen.keep, mtp=args.mtp)
        with progress.bar("writing", after, unit="bytes") as advance:
            out = prune(
                structure, chosen, args.output, overwrite=args.overwrite, other_weights=args.other_weights, mtp=args.mtp,
                repaired=repaired, command=shlex.join(["moecover", *args.argv]), evaluations=args.evaluation,
                advance=advance, say=progress.say,
            )  # fmt: skip
    remove(state)
    if servers := [s for s in SERVERS if unmet(structure.topology, chosen.keep, s)]:
        progress.say(f"note: {chosen.keep} experts are not what {', '.join(servers)} ask for: moecover inspect {shlex.quote(args.model)} --for {servers[0]}")  # fmt: skip
    experts = structure.topology.num_experts
    revision = f" --revision {shlex.quote(args.revision)}" if args.revision else ""
    result = {"output": str(out), "keep": chosen.keep, "bytes_before": before, "bytes": after}
    text = f"{args.output}: {chosen.keep} of {experts} experts per layer, {_size(before)} -> {_size(after)} ({after / before:.0%})"
    if repaired is not None:
        errors = repaired.mean_errors()
        result["repair"] = {"kind": args.repair, "tensors": len(repaired.hashes), "before": errors[0], "after": errors[1]}  # fmt: skip
        text += f"\nrepaired ({args.repair}): {len(repaired.hashes)} down projections; squared error of a layer's output on the calibration text {errors[0]:.3f} -> {errors[1]:.3f} of its square"
    text += f"\nnext: moecover verify {shlex.quote(args.model)} {shlex.quote(str(args.output))}{revision}"
    return result, text, 0


def _verify(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.corpora import parse_corpora
    from moecover.verification import verify

    if args.tolerance < 0:
        raise InputError(f"--tolerance {args.tolerance} is out of range: 0 or more")
    corpora = list(parse_corpora(args.corpus).items()) if args.corpus else []
    with progress.spinner("reading both checkpoints") as advance:
        result = verify(
            args.model, args.pruned, revision=args.revision, corpora=corpora,
            dtype=args.dtype or "auto", device=args.device or "auto",
            tolerance=args.tolerance, memory_limit=_memory_limit(args), advance=advance,
        )  # fmt: skip
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
    from moecover.demo import demo

    return (*demo(args.output, name=args.model), 0)


def _explain(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.explaining import explain, text_of
    from moecover.pictures import NAMES, check_folder, draw
    from moecover.plans import Plan
    from moecover.profiles import Profile

    _load_plugins(args)
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
    from moecover.reporting import report

    with progress.spinner("drawing the page"):
        made = report(args.run, args.output, figures=args.figures, overwrite=args.overwrite)
    folder = f", {len(made['pictures'])} pictures in {made['figures']}" if made["pictures"] else ""
    return made, f"{made['page']}: {_size(made['bytes'])}{folder}", 0


def _ls(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.listing import listing

    _load_plugins(args)
    rows = listing(args.what)
    width = max(len(row["name"]) for row in rows) + 2
    text = "\n".join(
        f"{row['name']:{width}}{row['summary']}" + (f"  [{row['source']}]" if row["source"] else "") for row in rows
    )
    return rows, text, 0


def _merge(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.profiles import FILE, Profile, merged

    _check_profile_folder(args.output, overwrite=args.overwrite)
    if len(args.profiles) < 2:
        raise InputError("give two profiles or more")
    made = merged([Profile.load(folder) for folder in args.profiles], [str(folder) for folder in args.profiles])
    made.save(args.output)
    tokens = {name: sum(record["tokens"] for record in records) for name, records in made.corpora.items()}
    lines = [f"{args.output / FILE}: {len(args.profiles)} profiles added up"]
    lines += [f"  {name}: {count:,} tokens of {len(made.corpora[name])} samples" for name, count in tokens.items()]
    return {"profile": str(args.output / FILE), "tokens": tokens, "fingerprint": made.fingerprint}, "\n".join(lines), 0


VERBS = {
    "inspect": _inspect, "generate": generate_verb, "split": split_verb, "profile": _profile, "merge": _merge, "plan": _plan, "explain": _explain, "prune": _prune, "verify": _verify,
    "evaluate": evaluate_verb, "compare": compare_verb, "report": _report, "demo": _demo, "ls": _ls,
}  # fmt: skip


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
