"""Options on calibration text: which corpora, how they are read and how much of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moecover.cli.options import Group, add_device
from moecover.corpora.bos import BOS
from moecover.corpora.grammar import MIX_ENDINGS
from moecover.errors import InputError, flag

if TYPE_CHECKING:
    from moecover.corpora.options import TextOptions


def add_corpora(parser: argparse.ArgumentParser) -> None:
    """Calibration corpora, and the forward passes over them."""
    group = parser.add_argument_group("corpora and the forward pass over them")
    group.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME[=SOURCE]",
        help="a named corpus (moecover ls corpora), or NAME=SOURCE: a file, a folder of files, each a corpus, a "
        "data set of the hub (hf:OWNER/NAME[CONFIG]/SPLIT) or - for standard input, with ?KEY=VALUE&... "
        "for how it is read (docs/calibration.md); repeat it: corpora are kept apart",
    )
    add_mix(group)
    add_reading(group)
    group.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="blocks per corpus (default: up to 128; all rows of input_ids); fewer than N is an error",
    )
    group.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens per block of text (default: 2048, or the model's positions if fewer)",
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: 4)")
    group.add_argument("--seed", type=int, help="of the sample of blocks, and of seeded methods (default: 0)")
    add_bos(group, "a block of text")
    add_device(group)


def add_mix(parser: Group) -> None:
    """Corpora in a file, beside or instead of ``--corpus``."""
    parser.add_argument(
        "--corpora",
        dest="corpus",
        action="append",
        type=_mix,
        metavar="MIX.yaml",
        help="corpora in a file: a list of name, source, weight, sequences, seed",
    )


def _mix(text: str) -> str:
    if not text.lower().endswith(MIX_ENDINGS):
        endings = " or ".join(MIX_ENDINGS)
        raise argparse.ArgumentTypeError(f"{text}: a mix ends in {endings}. A corpus is given as --corpus")
    return text


def add_reading(parser: Group) -> None:
    """How rows of all corpora are read; what a source says itself goes before it."""
    parser.add_argument(
        "--text-field", metavar="KEY", help="key or column that holds the text (default: seen from the keys of a row)"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template for chats (default: the tokenizer's)")
    parser.add_argument(
        "--parse-special",
        action="store_true",
        default=None,
        help="text that spells a special token is that token (default: it is text)",
    )


def add_bos(parser: Group, what: str) -> None:
    """What sequences of text begin with."""
    parser.add_argument(
        "--bos",
        choices=BOS,
        help=f"what {what} begins with: auto, what the tokenizer adds by itself; always, its BOS token; never, nothing "
        "(default: auto)",
    )


def corpus_arguments(args: argparse.Namespace) -> list[str]:
    """The corpora that are given, with how all of them are read.

    Raises:
        InputError: how corpora are read, and no corpus; or what `with_reading` raises.
    """
    from moecover.corpora.arguments import with_reading

    how = {"text": args.text_field, "chat_template": args.chat_template, "parse_special": args.parse_special}
    given = [name for name in ("text_field", "chat_template", "parse_special") if getattr(args, name) is not None]
    if given and not args.corpus:
        raise InputError(
            f"{flag(given[0])} says how corpora are read, and none is given. Give --corpus, or leave it out"
        )
    return with_reading(args.corpus or (), how)


def text_arguments(args: argparse.Namespace) -> TextOptions:
    """How much of the corpora is read."""
    given: TextOptions = {"sequences": args.sequences, "length": args.length, "bos": args.bos}
    return given if args.seed is None else {**given, "seed": args.seed}
