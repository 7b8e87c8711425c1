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
from moecover.errors import InputError, MoecoverError

EPILOG = """examples:
  moecover inspect Qwen/Qwen1.5-MoE-A2.7B
  moecover prune   Qwen/Qwen1.5-MoE-A2.7B --corpus wikitext2 --corpus c4 --retain 0.5 -o qwen-moe-half
  moecover profile ./model --corpus wikitext2 --corpus mine=notes.jsonl -o profile
  moecover plan    profile --retain 0.25 -o plan.json
  moecover verify  ./model ./pruned
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_corpora(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_argument_group("corpora and the pass over them")
    group.add_argument("--corpus", action="append", default=[], metavar="NAME[=PATH]", required=required, help="a named corpus (moecover ls corpora), or NAME=PATH of a .txt, .jsonl, .jsonl.gz or .parquet file; repeat it: corpora are kept apart")  # fmt: skip
    group.add_argument("--sequences", type=int, metavar="N", help="blocks per corpus (default: up to 128; all rows of input_ids); fewer than N is an error")  # fmt: skip
    group.add_argument("--length", type=int, metavar="N", help="tokens per block of text (default: 2048, or the model's positions if fewer)")  # fmt: skip
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences per forward pass (default: 4)")
    group.add_argument("--seed", type=int, default=0, help="of the sample of blocks, and of method random (default: 0)")
    _add_device(group)


def _add_device(parser: Any) -> None:
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), bfloat16, float16 or float32")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moecover {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("-q", "--quiet", action="store_true", help="no log and no progress on stderr")
    verbs: Any = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common]
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


def _load_corpora(args: argparse.Namespace, structure: Any) -> list[Any]:
    from moecover.corpus import load_corpus, load_tokenizer, parse_corpora

    sources = parse_corpora(args.corpus)
    for name in ("sequences", "length", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: 1 or more")
    text = structure.checkpoint.config.get("text_config", structure.checkpoint.config)
    tokenizer = load_tokenizer(structure.checkpoint.path)
    corpora = []
    for name, path in sources.items():
        with progress.spinner(f"reading corpus {name}"):
            corpus = load_corpus(
                name, path or None, tokenizer=tokenizer, sequences=args.sequences, length=args.length, seed=args.seed,
                vocab_size=text.get("vocab_size"), max_length=text.get("max_position_embeddings"),
            )  # fmt: skip
        record = corpus.record
        if "length" in record and args.sequences is None and record["sequences"] < 128:
            progress.say(f"corpus {name}: only {record['blocks_available']} blocks of {record['length']} tokens are there, 128 are usual")  # fmt: skip
        corpora.append(corpus)
    return corpora


def _make_profile(args: argparse.Namespace, structure: Any, corpora: list[Any]) -> Any:
    from moecover.profiling import load_model, profile

    with progress.spinner(f"loading {args.model}"):
        model = load_model(structure, dtype=args.dtype, device=args.device)
    with progress.bar("profiling", sum(c.num_tokens for c in corpora)) as advance:
        return profile(structure, corpora, model=model, batch_size=args.batch_size, advance=advance)


def _structure(args: argparse.Namespace) -> Any:
    from moecover.topology import read_structure

    structure = read_structure(args.model, revision=args.revision)
    for warning in structure.warnings:
        progress.say(f"note: {warning}")
    return structure


def _profile(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.corpus import parse_corpora
    from moecover.profiling import FILE

    parse_corpora(args.corpus)
    if (args.output / FILE).exists() and not args.overwrite:
        raise InputError(f"{args.output / FILE} exists. Choose another folder, or give --overwrite")
    structure = _structure(args)
    corpora = _load_corpora(args, structure)
    profile = _make_profile(args, structure, corpora)
    path = profile.save(args.output)
    shape = [len(profile.topology.decoder_layers), profile.topology.num_experts]
    tokens = {c.name: c.num_tokens for c in corpora}
    lines = [f"{path}: statistics of {shape[0]} layers x {shape[1]} experts"]
    lines += [f"  {name}: {count:,} tokens" for name, count in tokens.items()]
    lines.append(f"next: moecover plan {shlex.quote(str(args.output))} --retain 0.5 -o plan.json")
    return (
        {"profile": str(path), "shape": shape, "tokens": tokens, "fingerprint": profile.fingerprint},
        "\n".join(lines),
        0,
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    from moecover.planning import DEFAULT_METHOD

    options = {k: v for k in ("saliency", "protect", "seed") if (v := getattr(args, k)) is not None}
    if args.verb == "prune" and (args.method or DEFAULT_METHOD) != "random":
        options.pop("seed")  # there it is first of all the seed of the sample of blocks
    return {"method": args.method or DEFAULT_METHOD, **options}


def _plan(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.planning import plan
    from moecover.profiling import Profile

    profile = Profile.load(args.profile)
    made = plan(profile, keep=args.keep, retain=args.retain, **_options(args))
    made.save(args.output)
    experts = profile.topology.num_experts
    text = f"{args.output}: {made.method} keeps {made.keep} of {experts} experts in {len(made.layers)} layers"
    result = {
        "plan": str(args.output),
        "method": made.method,
        "options": made.options,
        "keep": made.keep,
        "experts": experts,
    }
    if any(layer.protected for layer in made.layers):
        counts = {c: len(ids) for c, ids in made.layers[0].protected.items()}
        text += "; protected per layer: " + ", ".join(f"{n} by {c}" for c, n in counts.items())
    return result, text, 0


def _check_one_shot(args: argparse.Namespace) -> None:
    if args.plan is None:
        if not args.corpus:
            raise InputError("give --plan PLAN, or --corpus with --keep or --retain for one shot")
        return
    given = [f"--{k}" for k in ("corpus", "keep", "retain", "method", "saliency", "protect") if getattr(args, k)]
    if given or args.save_profile:
        raise InputError(
            f"--plan and {given[0] if given else '--save-profile'} do not go together: the plan says what is kept"
        )


def _prune(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.checkpoint import check_target, pieces_by_shard, prune
    from moecover.corpus import parse_corpora
    from moecover.planning import METHODS, Plan, check_plan, plan
    from moecover.saliency import SALIENCIES
    from moecover.topology import resolve_keep

    _check_one_shot(args)
    if args.plan is not None:
        chosen = Plan.load(args.plan)
    else:
        parse_corpora(args.corpus)
        METHODS[args.method or "tb-coverage"], SALIENCIES[args.saliency or "contribution"]
    structure = _structure(args)
    check_target(structure, args.output, overwrite=args.overwrite)
    if args.plan is None:
        resolve_keep(structure.topology, keep=args.keep, retain=args.retain)
        profile = _make_profile(args, structure, _load_corpora(args, structure))
        if args.save_profile:
            profile.save(args.save_profile)
        chosen = plan(profile, keep=args.keep, retain=args.retain, **_options(args))
    check_plan(chosen, structure, other_weights=args.other_weights)
    total = sum(p.num_bytes for pieces in pieces_by_shard(structure, chosen).values() for p in pieces)
    command = shlex.join(["moecover", *args.argv])
    with progress.bar("writing", total, unit="bytes") as advance:
        out = prune(
            structure, chosen, args.output, overwrite=args.overwrite, other_weights=args.other_weights,
            command=command, advance=advance,
        )  # fmt: skip
    before = structure.checkpoint.num_bytes
    text = (
        f"{args.output}: {chosen.keep} of {structure.topology.num_experts} experts per layer, "
        f"{_size(before)} -> {_size(total)} ({total / before:.0%})\n"
        f"next: moecover verify {shlex.quote(args.model)} {shlex.quote(str(args.output))}"
    )
    return {"output": str(out), "keep": chosen.keep, "bytes_before": before, "bytes": total}, text, 0


def _verify(args: argparse.Namespace) -> tuple[Any, str, int]:
    from moecover.corpus import parse_corpora
    from moecover.evaluation import verify

    if args.tolerance < 0:
        raise InputError(f"--tolerance {args.tolerance} is out of range: 0 or more")
    corpora = list(parse_corpora(args.corpus).items()) if args.corpus else []
    with progress.spinner("reading both checkpoints") as advance:
        result = verify(
            args.model, args.pruned, revision=args.revision, corpora=corpora, dtype=args.dtype, device=args.device,
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


def _quiet_libraries() -> None:
    """Keep other libraries' bars and advice out of the log (the user's own settings stay)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _run(args: argparse.Namespace) -> int:
    progress.quiet = args.quiet
    _quiet_libraries()
    result, text, status = VERBS[args.verb](args)
    print(json.dumps(result, indent=1) if args.json else text, flush=True)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    except ValueError:
        previous = None  # not in the main thread: the caller's business
    try:
        arguments = sys.argv[1:] if argv is None else argv
        args = make_parser().parse_args(arguments)
        args.argv = arguments
        return _run(args)
    except MoecoverError as error:
        print(f"moecover: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("moecover: interrupted, nothing half-written was left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print(
            "moecover: not enough memory. Give a smaller --batch-size or --length, or a smaller dtype", file=sys.stderr
        )
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    raise SystemExit(main())
