"""Figures inside a page: takes matplotlib figures, gives SVG elements for HTML that follow the page's colours.

Styles become CSS classes, so that the page's security policy can forbid inline styles. The colours of `figures.style`
become variables of the style sheet, which has values for light and dark mode. Ids get a prefix and are unique.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from moecover.reporting.figures.style import COLOURS, DPI, FAINT, GRID, REFERENCE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
VARIABLES = {
    REFERENCE.lower(): "var(--ink)",
    FAINT.lower(): "var(--faint)",
    GRID.lower(): "var(--line)",
    **{colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS)},
}
LEFT_OUT = ("metadata", "style")


class Styles:
    """The CSS classes of all figures of a page, in the order of first use."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def name(self, style: str) -> str:
        """The class for a style; the font is left to the page."""
        parts = [p.strip() for p in style.split(";") if p.strip() and not p.strip().startswith("font-family")]
        wanted = re.sub(r"#[0-9a-f]{6}", lambda m: VARIABLES.get(m[0], m[0]), ";".join(parts))
        return self.names.setdefault(wanted, f"s{len(self.names)}")

    def css(self) -> str:
        """The CSS rules of all classes."""
        return "\n".join(f".{name}{{{style}}}" for style, name in self.names.items())


def svg_bytes(figure: Figure, *, for_page: bool) -> bytes:
    """The figure as SVG: for the page with text as text on a transparent ground, for a file with text as outlines."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none" if for_page else "path"}):
        figure.savefig(buffer, format="svg", transparent=for_page, metadata={"Date": None})
    return buffer.getvalue()


def png_bytes(figure: Figure, *, least: int = 0) -> bytes:
    """The figure as PNG, ``least`` pixels wide or wider."""
    buffer, dpi = io.BytesIO(), max(DPI, math.ceil(least / figure.get_figwidth()))
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def inlined(svg: bytes, *, prefix: str, label: str, styles: Styles) -> str:
    """Turn an SVG file of matplotlib into an element for the page.

    Args:
        svg: of `svg_bytes`.
        prefix: put before every id; unique on the page.
        label: what the figure shows, for screen readers.
        styles: takes the styles of the figure.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(rb'(?:url\(|href=")#([\w-]+)', svg))
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.removeprefix(SVG).rpartition("}")[2] in LEFT_OUT]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        if element.tag not in ("text", "tspan"):
            element.text = None
        identity = element.attrib.pop("id", None)
        if identity is not None and identity.encode() in used:
            element.set("id", f"{prefix}-{identity}")
        if (target := element.attrib.pop(LINK, None)) is not None:
            element.set("href", f"#{prefix}-{target.removeprefix('#')}")
        for name, value in list(element.attrib.items()):
            if value.startswith("url(#"):
                element.set(name, f"url(#{prefix}-{value[5:]}")
        if (style := element.attrib.pop("style", None)) is not None and (named := styles.name(style)) is not None:
            element.set("class", named)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label, "class": "curve"})
    return ElementTree.tostring(root, encoding="unicode")


def data_address(content: bytes, kind: str) -> str:
    """A file's content as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def source_hash(text: str) -> str:
    """The source expression by which a content security policy allows a script or style sheet of exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
