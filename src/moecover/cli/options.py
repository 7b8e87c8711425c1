"""Options that several verbs share: their declaration, and what they mean to the functions of the stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.cli.values import dtype, share
from moecover.cli.widths import add_widths, numbers, width_arguments
from moecover.errors import InputError, flag
from moecover.registry import load_plugin
from moecover.text import listed

if TYPE_CHECKING:
    from moecover.planning.options import Option
    from moecover.runtime.options import RunOptions

Group = argparse._ActionsContainer  # a parser or a group of options


# --------------------------------------------------------------------------------------------------------- declaration
def add_model(parser: Group, *, note: str = "") -> None:
    """The model, and which revision of it."""
    parser.add_argument("model", metavar="MODEL", help=f"local folder, hub id (owner/name) or shipped:NAME{note}")
    add_revision(parser)


def add_revision(parser: Group) -> None:
    """Which revision of a hub model, and whether its own code may run."""
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with the model, for types and tokenizers that transformers does not know: it can "
        "do what any program can (off by default)",
    )


def add_output(parser: Group, metavar: str, text: str, *, replaced: str = "") -> None:
    """Where the result goes; with ``replaced``, also whether an existing output may be replaced."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help=text)
    if replaced:
        parser.add_argument("--overwrite", action="store_true", help=f"replace {replaced}")


def add_device(parser: Group) -> None:
    """Where and in which precision the model runs, and how much memory it may take."""
    parser.add_argument("--dtype", type=dtype, help="auto (the checkpoint's), bfloat16, float16 or float32")
    parser.add_argument("--device", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="spread the model over several devices: auto, balanced, or a JSON file with devices by name of a module",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="memory that may be used, such as 4GB (default: nine tenths of what is free); a model that does not fit "
        "runs layer by layer",
    )


def add_keep_inputs(parser: Group, when: str) -> None:
    """The sample of the expert layers' inputs that methods which run the experts search on."""
    parser.add_argument(
        "--keep-inputs",
        type=int,
        metavar="TOKENS",
        help="save the inputs of the expert layers for this many tokens, shared by the corpora, whole "
        f"sequences ({when})",
    )


def add_libllama(parser: Group) -> None:
    """The library that runs GGUF files."""
    parser.add_argument(
        "--libllama",
        type=Path,
        metavar="PATH",
        help="shared library of llama.cpp, which runs GGUF files (default: the one of `moecover[gguf]`)",
    )


def searching_methods() -> str:
    """Names of the methods that run the experts, for help texts."""
    from moecover.planning.methods import METHODS

    return listed([name for name, method in METHODS.items() if method.runs_experts])


def add_method(parser: argparse.ArgumentParser, *, several: bool, has_seed: bool) -> None:
    """Method, its options, and the budget.

    Args:
        parser: of the verb.
        several: whether several budgets may be given, with commas between them.
        has_seed: whether ``--seed`` is declared already, as that of the sample of blocks.
    """
    from moecover.planning.methods import default_method, options_of_all

    group = parser.add_argument_group("plan")
    group.add_argument("--method", help=f"moecover ls methods (default: {default_method().name})")
    for option, methods in options_of_all():
        if option.name != "seed" or not has_seed:
            _add_option(group, option, methods)
    group.add_argument(
        "--protect-super-experts",
        action="store_true",
        help="keep the experts with extreme outputs (arXiv 2507.23279), whatever the method says",
    )
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of a plugin's method; repeat it"
    )
    more = "; several with commas give several plans" if several else ""
    group.add_argument("--keep", type=numbers(int, several), metavar="K", help=f"experts kept per layer{more}")
    group.add_argument(
        "--retain",
        type=numbers(share, several),
        metavar="R",
        help=f"fraction of experts kept per layer, in (0, 1], or as 50%%{more}",
    )
    group.add_argument(
        "--multiple-of",
        type=int,
        metavar="N",
        help="round the experts kept to the nearest multiple of N that the router allows: servers run best with "
        "multiples of 8",
    )
    add_widths(group, several=several)
    add_plugin(group)


def _add_option(group: Group, option: Option, methods: list[str]) -> None:
    """The flag of a method's option; its help names the methods that have it."""
    default = "" if option.default in (None, "") else f" (default: {option.default})"
    text = f"{', '.join(methods)}: {option.help}{default}"
    if option.mapping:
        group.add_argument(
            flag(option.name),
            dest=option.name,
            action="append",
            default=[],
            metavar=option.metavar,
            help=f"{text}; repeat it",
        )
        return
    group.add_argument(
        flag(option.name), dest=option.name, type=option.parse, metavar=option.metavar or option.name.upper(), help=text
    )


def add_plugin(parser: Group) -> None:
    """Files of the user's own."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.py",
        help="your own methods, saliencies, corpora and page sections: a Python file, which is run; repeat it",
    )


# ------------------------------------------------------------------------------------------------------ what is meant
def load_plugins(args: argparse.Namespace) -> None:
    """Run the files of ``--plugin``."""
    for path in args.plugin:
        load_plugin(path)


def trust_model(args: argparse.Namespace) -> None:
    """Run the code that comes with the model of a verb, where ``--trust-remote-code`` says so.

    Raises:
        InputError: there is no such model, or no code that is needed.
    """
    if not getattr(args, "trust_remote_code", False):
        return
    if args.model is None:
        raise InputError("--trust-remote-code has no use here: no model is given")
    from moecover.checkpoints.remote_code import trust_remote_code

    trust_remote_code(args.model, revision=args.revision)


def pass_arguments(args: argparse.Namespace) -> RunOptions:
    """How forward passes run."""
    return {
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        "device_map": args.device_map,
        "memory_limit": args.memory_limit,
        "revision": args.revision,
    }


def pairs(arguments: list[str], name: str, parse: Callable[[str], object]) -> dict[str, object]:
    """``NAME=VALUE`` arguments of a flag.

    Raises:
        InputError: one has no name or no value, or a name is given twice.
    """
    found: dict[str, object] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not key or not equals:
            raise InputError(f"{flag(name)} {argument}: give NAME=VALUE")
        if key in found:
            raise InputError(f"{flag(name)} {argument}: {key} has the value {found[key]} already. Give it once")
        found[key] = parse(text)
    return found


def method_arguments(args: argparse.Namespace, *, shared_seed: bool) -> tuple[str, dict[str, object]]:
    """The method that is asked for and its options as given, plugins loaded.

    Args:
        args: of the verb.
        shared_seed: whether ``--seed`` is that of the sample of blocks too: a method that chooses nothing by chance has
            no use for it then, and ``--option seed=N`` gives the method another one.

    Raises:
        InputError: an unknown method, an option that it does not have, or one that is given in two ways.
    """
    from moecover.planning.methods import METHODS, default_method, options_of_all
    from moecover.planning.options import json_or_text

    load_plugins(args)
    method = METHODS[args.method or default_method().name]
    given: dict[str, object] = {}
    for option, _ in options_of_all():
        value = getattr(args, option.name, None)
        if option.mapping and value:
            given[option.name] = pairs(value, option.name, option.parse)
        elif not option.mapping and value is not None:
            given[option.name] = value
    if shared_seed and not method.seeded:
        given.pop("seed", None)
    more = pairs(args.option, "option", json_or_text)
    twice = [name for name in more if name in given and not (shared_seed and name == "seed")]
    if twice:
        raise InputError(f"{flag(twice[0])} and --option {twice[0]}=... give the same option. Give it once")
    given |= more
    method.complete(given)
    if args.protect_super_experts:
        given["protect_super_experts"] = True
    given |= width_arguments(args)
    return method.name, given
