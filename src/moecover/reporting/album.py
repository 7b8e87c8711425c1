"""The figures of a page: takes matplotlib figures, gives markup for the page and the bytes of PNG and SVG files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moecover.reporting.blocks import Picture
from moecover.reporting.figures.style import DPI
from moecover.reporting.svg import Styles, data_address, inlined, png_bytes, svg_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS = 1200  # pixels that a PNG has at least, but for heat maps, whose cells are whole pixels


@dataclass
class Album:
    """The figures of a page; ``files`` are their bytes by file name, ``styles`` the CSS classes that they use."""

    styles: Styles = field(default_factory=Styles)
    files: dict[str, bytes] = field(default_factory=dict)

    def add(
        self,
        name: str,
        figure: Figure | None,
        label: str,
        caption: str = "",
        *,
        raster: bool = False,
        wide: bool = False,
    ) -> list[Picture]:
        """Add a figure.

        Args:
            name: of its files, and the prefix of its ids; unique on the page, see `file_name`.
            figure: of matplotlib; None where there is nothing to draw.
            label: what it shows, for screen readers.
            caption: the text below it.
            raster: the page holds it as pixels, not as SVG.
            wide: it is wider than a phone and scrolls sideways there.

        Returns:
            The figure as a list of one, or an empty list for None.
        """
        from markupsafe import Markup

        if figure is None:
            return []
        figure.draw_without_rendering()  # lays the parts out, once for all files
        figure.set_layout_engine(None)
        png = png_bytes(figure, least=0 if raster else PIXELS)
        self.files[f"{name}.png"], self.files[f"{name}.svg"] = png, svg_bytes(figure, for_page=False)
        if raster:
            width, height = (round(v * DPI) for v in figure.get_size_inches())
            tag = '<img class="heat" src="{}" alt="{}" width="{}" height="{}">'
            markup = Markup(tag).format(data_address(png, "image/png"), label, width, height)
        else:
            markup = Markup(inlined(svg_bytes(figure, for_page=True), prefix=name, label=label, styles=self.styles))
        return [Picture(name, markup, label, caption, "paper" if raster else "wide" if wide else "")]


def file_name(*parts: object) -> str:
    """A name for files and ids: lower-case letters, digits and hyphens."""
    plain = [re.sub(r"[^a-z0-9]+", "-", str(part).lower()).strip("-") for part in parts]
    return "-".join(p[:40] for p in plain if p)
