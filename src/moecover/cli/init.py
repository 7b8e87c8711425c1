"""The verb `init`: a configuration of `compare` to begin with, every line explained."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from moecover.cli.verb import Outcome
from moecover.errors import InputError, arg
from moecover.files.atomic import write_text

HELP = "write a commented configuration for `compare`"
TEMPLATE = """# A comparison: moecover compare {name} -o RUN_DIR. All fields: docs/compare.md.

models:                      # folders, hub ids (owner/name), shipped:NAME or .gguf files
  - shipped:qwen2-moe-tiny

calibration:                 # sets of corpora; NAME (moecover ls corpora), or "NAME=FILE" for text of your own
  - [encyclopedia, web]
samples: [0, 1, 2]           # seeds of the calibration sample: the spread over them is the method's stability
sequences: 48                # blocks of text a corpus and sample
length: 256                  # tokens a block; leave it out for the model's own

methods:                     # moecover ls methods; options of a method stand beside it
  - random
  - {{method: pooled, saliency: reap}}        # REAP
  - {{method: tb-coverage, saliency: contribution, protect: 0.5}}
seeds: [0, 1, 2]             # of methods that choose by chance
retain: [0.25, 0.5, 0.75]    # share of the experts that stays; or keep: [15, 30], or shapes: [50%, 40x48]
merges: [none]               # none, ream, hc-smoe, m-smoe: what goes is averaged into what stays, before the repair
repairs: [none]              # none, scale, ridge, refit: what stays is refitted on the calibration text

perplexity:                  # texts, best one that is like the calibration text and one that is not
  - encyclopedia-heldout
  - web-heldout
  - python-heldout
windows: 32                  # how many of each text
# tasks: [arc_easy, boolq]   # benchmarks of lm-evaluation-harness: pip install 'moecover[tasks]'
# limit: 200                 # items a task

dtype: auto                  # float32 where the processor has no bfloat16
device: auto                 # a GPU where there is one
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> Outcome:
    """Write the file.

    Raises:
        InputError: it exists.
    """
    if args.config.exists() and not args.overwrite:
        raise InputError(f"{args.config} exists. Choose another name, or give {arg('overwrite')}")
    write_text(args.config, TEMPLATE.format(name=args.config.name))
    text = f"{args.config}: a configuration that runs as it is, in minutes\n"
    text += f"next: moecover compare {shlex.quote(str(args.config))} -o run"
    return Outcome({"config": str(args.config)}, text)
