"""What was meant by a word of the command line that no verb or option is called: the answer in one line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from moecover.errors import shortened

KEPT = "say how much stays: --retain 0.5 keeps half of the experts (1 - sparsity), --keep N keeps N of each layer"
TEXT = "calibration text is --corpus NAME, or --corpus NAME=FILE, once for each"
OF_OTHERS = {  # options of other tools, and what they are here
    "--sparsity": KEPT,
    "--ratio": KEPT,
    "--pruning-ratio": KEPT,
    "--prune-ratio": KEPT,
    "--compression-ratio": KEPT,
    "--experts-to-prune": KEPT,
    "--num-experts": KEPT,
    "--dataset": TEXT,
    "--dataset-name": TEXT,
    "--calibration": TEXT,
    "--calib-data": TEXT,
    "--model-name": "the model is the first argument: a folder or a hub id",
    "--model-path": "the model is the first argument: a folder or a hub id",
    "--output-dir": "the output is -o FOLDER",
    "--out": "the output is -o FOLDER",
    "--samples": "blocks of calibration text are --sequences N, of --length tokens each",
    "--num-samples": "blocks of calibration text are --sequences N, of --length tokens each",
    "--max-seq-length": "blocks of calibration text are --sequences N, of --length tokens each",
    "--seed-dataset": "the seed of the sample of blocks is --seed",
}


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
    if name.replace("_", "-") in OF_OTHERS:
        return f"unknown option {name}: {OF_OTHERS[name.replace('_', '-')]}"
    known = [option for action in parser._actions for option in action.option_strings if len(option) > 2]
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else f" See `{parser.prog} --help`"
    return f"unknown option {shortened(name)}.{hint}"
