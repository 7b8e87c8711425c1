"""The `moecover` command: one verb per stage. stdout carries the result, stderr the log.

Exit status: 0 done; 1 the job failed or the check said no; 2 the request or its input cannot be used as given;
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from moecover import __version__, progress
from moecover.checkpoints.servers import SERVERS
from moecover.cli.budget_verb import add_options as add_bounds
from moecover.cli.compare import add_verb as add_compare
from moecover.cli.evaluate import add_verb as add_evaluate
from moecover.cli.generate import add_verb as add_generate
from moecover.cli.plan import KEEP_INPUTS
from moecover.cli.split import add_verb as add_split
from moecover.cli.verbs import VERBS
from moecover.errors import InputError, MoecoverError, is_out_of_memory
from moecover.runtime.distributed import ALONE, STOPPED, World, first_to_fail, world
from moecover.signals import behind

EPILOG = """examples:
  moecover inspect Qwen/Qwen1.5-MoE-A2.7B
  moecover prune   Qwen/Qwen1.5-MoE-A2.7B --corpus wikitext2 --corpus c4 --retain 0.5 -o qwen-moe-half
  moecover profile ./model --corpus wikitext2 --corpus mine=notes.jsonl -o profile
  moecover plan    profile --retain 0.25 -o plan.json
  moecover verify  ./model ./pruned
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Options as ``-o, --output OUT`` on every Python (3.13 changed it), so that the generated page is the same."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_corpora(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_argument_group("corpora and the pass over them")
    group.add_argument("--corpus", action="append", default=[], metavar="NAME[=PATH]", required=required, help="a named corpus (moecover ls corpora), or NAME=PATH of a .txt, .jsonl, .jsonl.gz or .parquet file, or of a folder of them, each a corpus; repeat it: corpora are kept apart")  # fmt: skip
    group.add_argument("--sequences", type=int, metavar="N", help="blocks per corpus (default: up to 128; all rows of input_ids); fewer than N is an error")  # fmt: skip
    group.add_argument("--length", type=int, metavar="N", help="tokens per block of text (default: 2048, or the model's positions if fewer)")  # fmt: skip
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: 4)")
    group.add_argument("--seed", type=int, help="of the sample of blocks, and of method random (default: 0)")
    _add_device(group)


def _add_device(parser: Any) -> None:
    parser.add_argument("--dtype", help="auto (the checkpoint's), bfloat16, float16 or float32")
    parser.add_argument("--device", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--memory-limit", metavar="SIZE", help="memory that may be used, such as 4GB (default: nine tenths of what is free); a model that does not fit runs layer by layer")  # fmt: skip


def _add_keep_inputs(parser: Any, when: str) -> None:
    parser.add_argument("--keep-inputs", type=int, metavar="TOKENS", help=f"keep what enters the experts for this many tokens, shared by the corpora, whole sequences ({when})")  # fmt: skip


def _add_plan(parser: argparse.ArgumentParser, *, alone: bool) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument("--method", default=None, help="moecover ls methods (default: tb-coverage)")
    group.add_argument("--saliency", default=None, help="moecover ls saliencies (default: contribution)")
    group.add_argument("--protect", type=float, default=None, metavar="P", help="share of the kept experts that corpora protect in turn, 0 to 1 (default: 0.5)")  # fmt: skip
    group.add_argument("--weight", action="append", default=[], metavar="NAME=N", help="turns of a corpus per round and its weight in the fill (default: 1 each; 0 leaves it out); repeat it")  # fmt: skip
    group.add_argument("--protect-super-experts", action="store_true", help="keep the experts with extreme outputs (arXiv 2507.23279), whatever the method says")  # fmt: skip
    group.add_argument("--mode", help="expert-sparsity, worst-corpus: layerwise (inputs of the full model, default) or progressive (of the pruned prefix)")  # fmt: skip
    group.add_argument("--search", help="expert-sparsity, worst-corpus: auto (default: exhaustive up to 100,000 subsets), exhaustive or greedy")  # fmt: skip
    group.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of a plugin's method; repeat it")  # fmt: skip
    several = "; several with commas give several plans" if alone else ""
    group.add_argument(
        "--keep", type=_numbers(int, several=alone), metavar="K", help=f"experts kept per layer{several}"
    )
    group.add_argument("--retain", type=_numbers(float, several=alone), metavar="R", help=f"fraction of experts kept per layer, in (0, 1]{several}")  # fmt: skip
    group.add_argument("--multiple-of", type=int, metavar="N", help="round the experts kept to the nearest multiple of N that the router allows: servers run best with multiples of 8")  # fmt: skip
    _add_plugin(group)
    if alone:
        group.add_argument("--seed", type=int, default=None, help="of method random (default: 0)")


def _add_plugin(parser: Any) -> None:
    parser.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE.py", help="your own saliencies and methods: a Python file, which is run; repeat it")  # fmt: skip


def _numbers(kind: Any, *, several: bool) -> Any:
    """Parser of one number, or of several with commas between them."""

    def parse(text: str) -> Any:
        found = [kind(part) for part in text.split(",")]
        if len(found) > 1 and not several:
            raise ValueError
        return found if several else found[0]

    parse.__name__ = kind.__name__ + ("s with commas" if several else "")
    return parse


def make_parser() -> argparse.ArgumentParser:
    """The command line; docs/cli.md is generated from it."""
    parser = _Parser(
        prog="moecover",
        description="Makes a sparse Mixture-of-Experts language model smaller by removing whole routed experts.",
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"moecover {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("-q", "--quiet", action="store_true", help="no log and no progress on stderr")
    verbs: Any = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common], formatter_class=_Formatter
        )
        return made

    def model(p: argparse.ArgumentParser) -> None:
        p.add_argument("model", metavar="MODEL", help="local folder or hub id (owner/name)")
        p.add_argument("--revision", help="branch, tag or commit of a hub model")

    p = verb("inspect", "say what a model's routed experts are and weigh, and whether it can be pruned")
    model(p)
    p.add_argument("--for", dest="server", choices=SERVERS, help="also say what this server would lack at every size")

    add_generate(verb, _add_device)
    add_split(verb)

    p = verb("profile", "run corpora through a model and record the statistics of every expert")
    model(p)
    _add_corpora(p, required=True)
    p.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PROFILE_DIR", help="folder for profile.safetensors"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a profile that is there")
    _add_keep_inputs(p, "for methods expert-sparsity and worst-corpus")

    p = verb("plan", "choose the experts to keep from a profile")
    p.add_argument("profile", type=Path, metavar="PROFILE_DIR", help="folder that `moecover profile` wrote")
    _add_plan(p, alone=True)
    add_bounds(p)
    group = p.add_argument_group("the model, for bounds and for methods that run the experts")
    group.add_argument("--model", metavar="MODEL", help="the model that was profiled: local folder or hub id")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    _add_device(group)
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PLAN",
        help="plan.json to write (replaced if it exists); for several plans a folder, which gets keep-K.json",
    )

    p = verb("merge", "add up profiles of one model that were made separately")
    p.add_argument(
        "profiles", type=Path, nargs="+", metavar="PROFILE_DIR", help="folders that `moecover profile` wrote"
    )
    p.add_argument("-o", "--output", type=Path, required=True, metavar="PROFILE_DIR", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace a profile that is there")

    p = verb("explain", "say why a plan keeps what it keeps, corpus by corpus, and how stable that is")
    p.add_argument("plan", type=Path, metavar="PLAN", help="plan.json")
    p.add_argument("--profile", type=Path, metavar="PROFILE_DIR", help="the profile that the plan was made from: needed for routing counts, stability, and plans without saliencies of their own")  # fmt: skip
    p.add_argument("--against", type=Path, metavar="PLAN", help="another plan: what changed")
    p.add_argument("--saliency", help="what utility means here (default: the plan's own, else contribution)")
    p.add_argument("--change", type=float, default=0.02, metavar="X", help="stable: at most this share of the kept experts still changes (default: 0.02)")  # fmt: skip
    p.add_argument("--layers", action="store_true", help="a line for every layer")
    p.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for the pictures (PNG and SVG)")
    p.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    _add_plugin(p)

    p = verb("prune", "write the pruned checkpoint, from a plan or in one shot from corpora")
    model(p)
    p.add_argument(
        "--plan", type=Path, metavar="PLAN", help="plan.json; without it, give --corpus and --keep or --retain"
    )
    _add_corpora(p, required=False)
    _add_plan(p, alone=False)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if moecover wrote it")
    p.add_argument(
        "--save-profile", type=Path, metavar="PROFILE_DIR", help="one shot: keep the profile, for other budgets"
    )
    _add_keep_inputs(p, f"one shot with expert-sparsity or worst-corpus; default {KEEP_INPUTS}")
    group = p.add_argument_group("repair")
    group.add_argument("--repair", choices=("none", "scale", "ridge"), default="none", help="refit the down projections of what stays, in closed form on the text of --corpus: a factor each (scale) or all weights (ridge) (default: none)")  # fmt: skip
    group.add_argument("--repair-tokens", type=int, metavar="TOKENS", help="run the repair on so many tokens of it, shared by the corpora, whole sequences (default: 65536)")  # fmt: skip
    p.add_argument("--other-weights", action="store_true", help="accept a plan made on other weights of the same shape")
    p.add_argument("--evaluation", action="append", default=[], type=Path, metavar="DIR", help="an evaluation of PLAN, or a cell of `compare`, whose numbers go on the model card; repeat it")  # fmt: skip
    p.add_argument("--mtp", choices=("drop", "prune"), default="drop", help="multi-token-prediction layers that have experts of their own: leave them out, or keep the ids of the last MoE layer in them (default: drop)")  # fmt: skip

    p = verb("verify", "prove a pruned checkpoint against the masked original on real text")
    model(p)
    p.add_argument("pruned", metavar="OUT", help="folder that `moecover prune` wrote")
    p.add_argument("--corpus", action="append", default=[], metavar="NAME[=PATH]", help="text to run (default: shipped held-out text)")  # fmt: skip
    p.add_argument("--tolerance", type=float, default=0.0, metavar="T", help="largest difference allowed as a share of a layer's largest value (default: 0, every bit equal)")  # fmt: skip
    _add_device(p)

    add_evaluate(verb, _add_device)
    add_compare(verb)
    p = verb("report", "write a run of `compare` as one page to read, and its figures as files")
    p.add_argument("run", type=Path, metavar="RUN_DIR", help="folder that `moecover compare` wrote")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="PAGE", help="report.html to write: one file that needs no network")  # fmt: skip
    p.add_argument("--figures", type=Path, metavar="DIR", help="folder for the figures, PNG and SVG (default: the page's name with _files)")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace a page and figures that are there")

    p = verb("demo", "prune the shipped model and show what each method leaves of it")
    p.add_argument("-o", "--output", type=Path, default=Path("demo-out"), metavar="DIR", help="folder to write (default: demo-out)")  # fmt: skip
    p.add_argument("--model", default="qwen2-moe-tiny", metavar="NAME", help="a model that comes with the package (default: qwen2-moe-tiny)")  # fmt: skip

    p = verb("ls", "list methods, saliencies, corpora or families")
    p.add_argument("what", choices=("methods", "saliencies", "corpora", "families"))
    _add_plugin(p)
    return parser


def _quiet_libraries(*, quiet: bool) -> None:
    """Keep other libraries' bars and advice out of the log (the user's own settings stay)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if quiet or not sys.stderr.isatty() else "0")


def _print(text: str, file: Any) -> None:
    """Print, also where nobody reads any more (a closed pipe)."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _place() -> World:
    """The process among its fellows; alone where the environment is not whole, which `_run` refuses."""
    try:
        return world()
    except InputError:
        return ALONE


def _fail(text: str) -> None:
    """Say in one line why the command ends; of several processes only the first that fails does."""
    here = _place()
    if first_to_fail(here):
        _print(f"moecover: {f'rank {here.rank} of {here.size}: ' if here.size > 1 else ''}{text}", sys.stderr)


def _run(argv: list[str]) -> int:
    with contextlib.redirect_stderr(None) if _place().rank > 0 else contextlib.nullcontext():
        args = make_parser().parse_args(argv)
    args.argv = argv
    _quiet_libraries(quiet=args.quiet)
    here = world()
    if here.size > 1 and args.verb != "profile":
        raise InputError(f"{args.verb} runs in one process, torchrun started {here.size}: only profile runs in several")
    progress.quiet = args.quiet or here.rank > 0
    try:
        result, text, status = VERBS[args.verb](args)
    except Exception as error:
        if behind(error):
            raise KeyboardInterrupt from error
        raise
    if here.rank == 0:
        _print(json.dumps(result, indent=1) if args.json else text, sys.stdout)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    except ValueError:
        previous = None  # not in the main thread: the caller's business
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except MoecoverError as error:
        _fail(error.for_command_line)
        return error.exit_code
    except SystemExit as end:  # torchrun ends the others when one process fails
        if end.code == 143 and _place().size > 1:
            _fail(". ".join([STOPPED, *getattr(end, "__notes__", [])]))
        raise
    except KeyboardInterrupt as interrupt:
        left = getattr(interrupt, "__notes__", None)  # what a job that can be resumed says of itself
        _fail(f"interrupted{f'. {left[-1]}' if left else ', nothing half-written was left'}")
        return 130
    except OSError as error:  # a file or folder that cannot be read, where no better message was at hand
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail("not enough memory. Give a smaller --batch-size or --length, or a smaller --dtype")
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    raise SystemExit(main())
