"""The cells of a comparison: expands the configuration of one model into all its rows, each with its coordinates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypedDict

from moecover.checkpoints.topology import Topology
from moecover.comparison.config import UNREPAIRED, Config, ModelEntry, corpora_of
from moecover.comparison.reading import Request
from moecover.comparison.variants import Variant, slug, variants
from moecover.corpora.sources import set_folder, set_name
from moecover.errors import InputError
from moecover.planning.keep import resolve_keep

FULL = "full"  # the method of the cell that removes nothing
Sample = tuple[tuple[str, ...], int]  # a calibration sample: names of its corpora, and its seed


class CellRecord(TypedDict):
    """The coordinates of a cell, as cell.json has them."""

    id: str
    model: str
    method: str
    saliency: str | None
    options: dict[str, object]
    calibration: list[str]
    sample: int
    retain: float
    keep: int
    seed: int | None
    repair: str
    label: str


@dataclass(frozen=True)
class Cell:
    """One row of a comparison, by its coordinates.

    Attributes:
        model: name of the model.
        variant: how experts are chosen; None for the full model.
        calibration: names of the corpora; empty for a cell that depends on none (the full model, random plans).
        sample: seed of the calibration sample; 0 if there is none.
        retain: fraction of the experts that is kept, as asked for.
        keep: experts kept per layer.
        seed: of the plan; None for a deterministic method.
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
    def repaired(self) -> bool:
        """Whether the experts that stay are refitted."""
        return self.repair != UNREPAIRED

    @property
    def calibrated_on(self) -> Sample:
        """The calibration sample, without corpora for a cell that needs none."""
        return self.calibration, self.sample

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
        parts = [self.model, self.label, f"{self.keep} experts"]
        parts += [set_name(self.calibration)] if self.calibration else []
        parts += [f"sample {self.sample}"] if self.sample else []
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(parts)

    def to_json(self) -> CellRecord:
        """The coordinates as cell.json has them."""
        variant = self.variant
        return {
            "id": self.id,
            "model": self.model,
            "method": variant.method if variant else FULL,
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


def budgets(config: Config, topology: Topology, name: str) -> list[tuple[float, int]]:
    """Fraction and number of kept experts of every budget for a model.

    Args:
        config: the comparison.
        topology: of the model.
        name: of the model, for errors.

    Raises:
        InputError: the router does not allow a budget, or two budgets keep the same number.
    """
    found: list[tuple[float, int]] = []
    for retain, keep in [(r, None) for r in config.retain or ()] + [(None, k) for k in config.keep or ()]:
        try:
            count = resolve_keep(topology, keep=keep, retain=retain)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        found.append((retain if retain is not None else round(count / topology.num_experts, 4), count))
    keeps = [count for _, count in found]
    if len(set(keeps)) < len(keeps):
        raise InputError(f"{name}: the budgets keep {', '.join(map(str, keeps))} experts: give every one once")
    return found


def cells(request: Request, model: ModelEntry, topology: Topology) -> list[Cell]:
    """The cells of a model in the order of its tables.

    The full model comes first; the others are ordered by budget, method, calibration set, sample and seed.

    Raises:
        InputError: as `variants` and `budgets`.
    """
    config, found = request.config, [Cell(model.name, None, (), 0, 1.0, topology.num_experts, None)]
    sets = [tuple(corpora_of(corpora)) for corpora in config.calibration]
    try:
        sizes = budgets(config, topology, model.name)
    except InputError as error:
        raise request.error(error, "retain" if config.retain else "keep") from error
    for (retain, keep), variant in itertools.product(sizes, variants(request)):
        samples: list[Sample] = [((), 0)] if variant.blind else list(itertools.product(sets, config.samples))
        for (calibration, sample), seed in itertools.product(samples, variant.seeds or (None,)):
            found.append(Cell(model.name, variant, calibration, sample, retain, keep, seed))
    return found
