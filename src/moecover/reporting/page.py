"""The page of a run: reads a run folder of `compare`, writes one HTML file that needs nothing else, and its pictures beside.

Everything that comes from files is escaped by the template; a security policy in the page forbids every address and every
script and style sheet but the page's own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError
from moecover.files.atomic import new_folder, write_text
from moecover.planning.artifact import Plan
from moecover.profiling.artifact import FILE as PROFILE
from moecover.profiling.artifact import Profile
from moecover.reporting.data import ModelFindings, Usage, findings, read_run, read_usage, usage_of
from moecover.reporting.figures.style import DPI, STYLE, short
from moecover.reporting.svg import Styles, data_address, inlined, png_bytes, source_hash, svg_bytes
from moecover.reporting.tables import (
    Table,
    agreement_table,
    cells_in_words,
    coordinates_in_words,
    failed_table,
    memory_words,
    model_tables,
    plain,
    provenance_of,
    share_text,
    summary_of,
    usage_table,
    usage_words,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER_ENDING = "_files"
PICTURE_KINDS = (".png", ".svg")


@dataclass(frozen=True)
class Picture:
    """A picture on the page: its markup, and its words."""

    name: str
    markup: str
    label: str
    caption: str
    kind: str  # wide: may need to be scrolled on a phone; paper: that, and always on white


@dataclass
class Album:
    """The pictures of a page: markup for the page, bytes for the files."""

    styles: Styles = field(default_factory=Styles)
    files: dict[str, bytes] = field(default_factory=dict)

    def add(
        self, name: str, figure: Figure | None, label: str, caption: str, *, raster: bool = False, wide: bool = False
    ) -> list[Picture]:
        """Take a figure; nothing where there is none. ``raster``: the page holds it as pixels; ``wide``: not made for phones."""
        from markupsafe import Markup

        if figure is None:
            return []
        figure.draw_without_rendering()  # arranges the parts, once for all files
        figure.set_layout_engine("none")
        png = png_bytes(figure)
        self.files[f"{name}.png"], self.files[f"{name}.svg"] = png, svg_bytes(figure, for_page=False)
        if raster:
            width, height = (round(v * DPI) for v in figure.get_size_inches())
            tag = '<img class="heat" src="{}" alt="{}" width="{}" height="{}">'
            markup = Markup(tag).format(data_address(png, "image/png"), label, width, height)
        else:
            markup = Markup(inlined(svg_bytes(figure, for_page=True), prefix=name, label=label, styles=self.styles))
        return [Picture(name, markup, label, caption, "paper" if raster else "wide" if wide else "")]


def file_name(*parts: Any) -> str:
    """A name for files and ids: letters, digits and hyphens."""
    plain = [re.sub(r"[^a-z0-9]+", "-", str(part).lower()).strip("-") for part in parts]
    return "-".join(p[:40] for p in plain if p)


# ----------------------------------------------------------------------------------------------------- which experts stay
def _profiles(folder: Path) -> dict[str, Profile]:
    """The profiles of a run by fingerprint; those that cannot be read are left out, their plans are shown without."""
    found = {}
    for path in sorted((folder / "profiles").rglob(PROFILE)):
        with contextlib.suppress(InputError):
            profile = Profile.load(path.parent)
            found[profile.fingerprint] = profile
    return found


def _explained(
    folder: Path, model: ModelFindings, profiles: Mapping[str, Profile]
) -> tuple[list[tuple[float, Any]], list[str]]:
    """Budget and facts of every shown plan, and in words why others are not shown."""
    from moecover.planning.explaining.facts import explain

    found, missing = [], []
    for cell in model.plans:
        try:
            plan = Plan.load(folder / str(cell.plan))
            profile = profiles.get(plan.profile_fingerprint or "")
            facts = explain(plan, profile=None if _holds_utilities(plan) else profile)
            found.append((cell.retain, facts))
        except InputError as error:
            missing.append(f"{share_text(cell.retain)}: {error}")
    return found, missing


def _holds_utilities(plan: Plan) -> bool:
    return all(row.saliency and "pooled" not in row.saliency for row in plan.layers)


def _corpora(profiles: Mapping[str, Profile]) -> dict[str, Mapping[str, Any]]:
    """The records of the calibration corpora by name; the sample is counted where a corpus has several."""
    records: dict[str, Mapping[str, Any]] = {}
    for profile in profiles.values():
        for corpus, samples in profile.corpora.items():
            for record in samples:
                if record not in records.values():
                    again = sum(name == corpus or name.startswith(f"{corpus}, sample ") for name in records)
                    records[f"{corpus}, sample {again + 1}" if again else corpus] = record
    return records


# -------------------------------------------------------------------------------------------------------------- the page
@dataclass(frozen=True)
class Chapter:
    """What the page says about one model."""

    anchor: str
    model: ModelFindings
    summary: Any
    tables: dict[str, Table]
    lead: list[Picture]  # of accuracy, else of the first text's perplexity
    perplexity: list[Picture]
    experts: list[Picture]
    overlap: list[Picture]
    mechanism: list[Picture]
    missing: list[str]
    memory: str
    use: str


def _chapter(number: int, model: ModelFindings, folder: Path, profiles: Mapping[str, Profile], usage: Usage, album: Album) -> Chapter:  # fmt: skip
    from moecover.reporting.figures.by_budget import (
        accuracy_picture,
        correlation_picture,
        kept_weight_picture,
        perplexity_picture,
        usage_by_layer_picture,
    )
    from moecover.reporting.figures.heatmap import utility_picture
    from moecover.reporting.figures.plan_figures import overlap_picture

    tables = model_tables(model)
    explained, missing = _explained(folder, model, profiles)
    if (table := agreement_table(model, explained)) is not None:
        tables["overlap"] = table
    if (table := usage_table(model, usage)) is not None:
        tables["usage"] = table
    name, place = model.name, file_name(f"m{number}", model.name)
    bars = "Bars: one standard error up and down; small dots: single runs."
    accuracy = album.add(
        f"accuracy-{place}", accuracy_picture(model), f"Mean accuracy of {name} against the share of experts kept, a line a method; the numbers are in the table of tasks",
        f"{bars} All methods answer the same questions, so their differences are surer than bars that overlap suggest: the comparisons below are of pairs.",
    )  # fmt: skip
    perplexity = [
        picture
        for i, text in enumerate(model.texts)
        for picture in album.add(
            file_name("perplexity", place, i, text), perplexity_picture(model, text),
            f"Perplexity of {name} on {text} against the share of experts kept, a line a method; the numbers are in the table of perplexities", bars,
        )
    ]  # fmt: skip
    experts = [
        picture
        for retain, facts in explained
        for picture in album.add(
            file_name("utility", place, share_text(retain)), utility_picture(facts),
            f"Heat map of {name}: share of the layer's utility by layer and expert, a panel a corpus; the {facts['keep']} experts that {short(facts['method'])} keeps of {facts['experts']} are outlined",
            f"{share_text(retain)} of the experts", raster=True,
        )
    ]  # fmt: skip
    several = [facts for _, facts in explained if len(facts["corpora"]) > 1]
    middle = several[len(several) // 2] if several else None
    overlap = album.add(
        f"overlap-{place}", overlap_picture(middle) if middle else None,
        f"How far the calibration corpora agree on the best experts of {name}, by decoder layer; the means are in the table of overlaps",
        "", wide=True,
    )  # fmt: skip
    mechanism = [
        *album.add(f"correlation-{place}", correlation_picture(model, usage), f"Rank correlation between the experts' utility on each corpus and their use by each task, {name}", "1: the same order of experts; 0: unrelated."),
        *album.add(f"shared-{place}", usage_by_layer_picture(model, usage), f"Overlap between each corpus's best experts and those that the tasks use most, by decoder layer of {name}", f"Line: mean of the tasks; band: least to greatest task{'; dashed: expected of random choice' if usage.keep and usage.experts else ''}."),
        *album.add(f"kept-weight-{place}", kept_weight_picture(model, usage), f"Share of the tasks' routing weight that goes to kept experts against the share of experts kept, a line a method, {name}; the numbers are in the table of kept routing weight", "The higher, the less the tasks' own routing is disturbed."),
    ]  # fmt: skip
    if (layers := _kept_by_layer(model, usage)) is not None:
        mechanism += album.add(f"kept-by-layer-{place}", layers, f"The same by task and decoder layer of {name} at one budget, a panel a task; the means over layers are in the table of kept routing weight", "Band: least to greatest run.", wide=True)  # fmt: skip
    lead, rest = (accuracy, perplexity) if accuracy else (perplexity[:1], perplexity[1:])
    return Chapter(
        place,
        model,
        summary_of(model),
        tables,
        lead,
        rest,
        experts,
        overlap,
        mechanism,
        missing,
        memory_words(model),
        usage_words(usage),
    )


def _kept_by_layer(model: ModelFindings, usage: Usage) -> Figure | None:
    """What every method kept of the tasks' routing, layer by layer, at the middle budget."""
    from moecover.reporting.figures.kept_weight import kept_by_layer_picture

    budgets = sorted({p.retain for s in model.series for p in s.points})
    if not budgets or not usage.plans or usage.experts is None:
        return None
    points = {s.name: p for s in model.series for p in s.points if p.retain == budgets[len(budgets) // 2]}
    methods = {name: cells for name, p in points.items() if (cells := [c for c in p.cells if c in usage.plans])}
    keep = next((p.keep for name, p in points.items() if name in methods), None)
    if keep is None:
        return None
    tasks = list(usage.plans[next(iter(methods.values()))[0]])
    return kept_by_layer_picture({**usage.model_dump(), "tasks": tasks}, methods, keep)


def _asset(name: str) -> str:
    return (resources.files("moecover") / "assets" / "report" / name).read_text(encoding="utf-8")


def rendered(folder: Path) -> tuple[str, dict[str, bytes]]:
    """The page of a run, and its pictures by file name.

    Raises:
        InputError: the folder is no run, or its files are damaged.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from matplotlib import style

    run = read_run(folder)
    usages = read_usage(folder)
    models, profiles, album = findings(run), _profiles(folder), Album()
    with style.context(STYLE, after_reset=True):
        chapters = [
            _chapter(i, model, folder, profiles, usage_of(model, usages), album) for i, model in enumerate(models, 1)
        ]
    css, script = f"{_asset('page.css')}\n{album.styles.css()}\n", _asset("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("page.html")).render(
        css=Markup(css), script=Markup(script), css_hash=Markup(source_hash(css)), script_hash=Markup(source_hash(script)),
        chapters=chapters, run=run, made_by=plain(run.created_by), grid=coordinates_in_words(run.cells), cells=cells_in_words(run),
        failed=failed_table(run), provenance=provenance_of(run, models, _corpora(profiles)),
    )  # fmt: skip
    return page, album.files


# ------------------------------------------------------------------------------------------------------------- the files
def check_outputs(page: Path, pictures: Path, *, overwrite: bool) -> None:
    """Refuse outputs that are there, and folders that hold anything but pictures whatever is allowed.

    Raises:
        InputError: they exist and may not be overwritten, or are not of the kind that is to be written.
    """
    if page.is_dir():
        raise InputError(f"{page} is a folder, the page is to be written there. Give a file name")
    if pictures.exists() and not pictures.is_dir():
        raise InputError(f"{pictures} is a file, a folder for pictures is to be written there. Give another --figures")
    for path in (page, pictures):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists. Choose another output, or give --overwrite")
    if pictures.is_dir() and (other := next((p for p in pictures.iterdir() if p.suffix not in PICTURE_KINDS), None)):
        raise InputError(f"{pictures} holds {other.name}, which is no picture, so it is not overwritten. Give another --figures")  # fmt: skip


def report(folder: str | Path, page: str | Path, *, figures: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write the page of a run and its pictures; each appears only when complete.

    Args:
        folder: of `compare`.
        page: the HTML file to write.
        figures: folder for the pictures as PNG and SVG; default the page's name with ``_files``.
        overwrite: replace what is there.

    Returns:
        ``page``, ``bytes``, ``figures`` (the folder), ``pictures`` (paths).

    Raises:
        InputError: the folder is no run, or an output is there already.
        MoecoverError: the disk is full or a folder cannot be written.
    """
    folder, page = Path(folder), Path(page)
    pictures = Path(figures) if figures is not None else page.with_name(f"{page.stem}{FOLDER_ENDING}")
    check_outputs(page, pictures, overwrite=overwrite)
    text, files = rendered(folder)
    with new_folder(pictures) as beside:
        for name, content in files.items():
            (beside / name).write_bytes(content)
    write_text(page, text)
    paths = [str(pictures / name) for name in files]
    return {"page": str(page), "bytes": len(text.encode()), "figures": str(pictures), "pictures": paths}
