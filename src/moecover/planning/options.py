"""Options of selection methods: a name, a parser and a range, from which the command line makes a flag.

Options that several methods share are constants here, so that a flag means the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecover.errors import InputError, arg
from moecover.files.reading import parse_json


def _anything(value: object) -> str | None:
    return None


@dataclass(frozen=True)
class Option:
    """A keyword argument of a method.

    Attributes:
        name: the keyword; its flag on the command line is `errors.flag` of it.
        help: one line for the command line's help; empty where the method's author wrote none.
        metavar: placeholder of the value in the help.
        parse: turns the text of the command line into the value; raises ValueError.
        default: the value if none is given. The registry of methods takes it from the function's signature.
        choices: the allowed values; empty if `check` decides.
        mapping: by corpus: a dictionary in Python, ``CORPUS=VALUE`` on the command line, once per corpus.
        check: says what is wrong with a value (with each value of a mapping) as the end of a sentence that starts
            with the argument, such as "is out of range: 0 or more"; None for a good value. It may raise InputError.
    """

    name: str
    help: str = ""
    metavar: str | None = None
    parse: Callable[[str], object] = str
    default: object = None
    choices: tuple[str, ...] = ()
    mapping: bool = False
    check: Callable[[object], str | None] = _anything

    def validate(self, value: object) -> None:
        """Refuse a value that the option does not allow.

        Raises:
            InputError: the value is out of range, or not among the choices.
        """
        if self.mapping:
            if value is not None and not isinstance(value, Mapping):
                raise InputError(f"{arg(self.name, value)} is not by corpus: give a value for each corpus by name")
            for key, one in (value or {}).items():
                self._validate_one(one, f"{key}={one}")
        else:
            self._validate_one(value, value)

    def _validate_one(self, value: object, given: object) -> None:
        if self.choices and value not in self.choices:
            raise InputError(f"{arg(self.name, given)} is unknown. Allowed: {', '.join(self.choices)}")
        if wrong := self.check(value):
            raise InputError(f"{arg(self.name, given)} {wrong}")


def json_or_text(text: str) -> object:
    """The value of an option without a parser of its own: JSON if it is valid JSON, otherwise the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _saliency(value: object) -> str | None:
    from moecover.planning.saliency import SALIENCIES  # numpy: not needed for the command line's help

    SALIENCIES[str(value)]
    return None


def _share(value: object) -> str | None:
    good = isinstance(value, (int, float)) and 0 <= value <= 1
    return None if good else "is out of range: a share of the kept experts, from 0 to 1"


def _turns(value: object) -> str | None:
    return None if type(value) is int and value >= 0 else "is out of range: a whole number of turns, 0 or more"


SALIENCY = Option(
    "saliency",
    "importance score of an expert, see `moecover ls saliencies`",
    metavar="NAME",
    default="contribution",
    check=_saliency,
)
PROTECT = Option(
    "protect",
    "share of the kept experts that corpora protect in turn, 0 to 1",
    metavar="P",
    parse=float,
    default=0.5,
    check=_share,
)
RESERVE = Option(
    "reserve",
    "share of the kept experts reserved for rare specialists: those whose output is largest for the tokens that are "
    "routed to them (reap), however few these are; 0 to 1",
    metavar="R",
    parse=float,
    check=lambda value: None if value is None else _share(value),
)
WEIGHTS = Option(
    "weights",
    "turns of a corpus per round and its weight in the mean; 1 for a corpus that is not named, 0 leaves it out",
    metavar="NAME=N",
    parse=json_or_text,
    mapping=True,
    check=_turns,
)
SEED = Option("seed", "random seed", metavar="N", parse=int, default=0)
LAYERWISE, PROGRESSIVE, LOCAL = "layerwise", "progressive", "progressive-local"
MODE = Option(
    "mode",
    "the inputs of a layer are the full model's (layerwise), or what the pruned layers before it leave; its output is "
    "compared with the full model's (progressive), or with its own with all experts on these inputs "
    "(progressive-local)",
    default=LAYERWISE,
    choices=(LAYERWISE, PROGRESSIVE, LOCAL),
)
SEARCH = Option(
    "search",
    "exhaustive, greedy, or auto: exhaustive up to 100,000 subsets per layer",
    default="auto",
    choices=("auto", "exhaustive", "greedy"),
)
SHARED = (SALIENCY, PROTECT, RESERVE, WEIGHTS, SEED, MODE, SEARCH)
