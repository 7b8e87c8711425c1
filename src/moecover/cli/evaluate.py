"""The verb `evaluate`: perplexity, closeness to the model and zero-shot tasks, of a model and of plans of it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.cli.corpus_options import add_bos
from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import (
    add_device,
    add_libllama,
    add_model,
    add_output,
    add_plugin,
    load_plugins,
    pass_arguments,
)
from moecover.cli.verb import Outcome
from moecover.cli.widths import numbers
from moecover.terminal import aligned
from moecover.text import counted

if TYPE_CHECKING:
    from moecover.evaluation.artifact import Evaluation, Row

HELP = "measure perplexity and zero-shot tasks of a model and of plans of it"
SHARED = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser, note=", or a .gguf file (of a split one the first part); a pruned one too")
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        type=Path,
        metavar="PLAN",
        help="plan.json to emulate, bit for bit what its checkpoint computes; repeat it: the model is read once",
    )
    parser.add_argument(
        "--file",
        dest="files",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.gguf",
        help="another GGUF file, quantised or pruned, as a row beside MODEL.gguf; repeat it: all are mapped at once",
    )
    _add_measures(parser)
    _add_server(parser)
    add_device(parser)
    add_libllama(parser)
    add_output(parser, "DIR", "folder to write", replaced="an evaluation that is there")
    add_plugin(parser)
    add_dry_run(parser)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured, on how much text, and the further rows."""
    parser.add_argument(
        "--perplexity",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="held-out text: wikitext2 (test), c4 (validation), a shipped ...-heldout, or a file; repeat it",
    )
    parser.add_argument(
        "--tasks",
        default="",
        metavar="A,B",
        help="tasks of lm-evaluation-harness, zero-shot: arc_challenge,arc_easy,boolq,hellaswag,piqa,winogrande, mmlu, "
        "gsm8k, blimp ...",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="read the tasks' documents from this folder instead of the hub (docs/evaluation.md)",
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task definitions of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task at most (default: all)")
    parser.add_argument(
        "--top-k",
        type=numbers(int, several=True),
        metavar="N,M",
        help="further rows: the model and every plan with N experts per token, fewer than its own number",
    )
    parser.add_argument(
        "--skip",
        metavar="NAME[=PATH]",
        help="further rows in which tokens skip experts whose weight is below the median share of the largest one on "
        "this calibration text (arXiv 2402.14800); only evaluated, no checkpoint holds such a rule",
    )
    parser.add_argument("--windows", type=int, metavar="N", help="windows per text at most (default: 256)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens per window (default: 2048, or the model's positions if fewer)"
    )
    add_bos(parser, "a window")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows or requests per forward pass (default: 1)")


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Declare the server that scores the model instead."""
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="score MODEL through a server that serves it, http://HOST:PORT/v1 (vLLM, SGLang, llama.cpp), instead of "
        "running it; key: OPENAI_API_KEY (docs/evaluation.md)",
    )
    parser.add_argument(
        "--served-name", metavar="NAME", help="the server's name of the model (default: the only one that it lists)"
    )
    parser.add_argument(
        "--num-concurrent", type=int, metavar="N", help="requests that the server has at a time (default: 16)"
    )
    parser.add_argument("--timeout", type=int, metavar="SECONDS", help="for a request to the server (default: 300)")


def run(args: argparse.Namespace) -> Outcome:
    """Write the evaluation; print a table of its rows."""
    from moecover.evaluation.artifact import FILE
    from moecover.evaluation.job import evaluate
    from moecover.runtime.world import world

    load_plugins(args)
    found = evaluate(
        args.model,
        args.plan,
        files=args.files,
        texts=args.perplexity,
        tasks=[name for name in args.tasks.split(",") if name],
        top_ks=args.top_k or (),
        skip=args.skip,
        output=args.output,
        overwrite=args.overwrite,
        data_dir=args.data_dir,
        include_path=args.include_path,
        limit=args.limit,
        windows=args.windows,
        length=args.length,
        bos=args.bos,
        endpoint=args.endpoint,
        served_name=args.served_name,
        num_concurrent=args.num_concurrent,
        timeout=args.timeout,
        libllama=args.libllama,
        here=world(),
        **pass_arguments(args),
    )
    return Outcome(found.to_dict(), f"{table(found)}\n\n{args.output / FILE}: {counted(len(found.rows), 'row')}")


def table(found: Evaluation) -> str:
    """The rows as aligned text: perplexity (with KL and agreement), tasks in per cent, their mean."""
    metrics = {task: about["metric"] for task, about in found.tasks.items()}
    unit, scale = ("GB", 1e9) if max(row.num_bytes for row in found.rows) >= 1e9 else ("MB", 1e6)
    close = bool(found.texts) and len(found.rows) > 1
    headings = ["row", "experts", unit, *found.texts, *(["KL", "top-1"] if close else [])]
    headings += [f"{task} {metric}" for task, metric in metrics.items()] + (["mean"] if len(metrics) > 1 else [])
    rows = []
    for row in found.rows:
        cells = [row.name, row.shape, f"{row.num_bytes / scale:.2f}"]
        cells += [f"{row.perplexity[text].perplexity:.2f}" for text in found.texts]
        rows.append(cells + (_closeness(row) if close else []) + _scores(row, metrics))
    return aligned(headings, rows, left=1)


def _closeness(row: Row) -> list[str]:
    """KL divergence and agreement, mean over the texts; empty for the model itself."""
    kl = [one.kl for one in row.perplexity.values() if one.kl is not None]
    top1 = [one.top1 for one in row.perplexity.values() if one.top1 is not None]
    return [f"{math.fsum(kl) / len(kl):.3f}" if kl else "", f"{math.fsum(top1) / len(top1):.1%}" if top1 else ""]


def _scores(row: Row, metrics: dict[str, str]) -> list[str]:
    """Task scores in per cent with their standard errors, and the mean of several."""
    values = [row.tasks[task][metric] for task, metric in metrics.items()]
    cells = [f"{100 * one.value:.1f}" + ("" if one.stderr is None else f" ±{100 * one.stderr:.1f}") for one in values]
    if len(values) > 1:
        cells.append(f"{100 * math.fsum(one.value for one in values) / len(values):.1f}")
    return cells
