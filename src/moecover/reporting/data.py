"""The result files of a run of `compare`: reads and checks results.json and usage.json, gives them as objects.

Fields that this version does not use are ignored, so a run of a later minor version can be read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from moecover.comparison.config import UNMERGED, UNREPAIRED
from moecover.errors import InputError
from moecover.files.hashing import unsealed
from moecover.files.reading import read_json

RESULTS, USAGE, SCHEMA = "results.json", "usage.json", 1
Kind = TypeVar("Kind")


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ScoreRow(_Lenient):
    """One metric on one task: a proportion from 0 to 1, and its standard error over the questions."""

    value: float
    stderr: float | None = None


class TextRow(_Lenient):
    """Results on one perplexity text.

    ``kl`` is the mean KL divergence from the full model in nats per token, ``top1`` the proportion of tokens on which
    the most likely next token is the full model's.
    """

    perplexity: float = Field(gt=0)
    tokens: int | None = None
    windows: int | None = None
    kl: float | None = None
    top1: float | None = None


class RowPlan(_Lenient):
    """The plan of a row: ``width`` channels of every expert remain, None for all."""

    width: int | None = None


class Row(_Lenient):
    """The measurements of one variant of a model; ``keep`` experts remain in each MoE layer."""

    keep: int
    experts: int
    num_bytes: int
    plan: RowPlan | None = None
    perplexity: dict[str, TextRow] = Field(default_factory=dict)
    tasks: dict[str, dict[str, ScoreRow]] = Field(default_factory=dict)


class Cell(_Lenient):
    """One cell of the grid: its coordinates, how it ended, and its measurements if it finished."""

    id: str
    model: str
    method: str
    label: str
    retain: float
    status: Literal["done", "failed"]
    calibration: list[str] = Field(default_factory=list)
    sample: int | None = None
    seed: int | None = None
    merge: str = UNMERGED
    repair: str = UNREPAIRED
    keep: int | None = None
    width: int | None = None  # channels of thinner experts; the label then ends with the shape
    reason: str | None = None
    wall_s: float | None = None
    plan: str | None = None
    row: Row | None = None

    @property
    def variant(self) -> str:
        """The label without the shape of thinner experts."""
        return self.label if self.width is None else self.label.rpartition(", ")[0]

    @property
    def parts(self) -> tuple[str, str]:
        """The label without shape, merge and repair, and these two; "" for neither."""
        base, *changes = self.variant.rsplit(" + ", (self.merge != UNMERGED) + (self.repair != UNREPAIRED))
        return base, " + ".join(changes)


class Tested(_Lenient):
    """A secondary test of a comparison, over other units; not corrected for multiple comparisons."""

    p: float | None = None
    effect: float | None = None
    test: str = ""


class TaskDifference(_Lenient):
    """The difference on one task alone, with its 95 % interval; no verdict."""

    value: float
    low: float | None = None
    high: float | None = None


class Comparison(_Lenient):
    """The comparison of two methods on one measure at one budget, as `compare` tested it.

    ``value``, ``low`` and ``high`` are a difference of accuracies (proportions) where ``kind`` is ``tasks``, and of log
    perplexities (nats) otherwise.
    """

    model: str
    retain: float
    kind: str
    name: str
    calibration: list[str] = Field(default_factory=list)
    a: str
    b: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    effect: float | None = None
    n: int | None = None
    test: str = ""
    verdict: str
    words: str = ""
    family: str = ""  # of comparisons over which p_holm was corrected
    over_runs: Tested | None = None
    over_tasks: Tested | None = None
    by_task: dict[str, TaskDifference] = Field(default_factory=dict)
    sizes: list[int] = Field(default_factory=list)  # bytes of both, where a file is compared at about equal bytes

    @property
    def of_accuracy(self) -> bool:
        """Whether accuracies are compared, not perplexities."""
        return self.kind == "tasks"


class Loss(_Lenient):
    """What a method at a budget loses against the full model, with its 95 % interval, in the units of `Comparison`.

    ``names`` are the tasks or texts whose mean it is.
    """

    model: str
    label: str
    retain: float
    calibration: list[str] = Field(default_factory=list)
    kind: str
    names: list[str]
    value: float
    low: float | None = None
    high: float | None = None


class TaskAgreement(_Lenient):
    """How far utility on a corpus agrees with a task's use of the experts, by MoE layer; None where undefined."""

    jaccard: list[Annotated[float, Field(ge=0, le=1)] | None]
    spearman: list[Annotated[float, Field(ge=-1.001, le=1.001)] | None]


class KeptWeight(_Lenient):
    """Proportion of a task's routing weight that goes to kept experts, by MoE layer."""

    kept_weight: list[Annotated[float, Field(ge=0, le=1.001)]]


class Usage(_Lenient):
    """One model's entry in usage.json: agreement by corpus and task, kept routing weight by cell and task.

    The overlaps (Jaccard) are those of the best ``keep`` of ``experts``.
    """

    model: str
    keep: int | None = None
    experts: int | None = None
    tasks: list[str] = Field(default_factory=list)
    layers: list[int] = Field(default_factory=list)
    corpora: dict[str, dict[str, TaskAgreement]] = Field(default_factory=dict)
    plans: dict[str, dict[str, KeptWeight]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_value_a_layer(self) -> Usage:
        named = [*map(set[str], self.corpora.values()), *map(set[str], self.plans.values())]
        if any(not by_task or by_task != set(self.tasks) for by_task in named):
            raise ValueError("a corpus or plan does not have values for every task")
        if named and not (self.layers and self.experts and 0 < (self.keep or 0) <= self.experts):
            raise ValueError("`layers`, `experts` and `keep` do not go together")
        rows = [v for found in self.corpora.values() for t in found.values() for v in (t.jaccard, t.spearman)]
        rows += [list(t.kept_weight) for found in self.plans.values() for t in found.values()]
        if any(len(row) != len(self.layers) for row in rows):
            raise ValueError(f"a row does not have one value for each of the {len(self.layers)} layers")
        return self


class Cut(_Lenient):
    """How many items of a task are longer than a model's positions."""

    model: str
    task: str
    cut: int
    items: int


class Run(_Lenient):
    """The contents of results.json."""

    schema_version: Literal[1] = Field(alias="schema")
    created_by: JsonValue = None
    command: str | list[str] | None = None
    models: list[dict[str, JsonValue]] | dict[str, dict[str, JsonValue]]
    texts: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    tasks: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    cut: list[Cut] = Field(default_factory=list)
    cells: list[Cell]
    comparisons: list[Comparison] = Field(default_factory=list)
    losses: list[Loss] = Field(default_factory=list)


def _json(path: Path) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}. Run `moecover compare` again") from error


def _unsealed(value: object, path: Path) -> dict[str, object]:
    """A document without its hash, after comparing them; a run may also be put together by hand, without hashes."""
    try:
        return unsealed(value, required=False)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Run `moecover compare` again") from error


def read_run(folder: Path) -> Run:
    """Read results.json of a run folder.

    Raises:
        InputError: the folder is not a run, or its results.json is damaged or has another schema version.
    """
    path = folder / RESULTS
    if not path.is_file():
        found = "is a file" if folder.is_file() else f"contains no {RESULTS}" if folder.is_dir() else "does not exist"
        raise InputError(
            f"{folder} is not a run of `moecover compare`: it {found}. Give the folder that compare wrote, or the "
            "folder of work of `shrink` (OUT-work)"
        )
    value = _unsealed(_json(path), path)
    if value.get("schema") != SCHEMA:
        got = value.get("schema")
        raise InputError(f"{path} has schema {got}, but this version reads {SCHEMA}. Run `moecover compare` again")
    return _checked(Run, value, path)


def _checked(kind: type[Kind], value: object, path: Path) -> Kind:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is damaged: {where}: {first['msg']}. Run `moecover compare` again") from error


def read_usage(folder: Path) -> list[Usage]:
    """Read usage.json of a run folder, one entry per model; empty if the run did not measure expert usage.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / USAGE
    if not path.is_file():
        return []
    value = _json(path)
    return _checked(
        list[Usage], [_unsealed(one, path) for one in (value if isinstance(value, list) else [value])], path
    )
