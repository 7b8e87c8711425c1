"""What arguments name: reads parsed arguments that several verbs have, gives structures, corpora, methods and budgets.

Every check here comes before the long work, and before anything is fetched where it can.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.errors import InputError
from moecover.text import size_text


def check_pass(args: argparse.Namespace) -> None:
    """Refuse what is wrong with the corpora or the pass, before anything is fetched or read."""
    from moecover.corpora.sources import parse_corpora
    from moecover.runtime.loading import check_device

    parse_corpora(args.corpus)
    for name in ("sequences", "length", "batch_size", "keep_inputs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: 1 or more")
    check_device(args.dtype or "auto", args.device or "auto")
    memory_limit(args)


def check_profile_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that no profile is to be written to."""
    from moecover.profiling.artifact import FILE

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, a folder is to be written there")
    if (folder / FILE).exists() and not overwrite:
        raise InputError(f"{folder / FILE} exists. Choose another folder, or give --overwrite")


def load_corpora(args: argparse.Namespace, structure: Any) -> list[Any]:
    """The corpora of ``--corpus``; says which are smaller than is usual."""
    from moecover.corpora.packing import SEQUENCES, load_corpus
    from moecover.corpora.sources import parse_corpora

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


def memory_limit(args: argparse.Namespace) -> int | None:
    """Bytes of ``--memory-limit``, None where it is not given."""
    from moecover.runtime.memory import parse_size

    return None if args.memory_limit is None else parse_size(args.memory_limit)


def headers(args: argparse.Namespace) -> Any:
    """The model's structure; of a hub model from its headers alone, so that a refusal comes before the download."""
    from moecover.checkpoints.source import open_checkpoint
    from moecover.checkpoints.structure import read_structure

    with progress.spinner(f"reading {args.model}"):
        structure = read_structure(open_checkpoint(args.model, revision=args.revision, headers_only=True))
    for warning in structure.warnings:
        progress.say(f"note: {warning}")
    return structure


def loadable(args: argparse.Namespace) -> Any:
    """The structure of a model that is going to run."""
    from moecover.runtime.loading import check_loadable

    structure = headers(args)
    check_loadable(structure)
    return structure


def fetched(args: argparse.Namespace, structure: Any) -> Any:
    """The structure with its files on this machine, fetched if they are not."""
    from moecover.checkpoints.structure import read_structure

    if structure.checkpoint.folder is not None:
        return structure
    progress.say(f"fetching {args.model}, {size_text(structure.checkpoint.num_bytes)}")
    return read_structure(args.model, revision=args.revision)


def load_plugins(args: argparse.Namespace) -> None:
    """Load the files of ``--plugin``."""
    from moecover.registry import load_plugin

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


def method_of(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Method and options as given, checked."""
    from moecover.planning.run import DEFAULT_METHOD, check_options

    load_plugins(args)
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


def keep_of(topology: Any, *, keep: int | None, retain: float | None, multiple_of: int | None) -> int:
    """Experts kept per layer; says when they were rounded."""
    from moecover.planning.keep import resolve_keep

    count = resolve_keep(topology, keep=keep, retain=retain, multiple_of=multiple_of)
    given = f"--keep {keep}" if keep is not None else f"--retain {retain}"
    if multiple_of is not None and count != keep:
        progress.say(f"{given} with --multiple-of {multiple_of}: {count} of {topology.num_experts} experts")
    return count
