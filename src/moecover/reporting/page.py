"""The page of a run: reads what `compare` or `shrink` made, writes one self-contained HTML file, and figures beside it.

Text from files is escaped by the template. A content security policy in the page forbids every address, and every
script and style sheet but the page's own.
"""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.comparison.results import Comparison
from moecover.errors import InputError, arg
from moecover.files.atomic import new_folder, write_text
from moecover.progress import Progress, resolve
from moecover.reporting.chapters import Chapter, Page, ShownSection
from moecover.reporting.context import model_data, run_data
from moecover.reporting.figures.style import STYLE
from moecover.reporting.sections import RUN_SECTIONS, SECTIONS, Sections
from moecover.reporting.sentences import cells_in_words, grid_in_words
from moecover.reporting.shrunk import is_shrunk, shrunk_page
from moecover.reporting.svg import source_hash
from moecover.text import Cell, Shown, size_text

if TYPE_CHECKING:
    from jinja2 import Template

    from moecover.reporting.sections import Data

FOLDER_ENDING = "_files"
PICTURE_KINDS = (".png", ".svg")


def _sections(sections: Sections[Data], data: Data) -> tuple[ShownSection, ...]:
    """The sections that have blocks."""
    made = ((section, section.function(data)) for section in sections)
    return tuple(ShownSection(section.name, section.title, blocks) for section, blocks in made if blocks)


def rendered(folder: Path) -> tuple[str, dict[str, bytes]]:
    """Draw the page of a run.

    Returns:
        The HTML text, and the bytes of the figures by file name.

    Raises:
        InputError: the folder is of neither, or its files are damaged.
    """
    from markupsafe import Markup
    from matplotlib import style

    with style.context(STYLE, after_reset=True):
        page = shrunk_page(folder) if is_shrunk(folder) else compared_page(folder)
    css, script = f"{_asset('page.css')}\n{page.album.styles.css()}\n", _asset("page.js")
    text = _template("page.html").render(
        page=page,
        css=Markup(css),
        css_hash=Markup(source_hash(css)),
        script=Markup(script),
        script_hash=Markup(source_hash(script)),
    )
    return text, page.album.files


def compared_page(folder: Path) -> Page:
    """The page of a run of `compare`, a chapter for every model.

    Raises:
        InputError: the folder is not a run, or its files are damaged.
    """
    data = run_data(folder)
    chapters = [
        Chapter(m.anchor, m.model.name, _sections(SECTIONS, m))
        for m in map(partial(model_data, data), range(len(data.models)))
    ]
    return Page(
        title="Which experts to keep",
        kicker="moecover · a comparison of expert pruning methods",
        about=" · ".join(chapter.name for chapter in chapters),
        facts=f"{grid_in_words(data.run.cells)} {cells_in_words(data.run)}.",
        chapters=chapters,
        run_sections=_sections(RUN_SECTIONS, data),
        album=data.album,
    )


def _asset(name: str) -> str:
    return (resources.files("moecover") / "assets" / "report" / name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


# ------------------------------------------------------------------------------------------------------------ the files
class Report(Shown, dict[str, Any]):
    """What `report` wrote: ``page``, its size in ``bytes``, ``figures`` (the folder) and ``pictures`` (their paths)."""

    def summary(self) -> str:
        """The page, its size, and the folder of the figures."""
        return f"{self['page']}: {size_text(self['bytes'])}, figures in {self['figures']}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """The files, one a row."""
        files = [("page", self["page"]), *(("figure", path) for path in self["pictures"])]
        return [{"kind": kind, "file": path} for kind, path in files]


def check_outputs(page: Path, pictures: Path, *, overwrite: bool) -> None:
    """Refuse outputs that exist, and in any case folders that hold anything but figures.

    Raises:
        InputError: an output exists and may not be overwritten, or is not of the kind that is to be written.
    """
    if page.is_dir():
        raise InputError(f"{page} is a folder, but the page is a file. Give a file name")
    if pictures.exists() and not pictures.is_dir():
        raise InputError(f"{pictures} is a file, but the figures need a folder. Choose another {arg('figures')}")
    for path in (page, pictures):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists. Choose another output, or give {arg('overwrite')}")
    if pictures.is_dir() and (other := next((p for p in pictures.iterdir() if p.suffix not in PICTURE_KINDS), None)):
        raise InputError(
            f"{pictures} holds {other.name}, which is not a figure, so the folder is not overwritten. "
            f"Choose another {arg('figures')}"
        )


def report(
    run: str | Path | Comparison,
    page: str | Path,
    *,
    figures: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> Report:
    """Write the page of a run and its figures; each appears only when complete.

    Args:
        run: what `compare` returned, or its run folder; or the folder of what `shrink` made on the way.
        page: HTML file to write.
        figures: folder for the figures as PNG and SVG; default: the page's name with ``_files`` in place of its suffix.
        overwrite: replace an existing page and figures.
        progress: True logs on stderr or in a notebook; False is silent.

    Returns:
        A dictionary with ``page``, ``bytes``, ``figures`` (the folder) and ``pictures`` (paths of the figures).

    Raises:
        InputError: the folder is neither, or an output exists.
        MoecoverError: the disk is full or a folder cannot be written.
    """
    folder, page = run.run if isinstance(run, Comparison) else Path(run), Path(page)
    pictures = Path(figures) if figures is not None else page.with_name(f"{page.stem}{FOLDER_ENDING}")
    check_outputs(page, pictures, overwrite=overwrite)
    with resolve(progress).spinner("drawing the page"):
        text, files = rendered(folder)
    with new_folder(pictures) as beside:
        for name, content in files.items():
            (beside / name).write_bytes(content)
    write_text(page, text)
    paths = [str(pictures / name) for name in files]
    return Report(page=str(page), bytes=len(text.encode()), figures=str(pictures), pictures=paths)
