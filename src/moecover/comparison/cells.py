"""The cells of a comparison: expands the configuration of one model into all its rows, each with its coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NotRequired, TypedDict

from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology, Width
from moecover.comparison.budgets import budgets
from moecover.comparison.config import UNMERGED, UNREPAIRED, ModelEntry, corpora_of
from moecover.comparison.reading import BUDGETS, Request
from moecover.comparison.variants import Variant, slug, variants
from moecover.corpora.sources import set_folder, set_name
from moecover.errors import InputError
from moecover.planning.shapes import Shape, shape_name

FULL = "full"  # the method of the cell that removes nothing
FILE = "file"  # the method of a cell that is another file of the model, as it is
NO_FILES: Mapping[str, Structure] = MappingProxyType({})
Sample = tuple[tuple[str, ...], int]  # a calibration sample: names of its corpora, and its seed


class CellRecord(TypedDict):
    """The coordinates of a cell, as cell.json has them.

    ``width`` is missing where experts are whole, ``top_k`` where a token goes to as many as in the model, ``skip``
    where it skips none of these, ``merge`` where none are merged.
    """

    id: str
    model: str
    method: str
    saliency: str | None
    options: dict[str, object]
    calibration: list[str]
    sample: int
    retain: float
    keep: int
    width: NotRequired[int]
    top_k: NotRequired[int]
    skip: NotRequired[bool]
    seed: int | None
    merge: NotRequired[str]
    repair: str
    label: str


@dataclass(frozen=True)
class Cell:
    """One row of a comparison, by its coordinates.

    Attributes:
        model: name of the model.
        variant: how experts are chosen; None for the full model and for a file.
        calibration: names of the corpora; empty for a cell that depends on none (the full model, random plans).
        sample: seed of the calibration sample; 0 if there is none.
        retain: share of the experts' bytes that is kept; of whole experts their fraction, as asked for.
        keep: experts kept per layer.
        seed: of the plan; None for a deterministic method.
        width: channels kept of each of them; None for all.
        file: name of the further file that it is; empty for the model and its plans.
    """

    model: str
    variant: Variant | None
    calibration: tuple[str, ...]
    sample: int
    retain: float
    keep: int
    seed: int | None
    width: int | None = None
    file: str = ""

    @property
    def label(self) -> str:
        """What a reader calls it: a file's name, or the variant's label, with the shape where experts are thinner."""
        if self.variant is None:
            return self.file or "full model"
        return self.variant.label + ("" if self.width is None else f", {shape_name(self.keep, self.width)}")

    @property
    def repair(self) -> str:
        return self.variant.repair if self.variant else UNREPAIRED

    @property
    def merge(self) -> str:
        return self.variant.merge if self.variant else UNMERGED

    @property
    def repaired(self) -> bool:
        """Whether the experts that stay are refitted, or others merged into them."""
        return self.repair != UNREPAIRED or self.merge != UNMERGED

    @property
    def skips(self) -> bool:
        """Whether tokens skip experts by a rule."""
        return self.variant is not None and self.variant.skip

    @property
    def fitted(self) -> bool:
        """Whether more than the plan is made on calibration text: merge, repair, or the rule by which tokens skip."""
        return self.repaired or self.skips

    @property
    def calibrated_on(self) -> Sample:
        """The calibration sample, without corpora for a cell that needs none."""
        return self.calibration, self.sample

    @property
    def id(self) -> str:
        """Name of the cell's folder: the same in every grid that has the cell."""
        if self.variant is None:
            return f"{self.model}-{FILE}-{self.file}" if self.file else f"{self.model}-{FULL}"
        text = f"-{set_folder(self.calibration)}-{self.sample}" if self.calibration else ""
        seed = f"-seed{self.seed}" if self.seed is not None else ""
        return f"{self.model}-{slug(self.variant.label)}{text}-keep{shape_name(self.keep, self.width)}{seed}"

    @property
    def words(self) -> str:
        """The cell in a line of log."""
        if self.variant is None:
            return f"{self.model}, {f'file {self.file}' if self.file else 'full model'}"
        parts = [self.model, self.variant.label, str(Shape(self.keep, self.width))]
        parts += [set_name(self.calibration)] if self.calibration else []
        parts += [f"sample {self.sample}"] if self.sample else []
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(parts)

    def to_json(self) -> CellRecord:
        """The coordinates as cell.json has them."""
        variant = self.variant
        found: CellRecord = {
            "id": self.id,
            "model": self.model,
            "method": variant.method if variant else FILE if self.file else FULL,
            "saliency": variant.saliency if variant else None,
            "options": variant.options if variant else {},
            "calibration": list(self.calibration),
            "sample": self.sample,
            "retain": self.retain,
            "keep": self.keep,
            "seed": self.seed,
            "repair": self.repair,
            "label": self.label,
        }
        if self.width is not None:
            found["width"] = self.width
        if variant is not None and variant.top_k is not None:
            found["top_k"] = variant.top_k
        if self.skips:
            found["skip"] = True
        if self.merge != UNMERGED:
            found["merge"] = self.merge
        return found


def cells(
    request: Request,
    model: ModelEntry,
    topology: Topology,
    width: Width | str = "its channels are not known",
    files: Mapping[str, Structure] = NO_FILES,
) -> list[Cell]:
    """The cells of a model in the order of its tables.

    The full model comes first, then its files; the others are ordered by budget, method, calibration set, sample and
    seed. Which channels stay is chosen on calibration text, whatever the method.

    Args:
        request: the comparison.
        model: its entry.
        topology: of the model.
        width: the channels of its experts, or why their number cannot be changed.
        files: further files of it by name.

    Raises:
        InputError: as `variants` and `budgets`.
    """
    config, found = request.config, [Cell(model.name, None, (), 0, 1.0, topology.num_experts, None)]
    found += [_of_file(model.name, name, file, topology, width) for name, file in files.items()]
    sets = [tuple(corpora_of(corpora)) for corpora in config.calibration]
    try:
        sizes = budgets(config, topology, model.name, width)
    except InputError as error:
        raise request.error(error, next(name for name in BUDGETS if getattr(config, name))) from error
    for budget, variant in itertools.product(sizes, variants(request)):
        keep, thin = budget.shape.keep, budget.shape.width
        blind = variant.blind and thin is None
        samples: list[Sample] = [((), 0)] if blind else list(itertools.product(sets, config.samples))
        for (calibration, sample), seed in itertools.product(samples, variant.seeds or (None,)):
            found.append(Cell(model.name, variant, calibration, sample, budget.retain, keep, seed, thin))
    return found


def _of_file(model: str, name: str, file: Structure, topology: Topology, width: Width | str) -> Cell:
    """The cell of a file; what it keeps is a share of the model's routed parameters, whatever they are stored as."""
    share = file.topology.num_experts / topology.num_experts
    if not isinstance(width, str) and not isinstance(file.width, str):
        share *= file.width.channels / width.channels
    return Cell(model, None, (), 0, round(share, 4), file.topology.num_experts, None, file=name)
