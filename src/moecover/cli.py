"""The `moecover` command: one verb per stage. stdout carries the result, stderr the log.

Exit status: 0 done; 1 the job failed or the check said no; 2 the request or its input cannot be used as given;
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from moecover import __version__, progress
from moecover.errors import InputError, MoecoverError, is_out_of_memory

EPILOG = """examples:
  moecover inspect Qwen/Qwen1.5-MoE-A2.7B
  moecover prune   Qwen/Qwen1.5-MoE-A2.7B --corpus wikitext2 --corpus c4 --retain 0.5 -o qwen-moe-half
  moecover profile ./model --corpus wikitext2 --corpus mine=notes.jsonl -o profile
  moecover plan    profile --retain 0.25 -o plan.json
  moecover verify  ./model ./pruned
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Options as ``-o, --output OUT`` on every Python (3.13 changed it), so that the generated page is the same."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_corpora(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_argument_group("corpora and the pass over them")
    group.add_argument("--corpus", action="append", default=[], metavar="NAME[=PATH]", required=required, help="a named corpus (moecover ls corpora), or NAME=PATH of a .txt, .jsonl, .jsonl.gz or .parquet file; repeat it: corpora are kept apart")  # fmt: skip
    group.add_argument("--sequences", type=int, metavar="N", help="blocks per corpus (default: up to 128; all rows of input_ids); fewer than N is an error")  # fmt: skip
    group.add_argument("--length", type=int, metavar="N", help="tokens per block of text (default: 2048, or the model's positions if fewer)")  # fmt: skip
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: 4)")
    group.add_argument("--seed", type=int, help="of the sample of blocks, and of method random (default: 0)")
    _add_device(group)


def _add_device(parser: Any) -> None:
    parser.add_argument("--dtype", help="auto (the checkpoint's), bfloat16, float16 or float32")
    parser.add_argument("--device", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")


def _add_plan(parser: argparse.ArgumentParser, *, seed: bool) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument("--method", default=None, help="moecover ls methods (default: tb-coverage)")
    group.add_argument("--saliency", default=None, help="moecover ls saliencies (default: contribution)")
    group.add_argument("--protect", type=float, default=None, metavar="P", help="share of the kept experts that corpora protect in turn, 0 to 1 (default: 0.5)")  # fmt: skip
    group.add_argument("--keep", type=int, metavar="K", help="experts kept per layer")
    group.add_argument("--retain", type=float, metavar="R", help="fraction of experts kept per layer, in (0, 1]")
    if seed:
        group.add_argument("--seed", type=int, default=None, help="of method random (default: 0)")


def make_parser() -> argparse.ArgumentParser:
    """The command line; docs/cli.md is generated from it."""
    parser = _Parser(
        prog="moecover",
        description="Makes a sparse Mixture-of-Experts language model smaller by removing whole routed experts.",
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"moecover {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("-q", "--quiet", action="store_true", help="no log and no progress on stderr")
    verbs: Any = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common], formatter_class=_Formatter
        )
        return made

    def model(p: argparse.ArgumentParser) -> None:
        p.add_argument("model", metavar="MODEL", help="local folder or hub id (owner/name)")
        p.add_argument("--revision", help="branch, tag or commit of a hub model")

    p = verb("inspect", "say what a model's routed experts are and weigh, and whether it can be pruned")
    model(p)

    p = verb("profile", "run corpora through a model and record the statistics of every expert")
    model(p)
    _add_corpora(p, required=True)
    p.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PROFILE_DIR", help="folder for profile.safetensors"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a profile that is there")

    p = verb("plan", "choose the experts to keep from a profile")
    p.add_argument("profile", type=Path, metavar="PROFILE_DIR", help="folder that `moecover profile` wrote")
    _add_plan(p, seed=True)
    p.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PLAN", help="plan.json to write (replaced if it exists)"
    )

    p = verb("prune", "write the pruned checkpoint, from a plan or in one shot from corpora")
    model(p)
    p.add_argument(
        "--plan", type=Path, metavar="PLAN", help="plan.json; without it, give --corpus and --keep or --retain"
    )
    _add_corpora(p, required=False)
    _add_plan(p, seed=False)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if moecover wrote it")
    p.add_argument(
        "--save-profile", type=Path, metavar="PROFILE_DIR", help="one shot: keep the profile, for other budgets"
    )
    p.add_argument("--other-weights", action="store_true", help="accept a plan made on other weights of the same shape")

    p = verb("verify", "prove a pruned checkpoint against the masked original on real text")
    model(p)
    p.add_argument("pruned", metavar="OUT", help="folder that `moecover prune` wrote")
    p.add_argument("--corpus", action="append", default=[], metavar="NAME[=PATH]", help="text to run (default: shipped held-out text)")  # fmt: skip
    p.add_argument("--tolerance", type=float, default=0.0, metavar="T", help="largest difference allowed as a share of a layer's largest value (default: 0, every bit equal)")  # fmt: skip
    _add_device(p)

    p = verb("demo", "prune the shipped model and show what each method leaves of it")
    p.add_argument("-o", "--output", type=Path, default=Path("demo-out"), metavar="DIR", help="folder to write (default: demo-out)")  # fmt: skip

    p = verb("ls", "list methods, saliencies, corpora or families")
    p.add_argument("what", choices=("methods", "saliencies", "corpora", "families"))
    return parser


# --------------------------------------------------------------------------------------------------------------- verbs
def _inspect(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.topology import inspect

    facts = inspect(args.model, revision=args.revision)
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
                f"{'retain ' + str(s['percent']) + ' %':18}{_size(s['bytes'])}, keep {s['keep']}"
                for s in facts["sizes"]
            ),
        ]
    else:
        lines.append(f"{'size now':18}{_size(facts['total_bytes'])}")
    lines += [f"{'note':18}{warning}" for warning in facts["warnings"]]
    lines += [f"{'refused':18}{reason}" for reason in facts["refused"]] or [f"{'refused':18}nothing, it can be pruned"]
    return facts, "\n".join(lines), 1 if facts["refused"] else 0


def _check_pass(args: argparse.Namespace) -> None:
    """Refuse what is wrong with the corpora or the pass, before anything is fetched or read."""
    from moecover.corpus import parse_corpora
    from moecover.profiling import check_device

    parse_corpora(args.corpus)
    for name in ("sequences", "length", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: 1 or more")
    check_device(args.dtype or "auto", args.device or "auto")


def _check_profile_folder(folder: Path, *, overwrite: bool) -> None:
    from moecover.profiling import FILE

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, a folder is to be written there")
    if (folder / FILE).exists() and not overwrite:
        raise InputError(f"{folder / FILE} exists. Choose another folder, or give --overwrite")


def _load_corpora(args: argparse.Namespace, structure: Any) -> list[Any]:
    from moecover.corpus import SEQUENCES, load_corpus, parse_corpora

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


def _make_profile(args: argparse.Namespace, structure: Any) -> Any:
    from moecover.profiling import load_model, profile

    corpora = _load_corpora(args, structure)
    with progress.spinner(f"loading {args.model}"):
        model = load_model(structure, dtype=args.dtype or "auto", device=args.device or "auto")
    with progress.bar("profiling", sum(c.num_tokens for c in corpora)) as advance:
        return profile(structure, corpora, model=model, batch_size=args.batch_size or 4, advance=advance)


def _headers(args: argparse.Namespace) -> Any:
    """The model's structure; of a hub model from its headers alone, so that a refusal comes before the download."""
    from moecover.source import open_checkpoint
    from moecover.topology import read_structure

    structure = read_structure(open_checkpoint(args.model, revision=args.revision, headers_only=True))
    for warning in structure.warnings:
        progress.say(f"note: {warning}")
    return structure


def _files(args: argparse.Namespace, structure: Any) -> Any:
    """The structure with its files on this machine, fetched if they are not."""
    from moecover.topology import read_structure

    if structure.checkpoint.folder is not None:
        return structure
    progress.say(f"fetching {args.model}, {_size(structure.checkpoint.num_bytes)}")
    return read_structure(args.model, revision=args.revision)


def _profile(args: argparse.Namespace) -> tuple[Any, str, int]:
    _check_pass(args)
    _check_profile_folder(args.output, overwrite=args.overwrite)
    profile = _make_profile(args, _files(args, _headers(args)))
    path = profile.save(args.output)
    shape = [len(profile.topology.decoder_layers), profile.topology.num_experts]
    tokens = {name: records[0]["tokens"] for name, records in profile.corpora.items()}
    lines = [f"{path}: statistics of {shape[0]} layers x {shape[1]} experts"]
    lines += [f"  {name}: {count:,} tokens" for name, count in tokens.items()]
    lines.append(f"next: moecover plan {shlex.quote(str(args.output))} --retain 0.5 -o plan.json")
    result = {"profile": str(path), "shape": shape, "tokens": tokens, "fingerprint": profile.fingerprint}
    return result, "\n".join(lines), 0


def _method(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Method and options as given, checked."""
    from moecover.planning import DEFAULT_METHOD, check_options

    method = args.method or DEFAULT_METHOD
    options = {k: v for k in ("saliency", "protect", "seed") if (v := getattr(args, k)) is not None}
    if method != "random":
        options.pop("seed", None)  # the others choose nothing by chance; in one shot it is the seed of the sample
    check_options(method, options)
    return method, options


def _plan(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.planning import plan
    from moecover.profiling import Profile

    method, options = _method(args)
    profile = Profile.load(args.profile)
    made = plan(profile, method=method, keep=args.keep, retain=args.retain, **options)
    made.save(args.output)
    experts = profile.topology.num_experts
    text = f"{args.output}: {made.method} keeps {made.keep} of {experts} experts in {len(made.layers)} layers"
    if any(layer.protected for layer in made.layers):
        counts = {c: len(ids) for c, ids in made.layers[0].protected.items()}
        text += "; protected per layer: " + ", ".join(f"{n} by {c}" for c, n in counts.items())
    result = {
        "plan": str(args.output),
        "method": made.method,
        "options": made.options,
        "keep": made.keep,
        "experts": experts,
    }
    return result, text, 0


ONE_SHOT = (
    "corpus", "keep", "retain", "method", "saliency", "protect", "sequences", "length", "batch_size", "seed", "dtype",
    "device", "save_profile",
)  # fmt: skip


def _check_prune(args: argparse.Namespace) -> None:
    """Refuse a request that contradicts itself."""
    if args.plan is None:
        if not args.corpus:
            raise InputError("give --plan PLAN, or --corpus with --keep or --retain for one shot")
        if (args.keep is None) == (args.retain is None):
            raise InputError("give exactly one of --keep (experts per layer) and --retain (fraction in (0, 1])")
        return
    given = [name for name in ONE_SHOT if getattr(args, name) not in (None, [])]
    if given:
        raise InputError(f"--plan and --{given[0].replace('_', '-')} do not go together: the plan says what is kept")


def _check_saved_profile(args: argparse.Namespace) -> None:
    _check_profile_folder(args.save_profile, overwrite=args.overwrite)
    folder = args.save_profile.resolve()
    for other in (args.output.resolve(), Path(args.model).resolve()):
        if folder == other or other in folder.parents:
            raise InputError(f"--save-profile {args.save_profile} lies in {other}. Choose another folder")


def _prune(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.checkpoint import check_target, prune
    from moecover.planning import Plan, plan
    from moecover.topology import resolve_keep

    _check_prune(args)
    chosen = None
    if args.plan is not None:
        chosen = Plan.load(args.plan)
    else:
        _check_pass(args)
        method, options = _method(args)
        if args.save_profile:
            _check_saved_profile(args)
    structure = _headers(args)
    if chosen is None:
        resolve_keep(structure.topology, keep=args.keep, retain=args.retain)
    check_target(structure, args.output, overwrite=args.overwrite)
    structure = _files(args, structure)
    if chosen is None:
        profile = _make_profile(args, structure)
        if args.save_profile:
            profile.save(args.save_profile)
        chosen = plan(profile, method=method, keep=args.keep, retain=args.retain, **options)
    before, after = structure.checkpoint.num_bytes, structure.num_bytes(chosen.keep)
    with progress.bar("writing", after, unit="bytes") as advance:
        out = prune(
            structure, chosen, args.output, overwrite=args.overwrite, other_weights=args.other_weights,
            command=shlex.join(["moecover", *args.argv]), advance=advance,
        )  # fmt: skip
    experts = structure.topology.num_experts
    revision = f" --revision {shlex.quote(args.revision)}" if args.revision else ""
    text = (
        f"{args.output}: {chosen.keep} of {experts} experts per layer, {_size(before)} -> {_size(after)} ({after / before:.0%})\n"
        f"next: moecover verify {shlex.quote(args.model)} {shlex.quote(str(args.output))}{revision}"
    )
    return {"output": str(out), "keep": chosen.keep, "bytes_before": before, "bytes": after}, text, 0


def _verify(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.corpus import parse_corpora
    from moecover.evaluation import verify

    if args.tolerance < 0:
        raise InputError(f"--tolerance {args.tolerance} is out of range: 0 or more")
    corpora = list(parse_corpora(args.corpus).items()) if args.corpus else []
    with progress.spinner("reading both checkpoints") as advance:
        result = verify(
            args.model, args.pruned, revision=args.revision, corpora=corpora,
            dtype=args.dtype or "auto", device=args.device or "auto",
            tolerance=args.tolerance, advance=advance,
        )  # fmt: skip
    on = f"{result['tokens']:,} tokens of {', '.join(result['corpora'])}"
    if result["equal"]:
        text = f"equal: {args.pruned} gives what the masked original gives, largest difference {result['max_abs_difference']:g}, on {on}"
        return result, text, 0
    if result["changed_files"]:
        text = f"NOT equal: files changed since they were written: {', '.join(result['changed_files'])}"
        if result["first_difference"]:
            text += f"; first difference at {result['first_difference']}"
    else:
        where = result["first_difference"]
        text = f"NOT equal: first difference at {where} ({result['layers'][where]:g}), largest {result['max_abs_difference']:g}, on {on}"
    return result, text, 1


def _demo(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.demo import demo

    return (*demo(args.output), 0)


def _ls(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.listing import listing

    rows = listing(args.what)
    width = max(len(row["name"]) for row in rows) + 2
    text = "\n".join(
        f"{row['name']:{width}}{row['summary']}" + (f"  [{row['source']}]" if row["source"] else "") for row in rows
    )
    return rows, text, 0


VERBS = {
    "inspect": _inspect, "profile": _profile, "plan": _plan, "prune": _prune, "verify": _verify, "demo": _demo, "ls": _ls,
}  # fmt: skip


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def _quiet_libraries(*, quiet: bool) -> None:
    """Keep other libraries' bars and advice out of the log (the user's own settings stay)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if quiet or not sys.stderr.isatty() else "0")


def _print(text: str, file: Any) -> None:
    """Print, also where nobody reads any more (a closed pipe)."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _run(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    args.argv = argv
    progress.quiet = args.quiet
    _quiet_libraries(quiet=args.quiet)
    result, text, status = VERBS[args.verb](args)
    _print(json.dumps(result, indent=1) if args.json else text, sys.stdout)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    except ValueError:
        previous = None  # not in the main thread: the caller's business
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except MoecoverError as error:
        _print(f"moecover: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _print("moecover: interrupted, nothing half-written was left", sys.stderr)
        return 130
    except OSError as error:  # a file or folder that cannot be read, where no better message was at hand
        _print(f"moecover: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _print("moecover: not enough memory. Give a smaller --batch-size or --length, or a smaller --dtype", sys.stderr)
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    raise SystemExit(main())
