"""The verb `evaluate`: reads its arguments, checks everything before the model runs, prints a table of the rows."""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover import progress
from moecover.cli.arguments import fetched, loadable, memory_limit
from moecover.errors import InputError

if TYPE_CHECKING:
    from moecover.evaluation.artifact import Evaluation


def add_verb(verb: Callable[[str, str], argparse.ArgumentParser], add_device: Callable[[Any], None]) -> None:
    """Add the verb to the command line."""
    p = verb("evaluate", "measure perplexity and zero-shot tasks of a model and of plans of it")
    p.add_argument("model", metavar="MODEL", help="local folder or hub id (owner/name); a pruned checkpoint too")
    p.add_argument("--revision", help="branch, tag or commit of a hub model")
    p.add_argument("--plan", action="append", default=[], type=Path, metavar="PLAN", help="plan.json to emulate, bit for bit what its checkpoint computes; repeat it: the model is read once")  # fmt: skip
    p.add_argument("--perplexity", action="append", default=[], metavar="NAME[=PATH]", help="held-out text: wikitext2 (test), c4 (validation), a shipped ...-heldout, or a file; repeat it")  # fmt: skip
    p.add_argument("--tasks", default="", metavar="A,B", help="tasks of lm-evaluation-harness, zero-shot: arc_challenge,arc_easy,boolq,hellaswag,piqa,winogrande, mmlu, gsm8k, blimp ...")  # fmt: skip
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="read the tasks' documents from this folder instead of the hub (docs/evaluation.md)")  # fmt: skip
    p.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task definitions of your own")
    p.add_argument("--limit", type=int, metavar="N", help="documents per task at most (default: all)")
    p.add_argument("--windows", type=int, metavar="N", help="windows per text at most (default: 256)")
    p.add_argument("--length", type=int, metavar="N", help="tokens per window (default: 2048, or the model's positions if fewer)")  # fmt: skip
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows or requests per forward pass (default: 1)")  # fmt: skip
    add_device(p)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace an evaluation that is there")


def evaluate_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.corpora.packing import load_tokenizer
    from moecover.corpora.windows import WINDOWS, load_windows
    from moecover.evaluation.artifact import FILE, FULL
    from moecover.evaluation.run import evaluate, overlaps
    from moecover.evaluation.tasks import resolve
    from moecover.files.atomic import check_output
    from moecover.planning.artifact import Plan, check_plan
    from moecover.runtime.loading import check_device
    from moecover.runtime.memory import opened

    names = [name for name in args.tasks.split(",") if name]
    texts = dict(texts_of(args.perplexity))
    if not names and not texts:
        raise InputError("nothing to measure. Give --perplexity NAME[=PATH], --tasks A,B, or both")
    for option in ("limit", "windows", "length", "batch_size"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value} is out of range: 1 or more")
    check_device(args.dtype or "auto", args.device or "auto")
    limit = memory_limit(args)
    check_output(args.output, overwrite=args.overwrite, marker=FILE)
    plans = {name: Plan.load(path) for name, path in _plan_names(args.plan).items()}
    headers = loadable(args)
    for made in plans.values():
        check_plan(made, headers)
    structure = fetched(args, headers)
    loaded = []
    for name, path in texts.items():
        with progress.spinner(f"reading {name}"):
            loaded.append(load_windows(name, path, structure=structure, length=args.length, windows=args.windows or WINDOWS))  # fmt: skip
        for row, share in overlaps(loaded[-1], plans, structure).items():
            progress.say(f"note: {share:.0%} of the text {name} is in the calibration text of {args.model if row == FULL else row} too: that perplexity says little of other text")  # fmt: skip
    tasks, in_parts = None, (0, 0)
    if names:
        with progress.spinner("reading the tasks"):
            tasks = resolve(
                names, tokenizer=load_tokenizer(structure.checkpoint.path), data_dir=args.data_dir,
                include_path=args.include_path, limit=args.limit, batch_size=args.batch_size,
            )  # fmt: skip
            in_parts = (tasks.num_tokens(), -(-tasks.num_requests // args.batch_size))
    variants = 1 + len(plans)
    longest = max([text.tokens.shape[1] for text in loaded] + ([tasks.longest] if tasks is not None else []))
    with opened(
        structure, tokens=sum(text.num_tokens for text in loaded) * variants, batch_tokens=args.batch_size * longest,
        in_parts=(in_parts[0] * variants, in_parts[1] * variants), dtype=args.dtype or "auto",
        device=args.device or "auto", memory_limit=limit, head=True, say=progress.say,
    ) as model:  # fmt: skip
        found = evaluate(structure, plans, model=model, texts=loaded, tasks=tasks, batch_size=args.batch_size, bar=progress.bar)  # fmt: skip
    found.save(args.output)
    return found.to_dict(), f"{table(found)}\n\n{args.output / FILE}: {len(found.rows)} rows", 0


def texts_of(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Names and files of ``--perplexity NAME[=PATH]``; None for the held-out part of a named corpus."""
    from moecover.corpora.rows import SUFFIXES
    from moecover.corpora.windows import check_text

    seen = set[str]()
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if name in seen:
            raise InputError(f"--perplexity {name} is given twice")
        seen.add(name)
        if not equals:
            check_text(name)
        elif not Path(path).is_file():
            raise InputError(f"--perplexity {argument}: {path} does not exist")
        elif not path.endswith(SUFFIXES):
            raise InputError(f"--perplexity {argument}: unknown ending. Allowed: {', '.join(SUFFIXES)}")
        yield name, path if equals else None


def _plan_names(paths: list[Path]) -> dict[str, Path]:
    """Row names: the file's, with its folder's where two are alike."""
    short = [path.stem for path in paths]
    names = [path.stem if short.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        raise InputError("two --plan files have the same name: give every plan once")
    return dict(zip(names, paths, strict=True))


def table(found: Evaluation) -> str:
    """The rows as aligned text: perplexity (with KL and agreement), tasks in per cent, their mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    metrics = {task: about["metric"] for task, about in found.tasks.items()}
    unit, scale = ("GB", 1e9) if max(row.num_bytes for row in found.rows) >= 1e9 else ("MB", 1e6)
    headings = ["row", "experts", unit, *found.texts, *(["KL", "top-1"] if found.texts and len(found.rows) > 1 else [])]
    headings += [f"{task} {metric}" for task, metric in metrics.items()] + (["mean"] if len(metrics) > 1 else [])
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if i == 0 else "right")
    for row in found.rows:
        cells = [row.name, str(row.keep), f"{row.num_bytes / scale:.2f}"]
        cells += [f"{row.perplexity[text].perplexity:.2f}" for text in found.texts]
        if "KL" in headings:
            kl = [one.kl for one in row.perplexity.values() if one.kl is not None]
            top1 = [one.top1 for one in row.perplexity.values() if one.top1 is not None]
            cells += [
                f"{math.fsum(kl) / len(kl):.3f}" if kl else "",
                f"{math.fsum(top1) / len(top1):.1%}" if top1 else "",
            ]
        values = [row.tasks[task][metric] for task, metric in metrics.items()]
        cells += [
            f"{100 * one.value:.1f}" + ("" if one.stderr is None else f" ±{100 * one.stderr:.1f}") for one in values
        ]
        if len(values) > 1:
            cells.append(f"{100 * math.fsum(one.value for one in values) / len(values):.1f}")
        drawn.add_row(*cells)
    out = io.StringIO()
    Console(file=out, width=max(110, 14 * len(headings))).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
