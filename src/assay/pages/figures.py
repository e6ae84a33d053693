"""Figures of pages: light and dark, phone and paper, without assets from outside.

Figures are drawn with placeholder colours, one for each role. `to_svg` turns them into CSS
variables, so one drawing is right on a light page, on a dark one and in print. Nothing here touches
pyplot or its global state; matplotlib is imported when the first figure is made, because it is slow
to load.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#a55a10"
MUTED = "#a55a11"
RULE = "#a55a12"
PAPER = "#a55a13"
"""Placeholders of the colours of text, lesser text, lines and paper in the style sheet."""

SERIES = ("#a55a01", "#a55a02", "#a55a03", "#a55a04", "#a55a05")
"""Placeholders of the colours of data, in the order to use them.

They are readable on light and dark, and distinct to the colour-blind.
"""

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
} | {colour: f"var(--c{index})" for index, colour in enumerate(SERIES, 1)}

_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


@contextmanager
def _style() -> Iterator[None]:
    """Let matplotlib draw by its own defaults: a user's may ask for LaTeX, which is not there."""
    from matplotlib import style

    # Text stays text, and ids and bytes are the same in every run.
    with style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "assay"}]):
        yield


@_style()
def figure(width: float = 6.8, height: float = 3.2) -> "tuple[Figure, Axes]":
    """Return an empty figure in the style of the pages, and its axes; sizes are in inches."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    ax = fig.add_subplot(facecolor="none")
    # Thin muted rules, horizontal grid lines, no box.
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(RULE)
    ax.tick_params(colors=MUTED, labelsize=9, length=3, width=0.8)
    ax.xaxis.label.set(color=MUTED, fontsize=9.5)
    ax.yaxis.label.set(color=MUTED, fontsize=9.5)
    ax.title.set(color=INK, fontsize=10.5)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    return fig, ax


@_style()
def legend(ax: "Axes", **options: Any) -> None:
    """Add a legend without a box, in the ink of the page; options go to ``Axes.legend``."""
    ax.legend(frameon=False, labelcolor=INK, fontsize=9, **options)


@_style()
def to_svg(fig: "Figure", *, prefix: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element: deterministic, scalable, coloured by CSS variables.

    Args:
        fig: Figure with the placeholder colours.
        prefix: Text before every id, so that ids of figures on one page do not collide.
        description: Text for a screen reader.
    """
    buffer = BytesIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    # Without the XML declaration, which a page has not.
    svg = svg[svg.index("<svg") :]
    label = escape(description, quote=True).replace("\\", r"\\")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    width = f"--width: {fig.get_figwidth():g}in"  # for the style sheet: how far it is scaled
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg {_NAMESPACES} viewBox="\1" style="{width}" role="img" aria-label="{label}">',
        svg,
        count=1,
        flags=re.DOTALL,
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 var(--sans)", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()
