"""The registry of selection methods: what the rest of the program knows of a method, apart from its choice.

A method is a function from a profile, a budget and options to a choice of experts per layer, entered with `METHODS`.
The built-in ones are the modules of `planning.methods`; import `METHODS` from there to have them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moecover.errors import InputError, arg
from moecover.planning.options import SHARED, Option, json_or_text
from moecover.registry import Registry, unknown_name

Function = Callable[..., object]
F = TypeVar("F", bound=Function)

RESOURCES = ("model", "structure", "sample", "advance")  # what a method works with: not options, so not in the plan
PLUGIN_RANK = 100


@dataclass(frozen=True)
class Method:
    """A selection method.

    Attributes:
        name: as it is asked for and written to plans.
        function: from a profile, a `Budget` (all of them if `together`) and options to one `LayerPlan` per MoE layer
            (to a list of these per budget).
        label: name in tables, figures and reports.
        summary: one line.
        paper: source of the method.
        options: its options, in the order of the function's keywords.
        blind: it does not look at the profile, so that it needs no calibration.
        runs_experts: it needs the live model and the inputs of its MoE layers, not the profile alone.
        together: it is called once with all budgets.
        pairs: it needs the profile's statistics of pairs, of which parts of the text have none.
        unequal: its layers keep different numbers of experts, the budget's on average: for evaluation only.
        baseline: the others are tested against it.
        default: the method that is used if none is named.
        compared: a comparison that names no methods includes it.
        published: by saliency, the label of a published method that this one is with that saliency.
        rank: position in listings.
    """

    name: str
    function: Function
    label: str
    summary: str
    paper: str
    options: tuple[Option, ...]
    blind: bool = False
    runs_experts: bool = False
    together: bool = False
    pairs: bool = False
    unequal: bool = False
    baseline: bool = False
    default: bool = False
    compared: bool = False
    published: Mapping[str, str] = field(default_factory=dict)
    rank: int = PLUGIN_RANK

    @property
    def seeded(self) -> bool:
        """Whether the choice depends on a random seed."""
        return self.has("seed")

    def has(self, option: str) -> bool:
        """Whether the method has an option."""
        return any(own.name == option for own in self.options)

    def complete(self, options: Mapping[str, object]) -> dict[str, object]:
        """Checked options, the defaults filled in; model, checkpoint and the like are passed through.

        Raises:
            InputError: an option that the method does not have, that it needs and was not given, or out of range.
        """
        keywords = inspect.signature(self.function).parameters
        resources = {name for name in RESOURCES if name in keywords and name in options}
        own = {option.name: option for option in self.options}
        if unknown := [name for name in options if name not in own and name not in resources]:
            known = ", ".join(arg(name) for name in own)
            raise InputError(f"{arg(unknown[0])} is no option of method {self.name}. It has: {known or 'none'}")
        found: dict[str, object] = {}
        for name in keywords:
            if name in resources:
                found[name] = options[name]
            elif name in own:
                found[name] = options.get(name, own[name].default)
                if found[name] is inspect.Parameter.empty:
                    raise InputError(f"method {self.name} needs {arg(name)}")
                own[name].validate(found[name])
        return found

    @property
    def from_profile(self) -> bool:
        """Whether it plans from the profile alone: it neither runs the experts nor reads the weights."""
        return not self.runs_experts and not self.reads_weights

    @property
    def rates_mtp(self) -> bool:
        """Whether it chooses experts of multi-token-prediction layers by statistics of their own."""
        return self.from_profile and not self.unequal

    @property
    def reads_weights(self) -> bool:
        """Whether it reads the checkpoint's weights, but runs nothing."""
        return not self.runs_experts and "structure" in inspect.signature(self.function).parameters

    def given(self, **found: object) -> dict[str, Any]:
        """What it works with of model, checkpoint and the like, as arguments of `plan_budgets`."""
        return {name: value for name, value in found.items() if name in inspect.signature(self.function).parameters}

    def needs(self, options: Mapping[str, object]) -> list[str]:
        """What the function cannot do without and is not among its options: ``model``, ``structure``."""
        keywords = inspect.signature(self.function).parameters
        return [n for n in RESOURCES if n in keywords and _required(keywords[n]) and options.get(n) is None]


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _options(name: str, function: Function, declared: tuple[Option, ...]) -> tuple[Option, ...]:
    """Options in the order of a function's keywords: the declared ones, then the shared ones, by name.

    Defaults are the signature's. A keyword that is neither declared nor shared becomes a plain option.
    """
    known = {option.name: option for option in (*SHARED, *declared)}
    found = []
    for keyword, parameter in list(inspect.signature(function).parameters.items())[2:]:  # after profile and budget
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not named or keyword in RESOURCES:
            continue
        option = known.get(keyword, Option(keyword, parse=json_or_text))
        same = type(option.default) is type(parameter.default) and option.default == parameter.default
        found.append(option if same else dataclasses.replace(option, default=parameter.default))
    if extra := {option.name for option in declared} - {option.name for option in found}:
        raise InputError(f"method {name} declares option {min(extra)}, which its function does not take by keyword")
    return tuple(found)


class MethodRegistry(Mapping[str, Method]):
    """Methods by name, in the order of listings; used as a decorator, it enters one."""

    def __init__(self) -> None:
        self._functions: Registry[Function] = Registry("method")
        self._methods: dict[str, Method] = {}

    def __call__(
        self,
        name: str,
        *,
        paper: str,
        label: str | None = None,
        options: tuple[Option, ...] = (),
        blind: bool = False,
        together: bool = False,
        pairs: bool = False,
        unequal: bool = False,
        baseline: bool = False,
        default: bool = False,
        compared: bool = False,
        published: Mapping[str, str] | None = None,
        rank: int = PLUGIN_RANK,
    ) -> Callable[[F], F]:
        """Decorator that enters a function as a method; see `Method` for the arguments.

        Raises:
            InputError: a plugin uses a name that is taken, or an option is no keyword of the function.
        """

        def enter(function: F) -> F:
            own = _options(name, function, options)
            self._functions(name, paper=paper)(function)
            self._methods[name] = Method(
                name=name,
                function=self._functions[name],
                label=label or name,
                summary=(function.__doc__ or "").strip().split("\n")[0],
                paper=paper,
                options=own,
                blind=blind,
                runs_experts="model" in inspect.signature(function).parameters,
                together=together,
                pairs=pairs,
                unequal=unequal,
                baseline=baseline,
                default=default,
                compared=compared,
                published=published or {},
                rank=rank,
            )
            return function

        return enter

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            raise unknown_name("method", name, self)
        return self._methods[name]

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._methods, key=lambda name: self._methods[name].rank))

    def __len__(self) -> int:
        return len(self._methods)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A block after which the methods that were entered within it are gone."""
        methods = dict(self._methods)
        try:
            with self._functions.restored():
                yield
        finally:
            self._methods = methods

    def rows(self) -> list[dict[str, str]]:
        """Name, summary and paper of every method, for listings and docs."""
        return [{"name": m.name, "summary": m.summary, "paper": m.paper} for m in self.values()]

    def label(self, name: str, saliency: str | None = None) -> str:
        """What a reader calls a method, with a saliency if it has one; an unknown method goes by its name."""
        if name not in self:
            return name
        return self[name].published.get(saliency or "", self[name].label)


METHODS = MethodRegistry()
