"""What was meant by a word of the command line that no verb or option is called: the answer in one line."""

from __future__ import annotations

import argparse
import difflib
import itertools
from collections.abc import Sequence

from moecover.errors import shortened

KEPT = "say how much stays: --retain 0.5 keeps half of the experts (1 - sparsity), --keep N keeps N of each layer"
TEXT = "calibration text is --corpus NAME, or --corpus NAME=FILE, once for each"
MODEL = "the model is --model MODEL"
FIRST = "the model is the first argument: a folder or a hub id"
BLOCKS = "blocks of calibration text are --sequences N, of --length tokens each"
OUTPUT = "the output is -o FOLDER"
PLAN = (
    "a profile is made a plan first, by `moecover plan PROFILE --retain 0.5 -o plan.json`; then give --plan plan.json"
)
# Options of other tools and verbs, and what they are here: the option that a verb must have for an answer to be true
# ("" for a model as the first argument), and the answer.
ANSWERS = (
    (("--retain", KEPT), ("--sparsity", "--ratio", "--pruning-ratio", "--prune-ratio", "--compression-ratio")),
    (("--retain", KEPT), ("--experts-to-prune", "--num-experts")),
    (("--corpus", TEXT), ("--dataset", "--dataset-name", "--calibration", "--calib-data")),
    (("--model", MODEL), ("--model-name", "--model-path")),
    (("", FIRST), ("--model-name", "--model-path")),
    (("--output", OUTPUT), ("--output-dir", "--output-path", "--save-dir")),
    (("--plan", PLAN), ("--profile",)),
    (("--sequences", BLOCKS), ("--num-samples", "--num-calibration-samples", "--max-seq-length")),
)


def answer(name: str, parser: argparse.ArgumentParser) -> str | None:
    """What an option of another tool is in a verb; None where it is the verb's own, or there is no answer."""
    own = {option for action in parser._actions for option in action.option_strings}
    first = any(action.dest == "model" and not action.option_strings for action in parser._actions)
    name = name.replace("_", "-")
    for (needed, text), names in ANSWERS:
        if name in names and name not in own and (needed in own if needed else first):
            return text
    return None


def foreign(words: Sequence[str], parser: argparse.ArgumentParser) -> str | None:
    """The first word that is an option of another tool with an answer; None where there is none."""
    before = itertools.takewhile(lambda word: word != "--", words)
    return next((word for word in before if answer(word.partition("=")[0], parser)), None)


def unknown_verb(name: str, verbs: Sequence[str]) -> str:
    """Message on a verb that there is not."""
    close = difflib.get_close_matches(name, verbs, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"unknown verb {shortened(repr(name))}.{hint} Known: {', '.join(verbs)}"


def unknown_arguments(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Message on words that a verb's options do not take.

    Args:
        words: what was left over, in order.
        parser: of the verb.
    """
    word = next((word for word in words if word.startswith("-")), words[0])
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"{shortened(repr(word))} is one argument too many"
    if found := answer(name, parser):
        return f"unknown option {name}: {found}"
    known = [option for action in parser._actions for option in action.option_strings if len(option) > 2]
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else f" See `{parser.prog} --help`"
    return f"unknown option {shortened(name)}.{hint}"
