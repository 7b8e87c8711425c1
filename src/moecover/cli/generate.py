"""The verb `generate`: reads its arguments, checks everything before the model runs, says what was written."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.cli.arguments import fetched, loadable, memory_limit
from moecover.errors import InputError

ENDING, SHOWN = ".jsonl", 3  # of the file; rows of which the beginning is printed


def add_verb(verb: Callable[[str, str], argparse.ArgumentParser], add_device: Callable[[Any], None]) -> None:
    """Add the verb to the command line."""
    p = verb("generate", "have a model write a corpus of its own, for text that no named corpus has")
    p.add_argument("model", metavar="MODEL", help="local folder or hub id (owner/name)")
    p.add_argument("--revision", help="branch, tag or commit of a hub model")
    p.add_argument("--sequences", type=int, metavar="N", help="rows to write (default: 128)")
    p.add_argument("--length", type=int, metavar="N", help="tokens per row (default: 2048, or the model's positions if fewer)")  # fmt: skip
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    add_device(p)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl", help="file to write: rows of input_ids, for --corpus self=FILE.jsonl")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def generate_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.corpora.generation import cache_bytes, write_generated
    from moecover.corpora.packing import LENGTH, SEQUENCES, load_corpus, load_tokenizer
    from moecover.runtime.loading import check_device
    from moecover.runtime.memory import itemsizes, opened

    for name in ("sequences", "length", "batch_size"):
        least = 2 if name == "length" else 1
        if (value := getattr(args, name)) is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: {least} or more")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is out of range: 0 or more")
    if args.output.suffix != ENDING:
        raise InputError(f"{args.output}: rows of token ids are written. Give a name that ends in {ENDING}")
    if args.output.exists() and not (args.overwrite and args.output.is_file()):
        raise InputError(f"{args.output} exists. Choose another output{'' if args.output.is_dir() else ', or give --overwrite'}")  # fmt: skip
    check_device(args.dtype or "auto", args.device or "auto")
    limit, headers = memory_limit(args), loadable(args)
    most = headers.checkpoint.text_config.get("max_position_embeddings")
    length, sequences = args.length or min(LENGTH, most or LENGTH), args.sequences or SEQUENCES
    if most is not None and length > most:
        raise InputError(f"--length {length} is above the {most} positions of the model. Give --length {most} or less")
    structure = fetched(args, headers)
    batch_size = min(args.batch_size, sequences)
    itemsize = itemsizes(structure, args.dtype or "auto")[1]
    kept = cache_bytes(structure, tokens=batch_size * length, itemsize=itemsize)
    with opened(
        structure, tokens=sequences * length, batch_tokens=batch_size, dtype=args.dtype or "auto",
        device=args.device or "auto", memory_limit=limit, head=True, extra=kept, say=progress.say,
    ) as model:  # fmt: skip
        if model.by_layer:
            raise InputError(f"{args.model} does not fit into memory, and layer by layer all of it would be read for every token. Give a smaller --batch-size or a larger --memory-limit, or have a server write text and give it as --corpus self=FILE")  # fmt: skip
        with progress.bar("generating", sequences * length) as advance:
            write_generated(
                structure, model, args.output.resolve(), sequences=sequences, length=length, seed=args.seed,
                batch_size=batch_size, advance=advance, say=progress.say,
            )  # fmt: skip
    made = load_corpus("self", args.output, structure=structure)
    lines = [f"{args.output}: {sequences} sequences of {length} tokens, for --corpus self={args.output}"]
    if (tokenizer := load_tokenizer(structure.checkpoint.path)) is not None:
        lines += [f"  {' '.join(tokenizer.decode(row[:40]).split())[:100]} ..." for row in made.tokens[:SHOWN]]
    lines.append(
        f"next: moecover split {shlex.quote(args.model)} --corpus self={shlex.quote(str(args.output))} -o kinds"
    )
    return {"output": str(args.output), **made.record}, "\n".join(lines), 0
