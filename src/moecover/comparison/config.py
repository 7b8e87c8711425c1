"""The configuration of a comparison, as the fields of a YAML file: `Config`; docs/compare.md describes every field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moecover.checkpoints.shipped import SHIPPED
from moecover.corpora.arguments import expanded
from moecover.corpora.sources import set_name
from moecover.corpora.windows import WINDOWS
from moecover.errors import InputError
from moecover.gguf.parts import is_gguf, stem_of
from moecover.merging.method import NONE
from moecover.planning.methods import METHODS
from moecover.planning.saliency import DEFAULT_SALIENCY
from moecover.registry import unknown_name
from moecover.repairing.solver import KINDS

UNREPAIRED = UNMERGED = NONE


def _listed(value: object) -> object:
    """One value stands for a list of one."""
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


def _sets(value: object) -> object:
    """A flat list of corpora is one calibration set."""
    value = _listed(value)
    return [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value


def _entry(key: str) -> BeforeValidator:
    """A bare name stands for an entry that has nothing else."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _repair(name: str) -> str:
    """The name of a repair, or ``none``."""
    if name != UNREPAIRED and name not in KINDS:
        raise unknown_name("repair", name, [UNREPAIRED, *KINDS])
    return name


Count = Annotated[int, Field(ge=1)]
Merges = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
Texts = Annotated[list[str], BeforeValidator(_listed)]
Numbers = Annotated[list[int], BeforeValidator(_listed), Field(min_length=1)]
Shapes = Annotated[
    list[str],
    BeforeValidator(_listed),
    BeforeValidator(lambda value: [str(one) if isinstance(one, int) else one for one in value]),
    Field(min_length=1),
]
Repairs = Annotated[
    list[str],
    BeforeValidator(_listed),
    AfterValidator(lambda names: [_repair(name) for name in names]),
    Field(min_length=1),
]


def _checked_name(what: str, name: str) -> str:
    """A name that can be part of a file's.

    Raises:
        InputError: names what cannot be called so.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError(f"{what} cannot be called {name!r}. Give it a name of letters, digits, . + - _")
    return name


class FileEntry(BaseModel):
    """A further GGUF file of a model, a row as it is; ``name`` defaults to that of the file, without its ending."""

    model_config = ConfigDict(extra="forbid", strict=True)

    file: str
    name: str = ""

    @model_validator(mode="after")
    def _named(self) -> FileEntry:
        if not is_gguf(self.file):
            raise InputError(f"file {self.file!r}: rows from files are for GGUF. Give FILE.gguf")
        self.name = _checked_name(f"file {self.file!r}", self.name or stem_of(Path(self.file)))
        return self


class ModelEntry(BaseModel):
    """A model: folder, hub id, GGUF file, or ``shipped:NAME``; ``name`` defaults to the last part of ``model``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    revision: str | None = None
    name: str = ""
    files: Annotated[list[Annotated[FileEntry, _entry("file")]], BeforeValidator(_listed)] = []
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _named(self) -> ModelEntry:
        last = stem_of(Path(self.model)) if self.gguf else Path(self.model.removeprefix(SHIPPED)).name
        self.name = _checked_name(f"model {self.model!r}", self.name or last)
        if self.files and not self.gguf:
            raise InputError(f"model {self.model!r} has `files`: rows from files are for GGUF. Give MODEL.gguf")
        names = [file.name for file in self.files]
        if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
            raise InputError(f"model {self.model!r}: two files are called {repeated[0]}. Give one of them a `name`")
        return self

    @property
    def gguf(self) -> bool:
        """Whether llama.cpp runs it."""
        return is_gguf(self.model)


class MethodEntry(BaseModel):
    """A method with its options; any other key of the entry (``protect``, ``mode``, ...) is passed to the method."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: str
    saliency: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] | None = None
    seeds: Numbers | None = None
    merge: Merges | None = None
    repair: Repairs | None = None
    label: str | None = None
    protect_super_experts: bool = False
    protect_channels: Annotated[float, Field(ge=0, le=1)] = 0.0


def default_methods(*, runs_experts: bool = True) -> list[MethodEntry]:
    """The methods of a configuration that names none: the baseline first, the default method last.

    A method that is a published one with some saliency is compared with that saliency.

    Args:
        runs_experts: those too that run the experts, which needs transformers.
    """
    chosen = [m for m in METHODS.values() if m.compared and (runs_experts or not m.runs_experts)]
    chosen.sort(key=lambda method: (not method.baseline, method.default, method.rank))
    return [MethodEntry(method=m.name, saliency=list(m.published) or None) for m in chosen]


class Config(BaseModel):
    """A comparison; docs/compare.md describes every field."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: Annotated[list[Annotated[ModelEntry, _entry("model")]], BeforeValidator(_listed), Field(min_length=1)]
    calibration: Annotated[list[Annotated[list[str], Field(min_length=1)]], BeforeValidator(_sets), Field(min_length=1)]
    samples: Numbers = [0]
    sequences: Count | None = None
    length: Count | None = None
    bos: Literal["auto", "always", "never"] = "auto"
    batch_size: Count = 4
    search_tokens: Count = 8192
    methods: Annotated[
        list[Annotated[MethodEntry, _entry("method")]], BeforeValidator(_listed), Field(min_length=1)
    ] = Field(default_factory=default_methods)
    saliencies: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] = [DEFAULT_SALIENCY]
    seeds: Numbers = [0, 1, 2, 3, 4]
    merges: Merges = [UNMERGED]
    repairs: Repairs = [UNREPAIRED]
    repair_tokens: Count = 65_536
    top_ks: Annotated[list[Count], BeforeValidator(_listed)] = []
    skip: bool = False
    retain: Annotated[list[float], BeforeValidator(_listed), Field(min_length=1)] | None = None
    keep: Numbers | None = None
    shapes: Shapes | None = None
    perplexity: Texts = []
    window: Count | None = None
    windows: Count = WINDOWS
    tasks: Texts = []
    limit: Count | None = None
    data_dir: str | None = None
    include_path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | dict[str, str | int] | None = None
    memory_limit: str | None = None
    libllama: str | None = None
    plugins: Texts = []

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if "methods" not in self.model_fields_set and any(entry.gguf for entry in self.models):
            self.methods = default_methods(runs_experts=False)
        given = sum(one is not None for one in (self.retain, self.keep, self.shapes))
        if given > 1:
            raise InputError(
                "give one of `retain` (fractions), `keep` (experts per layer) and `shapes` (experts x channels), not "
                f"{'both' if given == 2 else 'all'}"
            )
        if not given:
            self.retain = [0.25, 0.5, 0.75]
        if not self.perplexity and not self.tasks:
            raise InputError("nothing to measure: give `perplexity`, `tasks` or both")
        for field, values in self._unique().items():
            if repeated := [v for i, v in enumerate(values) if v in values[:i]]:
                raise InputError(f"`{field}` has {repeated[0]} twice")
        return self

    def _unique(self) -> dict[str, Sequence[object]]:
        """Fields whose values may occur only once, with these values."""
        plain = ("samples", "seeds", "saliencies", "merges", "repairs", "top_ks", "retain", "keep", "shapes", "tasks")
        return {
            "models": [m.name for m in self.models],
            "calibration": [set_name(corpora_of(c)) for c in self.calibration],
            **{name: getattr(self, name) or [] for name in plain},
        }

    def text(self) -> str:
        """The configuration as YAML, all defaults filled in; reading it gives the same configuration."""
        value = self.model_dump(exclude_none=True)
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def corpora_of(arguments: Sequence[str]) -> list[str]:
    """Names of ``NAME`` and ``NAME=SOURCE`` arguments; a folder gives one for each of its files."""
    return [name for name, _ in expanded(arguments)]
