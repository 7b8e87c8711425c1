"""The verb `split`: reads its arguments and a corpus, writes its kinds of text, says what they are."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.errors import InputError

SHOWN = 8  # typical tokens of a kind that are printed


def add_verb(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    p = verb("split", "cut a corpus of mixed text into its kinds of text, each a corpus of its own")
    p.add_argument("model", metavar="MODEL", help="local folder or hub id (owner/name) of the model whose tokens the text has")  # fmt: skip
    p.add_argument("--revision", help="branch, tag or commit of a hub model")
    p.add_argument("--corpus", required=True, metavar="NAME[=PATH]", help="a named corpus (moecover ls corpora), or NAME=PATH of a file, such as generate writes")  # fmt: skip
    p.add_argument("--kinds", type=int, metavar="N", help="how many (default: 8)")
    p.add_argument("--sequences", type=int, metavar="N", help="blocks to read (default: up to 128; all rows of input_ids)")  # fmt: skip
    p.add_argument("--length", type=int, metavar="N", help="tokens per row (default: as the rows of input_ids are; of text 2048, or the model's positions if fewer)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the blocks of text and of where the grouping starts (default: 0)")  # fmt: skip
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write: 1.jsonl, 2.jsonl ..., for --corpus NAME=DIR")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace kinds that are there")


def split_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.checkpoints.structure import read_structure
    from moecover.corpora.kinds import FILE, KINDS, split, write_kinds
    from moecover.corpora.packing import load_corpus, load_tokenizer
    from moecover.corpora.sources import parse_corpora
    from moecover.files.atomic import check_output
    from moecover.files.locks import locked

    for name, least in (("sequences", 1), ("length", 2), ("kinds", 2)):
        if (value := getattr(args, name)) is not None and value < least:
            raise InputError(f"--{name} {value} is out of range: {least} or more")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is out of range: 0 or more")
    sources = parse_corpora([args.corpus])
    if len(sources) > 1:
        raise InputError(f"--corpus {args.corpus} is a folder, which is split already. Give one file")
    ((name, path),) = sources.items()
    check_output(args.output, overwrite=args.overwrite, marker=FILE)
    with progress.spinner(f"reading {args.model}"):
        structure = read_structure(args.model, revision=args.revision)
    tokenizer = load_tokenizer(structure.checkpoint.path)
    with progress.spinner(f"reading corpus {name}"):
        corpus = load_corpus(name, path or None, structure=structure, tokenizer=tokenizer, sequences=args.sequences, length=args.length, seed=args.seed)  # fmt: skip
    named = [tokenizer and tokenizer.eos_token_id, structure.checkpoint.text_config.get("eos_token_id")]
    ends = [end for one in named if one is not None for end in (one if isinstance(one, list) else [one])]
    ends = list(dict.fromkeys(ends))
    with progress.spinner(f"grouping {corpus.num_tokens:,} tokens"):
        kinds, typical = split(corpus, ends, kinds=args.kinds or KINDS, seed=args.seed)
    words = [_words(tokenizer, ids) for ids in typical]
    length = args.length or corpus.tokens.shape[1]
    output = args.output.resolve()
    with locked(output):
        facts = write_kinds(output, corpus, kinds, words, length=length, ends=ends)
    lines = [f"{args.output}: {len(facts)} kinds of text, for --corpus {name}={args.output}"]
    lines += [f"  {name}-{n}  {kind['share']:4.0%}  {kind['rows']:>5} rows  {' '.join(kind['words'][:SHOWN])}" for n, kind in enumerate(facts, 1)]  # fmt: skip
    lines.append(f"next: moecover profile {shlex.quote(args.model)} --corpus {shlex.quote(f'{name}={args.output}')} --sequences {min(k['rows'] for k in facts)} -o profile")  # fmt: skip
    return {"output": str(args.output), "kinds": facts}, "\n".join(lines), 0


def _words(tokenizer: Any, ids: list[int]) -> list[str]:
    """Tokens as a reader sees them, no blanks and none twice; their numbers where there is no tokenizer."""
    if tokenizer is None:
        return list(map(str, ids))
    return list(dict.fromkeys(word for i in ids if (word := tokenizer.decode([i]).strip()) and word.isprintable()))
