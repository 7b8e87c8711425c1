"""What a comparison is asked for: reads a YAML file or flags, gives one checked configuration and its cells. Pure.

Every coordinate is a field of `Config`, described in docs/compare.md. A mistake in the file is one line with file and line
number. `cells` expands the configuration of one model; nothing is read but the file itself.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moecover.checkpoints.topology import Topology
from moecover.corpora.sources import each_file, parse_corpora, set_folder, set_name
from moecover.corpora.windows import WINDOWS, check_text
from moecover.errors import InputError
from moecover.planning.keep import resolve_keep
from moecover.planning.methods import METHODS
from moecover.planning.run import check_options
from moecover.planning.saliency import DEFAULT_SALIENCY
from moecover.registry import unknown_name
from moecover.repairing.solver import KINDS

FULL = "full"  # the method of the cell that removes nothing
UNREPAIRED = "none"
SHIPPED = "shipped:"  # before the name of a model that comes with the package
Way = tuple[str | int, ...]  # keys and positions that lead to a value in the file


# ------------------------------------------------------------------------------------------------------ configuration
def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


def _sets(value: Any) -> Any:
    """A flat list of corpora is one calibration set."""
    value = _listed(value)
    return [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value


def _entry(key: str) -> Any:
    """A name alone stands for an entry with nothing else in it."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _repair(name: str) -> str:
    """The name of a repair, or ``none``."""
    if name != UNREPAIRED and name not in KINDS:
        raise unknown_name("repair", name, [UNREPAIRED, *KINDS])
    return name


Count = Annotated[int, Field(ge=1)]
Texts = Annotated[list[str], BeforeValidator(_listed)]
Numbers = Annotated[list[int], BeforeValidator(_listed), Field(min_length=1)]
Repairs = Annotated[
    list[str],
    BeforeValidator(_listed),
    AfterValidator(lambda names: [_repair(name) for name in names]),
    Field(min_length=1),
]


class ModelEntry(BaseModel):
    """A model: folder, hub id, or ``shipped:NAME``; what the results call it (default: the last part of its name)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    revision: str | None = None
    name: str = ""

    @model_validator(mode="after")
    def _named(self) -> ModelEntry:
        self.name = self.name or Path(self.model.removeprefix(SHIPPED)).name
        if not re.fullmatch(r"[\w.+-]+", self.name) or self.name.startswith("."):
            raise InputError(f"model {self.model!r} cannot be called {self.name!r}. Give it a name of letters, digits, . + - _")  # fmt: skip
        return self


class MethodEntry(BaseModel):
    """A method with its options; what else is in the entry (``protect``, ``mode``, ...) goes to the method."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: str
    saliency: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] | None = None
    seeds: Numbers | None = None
    repair: Repairs | None = None
    label: str | None = None
    protect_super_experts: bool = False


class Config(BaseModel):
    """A comparison; docs/compare.md says what every field means."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: Annotated[list[Annotated[ModelEntry, _entry("model")]], BeforeValidator(_listed), Field(min_length=1)]
    calibration: Annotated[list[Annotated[list[str], Field(min_length=1)]], BeforeValidator(_sets), Field(min_length=1)]
    samples: Numbers = [0]
    sequences: Count | None = None
    length: Count | None = None
    batch_size: Count = 4
    search_tokens: Count = 8192
    methods: Annotated[list[Annotated[MethodEntry, _entry("method")]], BeforeValidator(_listed), Field(min_length=1)] = [
        MethodEntry(method="random"), MethodEntry(method="pooled", saliency=["reap"]),
        MethodEntry(method="expert-sparsity"), MethodEntry(method="tb-coverage"),
    ]  # fmt: skip
    saliencies: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] = [DEFAULT_SALIENCY]
    seeds: Numbers = [0, 1, 2, 3, 4]
    repairs: Repairs = [UNREPAIRED]
    repair_tokens: Count = 65_536
    retain: Annotated[list[float], BeforeValidator(_listed), Field(min_length=1)] | None = None
    keep: Numbers | None = None
    perplexity: Texts = []
    window: Count | None = None
    windows: Count = WINDOWS
    tasks: Texts = []
    limit: Count | None = None
    data_dir: str | None = None
    include_path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    memory_limit: str | None = None
    plugins: Texts = []

    @model_validator(mode="after")
    def _whole(self) -> Config:
        if self.retain is not None and self.keep is not None:
            raise InputError("give one of `retain` (fractions) and `keep` (experts per layer), not both")
        if self.retain is None and self.keep is None:
            self.retain = [0.25, 0.5, 0.75]
        if not self.perplexity and not self.tasks:
            raise InputError("nothing to measure: give `perplexity`, `tasks` or both")
        for what, values in self.coordinates().items():
            if twice := [v for i, v in enumerate(values) if v in values[:i]]:
                raise InputError(f"{what} has {twice[0]} twice")
        return self

    def coordinates(self) -> dict[str, list[Any]]:
        """The values that may occur only once, by what a message calls them."""
        return {
            "`models`": [m.name for m in self.models],
            "`calibration`": [set_name(corpora_of(c)) for c in self.calibration],
            **{
                f"`{n}`": getattr(self, n) or []
                for n in ("samples", "seeds", "saliencies", "repairs", "retain", "keep", "tasks")
            },
        }

    def text(self) -> str:
        """The configuration as YAML, with all defaults: `read` gives the same configuration again."""
        value = self.model_dump(exclude_none=True)
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def corpora_of(arguments: Sequence[str]) -> list[str]:
    """Names of ``NAME`` and ``NAME=PATH`` arguments; of a folder, one of every file."""
    return [name for argument in arguments for name in each_file(*argument.partition("=")[::2])]


# ---------------------------------------------------------------------------------------------------------- YAML, flags
def _lines(node: yaml.Node, at: Way = ()) -> Iterator[tuple[Way, int]]:
    """The line of every value and key, by its way from the top.

    Raises:
        InputError: a key is given twice.
    """
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise InputError(f"line {line}: {key.value} is given twice, first in line {seen[key.value]}")
            seen[key.value] = line
            yield from _lines(value, (*at, key.value))
            yield (*at, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, (*at, number))


def _fields_at(way: Way) -> Iterable[str]:
    """The keys that may stand at a place."""
    model: Any = {"models": ModelEntry, "methods": MethodEntry}.get(str(way[0])) if way else Config
    return model.model_fields if model is not None else ()


def _words(error: Any) -> str:
    """What pydantic says of a mistake, in a line of ours."""
    way = tuple(
        part for part in error["loc"] if not (isinstance(part, str) and part.startswith(("function-", "list[")))
    )
    name = ".".join(str(part) for part in way)
    if error["type"] == "extra_forbidden":
        known = list(_fields_at(way[:-1]))
        close = difflib.get_close_matches(str(way[-1]), known, n=1)
        return f"unknown key {way[-1]!r}.{f' Did you mean {close[0]}?' if close else ''} Known: {', '.join(known)}"
    if error["type"] == "missing":
        return f"`{name}` is missing"
    if error["type"] == "too_short":
        return f"`{name}`: at least one value is needed"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    got = f", not {error['input']!r}" if not isinstance(error["input"], (dict, BaseModel)) else ""
    return f"`{name}`: {error['msg'][0].lower()}{error['msg'][1:]}{got}"


def checked(value: Any, *, where: str, lines: Mapping[Way, int], flags: Sequence[str] = ()) -> Config:
    """The configuration in a value.

    Args:
        value: what YAML or flags gave.
        where: file name for messages; empty where there is no file.
        lines: line of every place in it.
        flags: fields that came from flags, which have no line.

    Raises:
        InputError: says file and line, what was found and what is allowed.
    """
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise _at(first["loc"], _words(first), where=where, lines=lines, flags=flags) from error


def _at(way: Sequence[str | int], text: str, *, where: str, lines: Mapping[Way, int], flags: Sequence[str] = ()) -> InputError:  # fmt: skip
    """The error with the place in the file that a way leads to, or comes nearest to."""
    if (way and way[0] in flags) or not where:
        return InputError(f"--{str(way[0]).replace('_', '-')}: {text}" if way and way[0] in flags else text)
    at = tuple(way)
    while at and at not in lines:
        at = at[:-1]
    return InputError(f"{where}, line {lines[at]}: {text}" if at else f"{where}: {text}")


@dataclass(frozen=True)
class Asked:
    """A configuration and where its parts stand, so that what is found wrong later has its line too."""

    config: Config
    where: str = ""
    lines: Mapping[Way, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def wrong(self, error: InputError, *way: str | int) -> InputError:
        """The error with its place."""
        return _at(way, str(error), where=self.where, lines=self.lines, flags=self.flags)


def read(path: Path | None, flags: Mapping[str, Any]) -> Asked:
    """The configuration of a YAML file, of flags, or of both: a flag takes the place of the file's field.

    Paths in the file are taken from its folder, those of flags from the current one; both become absolute.

    Raises:
        InputError: no such file, not YAML, an unknown key, a wrong value; with the line.
    """
    value: Any = {}
    lines: dict[Way, int] = {}
    where = ""
    if path is not None:
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            value = yaml.safe_load(text)
        except FileNotFoundError:
            raise InputError(f"no configuration {path}. docs/compare.md says how to write one") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no text: {error}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise InputError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
        if not isinstance(value, dict) or node is None:
            raise InputError(f"{path} holds no keys with values. docs/compare.md says how to write one")
        try:
            lines.update(_lines(node))
        except InputError as error:
            raise InputError(f"{path}, {error}") from error
        value = _absolute(value, path.absolute().parent)
    value = {**value, **_absolute(dict(flags), Path.cwd())}
    if "retain" in flags or "keep" in flags:
        value = {k: v for k, v in value.items() if k not in ("retain", "keep") or k in flags}
    config = checked(value, where=where, lines=lines, flags=tuple(flags))
    return Asked(config, where, lines, tuple(flags))


def _absolute(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The value with its paths made absolute; what is no path stays."""

    def source(text: Any) -> Any:
        name, equals, path = text.partition("=") if isinstance(text, str) else (text, "", "")
        return f"{name}={folder / path}" if equals and path else text

    def model(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {**entry, "model": model(entry["model"])} if "model" in entry else entry
        return str((folder / entry).resolve()) if isinstance(entry, str) and (folder / entry).is_dir() else entry

    def each(change: Any, found: Any) -> Any:
        return [each(change, one) for one in found] if isinstance(found, list) else change(found)

    changes = {"models": model, "calibration": source, "perplexity": source}
    changes |= dict.fromkeys(("data_dir", "include_path", "plugins"), lambda text: str(folder / text) if isinstance(text, str) else text)  # fmt: skip
    return {key: each(changes[key], found) if key in changes else found for key, found in value.items()}


# -------------------------------------------------------------------------------------------------------------- variants
@dataclass(frozen=True)
class Variant:
    """One way to choose experts, and what is done to those that stay: without budget and seed.

    Attributes:
        method: name in `METHODS`.
        saliency: its saliency, None where it has none.
        options: what else goes to the method, and ``protect_super_experts``.
        seeds: one plan each; empty for a method that chooses nothing by chance.
        label: what a reader calls it.
        blind: it looks at no statistics and repairs nothing, so that it needs no calibration.
        searches: it needs the model and a sample of the layers' inputs.
        repair: of what stays, see `repair.KINDS`, or ``none``.
    """

    method: str
    saliency: str | None
    options: dict[str, Any]
    seeds: tuple[int, ...]
    label: str
    blind: bool
    searches: bool
    repair: str = UNREPAIRED


NAMES = {"tb-coverage": "TB-Coverage", "expert-sparsity": "ExpertSparsity", "worst-corpus": "worst corpus"}


def label_of(method: str, saliency: str | None, options: Mapping[str, Any]) -> str:
    """What a reader calls a variant: ``TB-Coverage (contribution)``, ``REAP``, ``ExpertSparsity``, ``random``."""
    name, inside = NAMES.get(method, method), [saliency] if saliency else []
    if method == "pooled" and saliency == "reap":
        name, inside = "REAP", []
    inside += [f"{k.replace('_', ' ')} {v}" if v is not True else k.replace("_", " ") for k, v in options.items()]
    return f"{name} ({', '.join(inside)})" if inside else name


def variants(asked: Asked) -> list[Variant]:
    """The variants of a configuration, in its order.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or one variant twice.
    """
    config, found = asked.config, list[Variant]()
    for number, entry in enumerate(config.methods):
        try:
            parameters = inspect.signature(METHODS[entry.method].function).parameters
            given = dict(entry.model_extra or {})
            takes, seeded = "saliency" in parameters, "seed" in parameters
            if entry.saliency and not takes:
                raise InputError(f"method {entry.method} has no saliency")
            if entry.seeds and not seeded:
                raise InputError(f"method {entry.method} chooses nothing by chance: it has no seeds")
            for saliency in (entry.saliency or config.saliencies) if takes else [None]:
                check_options(entry.method, given | ({"saliency": saliency} if takes else {}))
                options = given | ({"protect_super_experts": True} if entry.protect_super_experts else {})
                blind = METHODS[entry.method].blind and not entry.protect_super_experts
                label = entry.label or label_of(entry.method, saliency, options)
                if entry.label and len(entry.saliency or [0]) > 1:
                    label = f"{label} ({saliency})"
                seeds, searches = tuple(entry.seeds or config.seeds) if seeded else (), "model" in parameters
                for repair in entry.repair or config.repairs:
                    whole, name = repair == UNREPAIRED, label if repair == UNREPAIRED else f"{label} + {repair}"
                    found.append(
                        Variant(entry.method, saliency, options, seeds, name, blind and whole, searches, repair)
                    )
        except InputError as error:
            raise asked.wrong(error, "methods", number) from error
        slugs = [slug(v.label) for v in found]
        if twice := [v.label for i, v in enumerate(found) if slugs[i] in slugs[:i]]:
            raise asked.wrong(InputError(f"two methods are called {twice[0]}. Give one of them another label"), "methods", number)  # fmt: skip
    return found


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-").lower()


# ----------------------------------------------------------------------------------------------------------------- cells
@dataclass(frozen=True)
class Cell:
    """One row of a comparison, by its coordinates.

    Attributes:
        model: name of the model.
        variant: how experts are chosen; None for the full model.
        calibration: names of the corpora; empty where none has a say (the full model, random plans).
        sample: seed of the calibration sample; 0 where there is none.
        retain: fraction of the experts that is kept, as asked for.
        keep: experts kept per layer.
        seed: of the plan; None where nothing is chosen by chance.
    """

    model: str
    variant: Variant | None
    calibration: tuple[str, ...]
    sample: int
    retain: float
    keep: int
    seed: int | None

    @property
    def label(self) -> str:
        return self.variant.label if self.variant else "full model"

    @property
    def repair(self) -> str:
        return self.variant.repair if self.variant else UNREPAIRED

    @property
    def id(self) -> str:
        """Name of the cell's folder: the same in every grid that has the cell."""
        if self.variant is None:
            return f"{self.model}-{FULL}"
        text = f"-{set_folder(self.calibration)}-{self.sample}" if self.calibration else ""
        seed = f"-seed{self.seed}" if self.seed is not None else ""
        return f"{self.model}-{slug(self.variant.label)}{text}-keep{self.keep}{seed}"

    @property
    def words(self) -> str:
        """The cell in a line of log."""
        if self.variant is None:
            return f"{self.model}, full model"
        parts = [self.model, self.label, f"{self.keep} experts", *([set_name(self.calibration)] if self.calibration else [])]  # fmt: skip
        parts += [f"sample {self.sample}"] if self.sample else []
        return ", ".join([*parts, *([f"seed {self.seed}"] if self.seed is not None else [])])

    def to_json(self) -> dict[str, Any]:
        """The coordinates as cell.json has them."""
        variant = self.variant
        return {
            "id": self.id, "model": self.model, "method": variant.method if variant else FULL,
            "saliency": variant.saliency if variant else None, "options": variant.options if variant else {},
            "calibration": list(self.calibration), "sample": self.sample, "retain": self.retain, "keep": self.keep,
            "seed": self.seed, "repair": self.repair, "label": self.label,
        }  # fmt: skip


def budgets(config: Config, topology: Topology, name: str) -> list[tuple[float, int]]:
    """Fraction and number of kept experts of every budget for a model.

    Raises:
        InputError: the router does not allow a budget, or two budgets keep the same number.
    """
    found: list[tuple[float, int]] = []
    for retain, keep in [(r, None) for r in config.retain or ()] + [(None, k) for k in config.keep or ()]:
        try:
            count = resolve_keep(topology, keep=keep, retain=retain)
        except InputError as error:
            raise InputError(f"{name}: {str(error).replace('--retain', 'retain').replace('--keep', 'keep')}") from error
        found.append((retain if retain is not None else round(count / topology.num_experts, 4), count))
    keeps = [count for _, count in found]
    if len(set(keeps)) < len(keeps):
        raise InputError(f"{name}: the budgets keep {', '.join(map(str, keeps))} experts: give every one once")
    return found


def cells(asked: Asked, model: ModelEntry, topology: Topology) -> list[Cell]:
    """The cells of a model in the order of its tables: the full model, then by budget, method, calibration, sample, seed.

    Raises:
        InputError: as `variants` and `budgets`.
    """
    config, found = asked.config, [Cell(model.name, None, (), 0, 1.0, topology.num_experts, None)]
    sets = [tuple(corpora_of(corpora)) for corpora in config.calibration]
    try:
        sizes = budgets(config, topology, model.name)
    except InputError as error:
        raise asked.wrong(error, "retain" if config.retain else "keep") from error
    for (retain, keep), variant in itertools.product(sizes, variants(asked)):
        texts = [((), 0)] if variant.blind else list(itertools.product(sets, config.samples))
        for (calibration, sample), seed in itertools.product(texts, variant.seeds or (None,)):
            found.append(Cell(model.name, variant, calibration, sample, retain, keep, seed))
    return found


def check_sources(asked: Asked) -> None:
    """Refuse corpora and texts that cannot be: unknown names, files that are not there.

    Raises:
        InputError: with the line.
    """
    config = asked.config
    for way, arguments in [*((("calibration", i), c) for i, c in enumerate(config.calibration)), (("perplexity",), config.perplexity)]:  # fmt: skip
        try:
            for name, path in parse_corpora(arguments).items() if arguments else ():
                if way == ("perplexity",) and not path:
                    check_text(name)
        except InputError as error:
            raise asked.wrong(
                InputError(str(error).replace("--corpus ", "").replace("--perplexity ", "")), *way
            ) from error
