"""What the sections of the page draw from: the run as it was read, and a model's results with the facts of its plans.

Reads the results, plans and profiles of a run folder. Plans and profiles that cannot be read are left out; the page
says why a plan is not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.explaining.facts import explain
from moecover.profiling.artifact import FILE as PROFILE
from moecover.profiling.artifact import Profile
from moecover.reporting.album import Album, file_name
from moecover.reporting.blocks import Picture
from moecover.reporting.data import Run, Usage, read_run, read_usage
from moecover.reporting.figures.style import Facts
from moecover.reporting.findings import ModelFindings, findings, usage_of
from moecover.reporting.numbers import percentage

BARS = "Bars: plus and minus one standard error; small dots: single runs."

LOSSES = {"mean": "geometric mean over the texts", "worst": "on the text where it loses most"}


@dataclass
class RunData:
    """A run as its files hold it, and the figures that were drawn so far.

    Attributes:
        folder: of `compare`.
        run: contents of results.json.
        models: results by model, in the order of the run.
        usages: entries of usage.json.
        profiles: of the run, by fingerprint.
        album: takes the figures of the page.
    """

    folder: Path
    run: Run
    models: Sequence[ModelFindings]
    usages: Sequence[Usage]
    profiles: Mapping[str, Profile]
    album: Album = field(default_factory=Album)


@dataclass
class ModelData:
    """One model of a run.

    Attributes:
        of: the run.
        model: its results.
        anchor: id of its part of the page, in the names of its figures and the ids of its tables.
        usage: its entry of usage.json; empty where there is none.
        explained: budget (proportion of experts kept) and facts of `explain`, for every plan that is shown.
        missing: in words, why other plans are not shown.
    """

    of: RunData
    model: ModelFindings
    anchor: str
    usage: Usage
    explained: Sequence[tuple[float, Facts]]
    missing: Sequence[str]

    @property
    def album(self) -> Album:
        """Takes the figures of the page."""
        return self.of.album

    @cached_property
    def loss(self) -> list[Picture]:
        """The figures of what is lost by size: in the mean over the texts, and on the worst; empty below two sizes."""
        from moecover.reporting.figures.loss_by_size import captioned, loss_pictures

        return [
            picture
            for which, figure in loss_pictures(self.model).items()
            for picture in self.album.add(
                f"loss-{which}-{self.anchor}",
                figure,
                f"What {self.model.name} loses by the size of its weights, {LOSSES[which]}: perplexity over "
                "the full model's, one line per method, repair and kind of shape; the numbers are in the table of "
                "perplexities",
                captioned(self.model),
            )
        ]

    @cached_property
    def first(self) -> list[Picture]:
        """The figures at the top: of loss by size, else of accuracy, else of the first text's perplexity."""
        return self.loss or self.accuracy or self.perplexity[:1]

    @cached_property
    def accuracy(self) -> list[Picture]:
        """The figure of mean accuracy by budget; an empty list without tasks."""
        from moecover.reporting.figures.by_budget import accuracy_picture

        return self.album.add(
            f"accuracy-{self.anchor}",
            accuracy_picture(self.model),
            f"Mean accuracy of {self.model.name} against the share of experts kept, one line per method; "
            "the numbers are in the table of tasks",
            f"{BARS} All methods answer the same questions, so overlapping bars understate how certain a difference "
            "is: the comparisons below are paired.",
        )

    @cached_property
    def perplexity(self) -> list[Picture]:
        """The figures of perplexity by budget, one per text."""
        from moecover.reporting.figures.by_budget import perplexity_picture

        return [
            picture
            for i, text in enumerate(self.model.texts)
            for picture in self.album.add(
                file_name("perplexity", self.anchor, i, text),
                perplexity_picture(self.model, text),
                f"Perplexity of {self.model.name} on {text} against the share of experts kept, one line per method; "
                "the numbers are in the table of perplexities",
                BARS,
            )
        ]


def run_data(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        InputError: the folder is not a run, or its result files are damaged.
    """
    run = read_run(folder)
    return RunData(folder, run, findings(run), read_usage(folder), _profiles(folder))


def model_data(of: RunData, number: int) -> ModelData:
    """The data of the model at an index of ``of.models``."""
    model = of.models[number]
    explained, missing = _explained(of, model)
    return ModelData(of, model, file_name(f"m{number + 1}", model.name), usage_of(model, of.usages), explained, missing)


def _profiles(folder: Path) -> dict[str, Profile]:
    found = {}
    for path in sorted((folder / "profiles").rglob(PROFILE)):
        with contextlib.suppress(InputError):  # the plans that were made from it are shown without it
            profile = Profile.load(path.parent)
            found[profile.fingerprint] = profile
    return found


def _explained(of: RunData, model: ModelFindings) -> tuple[list[tuple[float, Facts]], list[str]]:
    found: list[tuple[float, Facts]] = []
    missing: list[str] = []
    for cell in model.plans:
        try:
            plan = Plan.load(of.folder / str(cell.plan))
            profile = of.profiles.get(plan.profile_fingerprint or "")
            found.append((cell.retain, explain(plan, profile=None if plan.by_corpus else profile, change=None)))
        except InputError as error:
            missing.append(f"{percentage(cell.retain)}: {error}")
    return found, missing
