"""The `moecover` command: one verb per stage. stdout carries the result, stderr the log.

Exit status: 0 done; 1 the job failed or the check said no; 2 the request or its input cannot be used as given;
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from moecover import progress
from moecover.cli.dry_run import dry_run
from moecover.cli.mistakes import foreign, unknown_arguments, unknown_verb
from moecover.cli.options import trust_model
from moecover.cli.verb import Outcome, Verb
from moecover.errors import InputError, MoecoverError, is_out_of_memory, is_panic, printable, shortened
from moecover.runtime.distributed import STOPPED, first_to_fail
from moecover.runtime.world import ALONE, World, check_alone, world
from moecover.signals import behind
from moecover.terminal import columns, folded
from moecover.version import VERSION

VERBS = (
    "shrink",
    "inspect",
    "generate",
    "split",
    "profile",
    "merge",
    "plan",
    "explain",
    "prune",
    "verify",
    "upload",
    "evaluate",
    "compare",
    "report",
    "demo",
    "init",
    "ls",
    "env",
    "completion",
)
EPILOG = """examples:
  moecover shrink  Qwen/Qwen1.5-MoE-A2.7B --budget 50% -o qwen-moe-half
  moecover inspect Qwen/Qwen1.5-MoE-A2.7B
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


class _Once(argparse._StoreAction):
    """Stores a value, and refuses a second one: it would take the first one's place without a word."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        seen: set[str] = namespace.__dict__.setdefault("_given", set())
        if option is not None and self.dest in seen:
            parser.error(f"{option} is given twice. Give it once")
        seen.add(self.dest)
        super().__call__(parser, namespace, values, option)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {shortened(printable(message))}\n")


def verb(name: str) -> Verb:
    """The module of a verb."""
    return cast("Verb", importlib.import_module(f"moecover.cli.{name}"))


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The command line; docs/cli.md is generated from it.

    Args:
        only: the verb whose options are needed; None for those of all. Some options come from modules that take time to
            import.
    """
    parser = _Parser(
        prog="moecover",
        description="Makes a sparse Mixture-of-Experts language model smaller: fewer routed experts, thinner ones, "
        "refitted.",
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"moecover {VERSION}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("-q", "--quiet", action="store_true", help="no log and no progress on stderr")
    common.add_argument("-v", "--verbose", action="store_true", help="also what the libraries warn of, and tracebacks")
    common.add_argument("--log-file", type=Path, metavar="FILE", help="append the log to a file too, with times")
    verbs: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(
        dest="verb", metavar="VERB", parser_class=_Parser
    )
    for name in VERBS:
        if only not in (None, name, HELP_OF_ALL):
            verbs.add_parser(name)
            continue
        text = verb(name).HELP
        description = f"{text[0].upper()}{text[1:]}."
        made = verbs.add_parser(name, help=text, description=description, parents=[common], formatter_class=_Formatter)
        if only != HELP_OF_ALL:
            verb(name).add_options(made)
    return parser


TRACEBACK = "MOECOVER_TRACEBACK"  # environment variable: show where an internal error comes from
HELP_OF_ALL = "--help"  # every verb's line, no verb's options


def _quiet_libraries(*, quiet: bool, verbose: bool) -> None:
    """Keep other libraries' bars and advice out of the log, and their sums the same (the user's own settings stay)."""
    if not sys.warnoptions and not verbose:  # the user has asked for them with python -W
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of processes that this one starts
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "warning" if verbose else "error")
    if quiet or not sys.stderr.isatty():  # else its bars show downloads; "0" would also overrule who turns them off
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Without this, the last bit of MKL's products on processors without AVX-512 depends on the alignment of a matrix in
    # memory, and `verify` compares bits.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _print(text: str, file: TextIO) -> None:
    """Print, also where nobody reads any more (a closed pipe)."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _place() -> World:
    """Where this process is among the others; alone where the environment is incomplete, which `_run` refuses."""
    try:
        return world()
    except InputError:
        return ALONE


def _fail(text: str) -> None:
    """Say in one line why the command ends; of several processes only the first that fails does."""
    here = _place()
    if first_to_fail(here):
        rank = f"rank {here.rank} of {here.size}: " if here.size > 1 else ""
        _print(f"moecover: {rank}{shortened(printable(text))}", sys.stderr)


def _internal(error: BaseException, *, verbose: bool) -> int:
    """A fault of this program, in one line; the traceback for its developers on request."""
    if verbose or os.environ.get(TRACEBACK):
        raise error
    at = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(at.filename).name}:{at.lineno}"
    _fail(f"internal error: {type(error).__name__} in {place}: {error}. Give -v for the traceback to report")
    return 1


def _parsed(argv: list[str], asked: str | None) -> argparse.Namespace | None:
    """The arguments; None where there is no verb.

    Raises:
        InputError: an unknown verb or option; says which may be meant.
    """
    if asked is not None and asked not in VERBS:
        raise InputError(unknown_verb(asked, VERBS))
    parser = make_parser(asked or HELP_OF_ALL)
    own = of_verb(parser, asked)
    if word := foreign(argv, own):  # before what is missing, which it may stand for
        raise InputError(unknown_arguments([word], own))
    args, left = parser.parse_known_args(argv)
    if left:
        raise InputError(unknown_arguments(left, own))
    return args if args.verb else None


def of_verb(parser: argparse.ArgumentParser, name: str | None) -> argparse.ArgumentParser:
    """The parser of a verb among those of a parser; the parser itself where no verb is named."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and name in action.choices:
            return cast("argparse.ArgumentParser", action.choices[name])
    return parser


def _outcome(args: argparse.Namespace) -> Outcome:
    """What a verb gives, or would do."""
    if not getattr(args, "dry_run", False):
        return verb(args.verb).run(args)
    check_alone(world(), f"{args.verb} --dry-run")
    return dry_run(lambda: verb(args.verb).run(args))


def _run(argv: list[str]) -> int:
    asked = next((word for word in argv if not word.startswith("-")), None)
    with contextlib.redirect_stderr(None) if _place().rank > 0 else contextlib.nullcontext():
        args = _parsed(argv, asked)
    if args is None:
        _print(make_parser(HELP_OF_ALL).format_help(), sys.stdout)
        return 0
    args.argv = argv
    _quiet_libraries(quiet=args.quiet, verbose=args.verbose)
    here = world()
    if here.size > 1 and not getattr(verb(args.verb), "SHARED", False):
        several = ", ".join(name for name in VERBS if getattr(verb(name), "SHARED", False))
        raise InputError(f"{args.verb} runs in one process, torchrun started {here.size}. In several run {several}")
    progress.quiet = args.quiet or here.rank > 0
    try:
        with progress.logged(args.log_file if here.rank == 0 else None):
            with contextlib.redirect_stderr(io.StringIO()) if here.rank > 0 else contextlib.nullcontext():
                trust_model(args)
            try:
                outcome = _outcome(args)
            except MoecoverError as error:
                progress.note(error.for_command_line)
                raise
    except Exception as error:
        if behind(error):
            raise KeyboardInterrupt from error
        raise
    if here.rank == 0:
        text = folded(printable(outcome.text, lines=True), columns() if outcome.folds else None)
        _print(json.dumps(outcome.result, indent=1) if args.json else text, sys.stdout)
    if outcome.problem:
        _fail(outcome.problem)
    return outcome.status


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
        left = getattr(interrupt, "__notes__", None)  # the last note of a resumable job
        _fail(f"interrupted{f'. {left[-1]}' if left else ', nothing half-written was left'}")
        return 130
    except OSError as error:  # a file or folder that cannot be read, where no better message was at hand
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        return 1
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        if not is_out_of_memory(error):
            return _internal(error, verbose=not {"-v", "--verbose"}.isdisjoint(sys.argv[1:] if argv is None else argv))
        _fail("not enough memory. Give a smaller --batch-size or --length, or a smaller --dtype")
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    raise SystemExit(main())
