"""Self-contained report pages: one file, no outside assets, light and dark, phone and paper.

Figures are drawn with placeholder colours, one for each role. `to_svg` turns them into CSS
variables, so one drawing is right on a light page, on a dark one and in print. Nothing here touches
pyplot or its global state; matplotlib is imported when the first figure is made, because it is slow
to load.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from assay.errors import visible
from assay.files.storage import write_atomic
from assay.pages.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK = "#a55a10"
MUTED = "#a55a11"
RULE = "#a55a12"
PAPER = "#a55a13"
"""Colours of text, of lesser text, of lines and of the paper; a page has those of its style sheet
in their place.
"""
SERIES = ("#a55a01", "#a55a02", "#a55a03", "#a55a04", "#a55a05")
"""Colours of data, in the order to use them; readable on light and dark, distinct to the
colour-blind.
"""

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
} | {colour: f"var(--c{index})" for index, colour in enumerate(SERIES, 1)}


_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def figure(width: float = 6.8, height: float = 3.2) -> "tuple[Figure, Axes]":
    """Return an empty figure of the given size in inches, and its axes, in the style of the
    house.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    ax = fig.add_subplot(facecolor="none")
    style_axes(ax)
    return fig, ax


def style_axes(ax: "Axes") -> None:
    """Give axes the style of the house: thin muted rules, horizontal grid lines, no box."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(RULE)
    ax.tick_params(colors=MUTED, labelsize=9, length=3, width=0.8)
    ax.xaxis.label.set(color=MUTED, fontsize=9.5)
    ax.yaxis.label.set(color=MUTED, fontsize=9.5)
    ax.title.set(color=INK, fontsize=10.5)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)


def legend(ax: "Axes", **options: Any) -> None:
    """Add a legend without a box, in the ink of the page; options go to ``Axes.legend``."""
    ax.legend(frameon=False, labelcolor=INK, fontsize=9, **options)


def to_svg(fig: "Figure", *, prefix: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element for a page: deterministic, scalable, coloured by CSS
    variables.

    The prefix stands before every id, so that figures on one page do not collide; a screen reader
    says the description.
    """
    import matplotlib as mpl

    buffer = BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "assay"}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    label = escape(description, quote=True).replace("\\", r"\\")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg {_SPACES} viewBox="\1" role="img" aria-label="{label}">',
        svg,
        count=1,
        flags=re.DOTALL,
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 var(--sans)", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()


BadgeKind = Literal["pass", "fail", "undecided"]
"""Colour and mark of a badge."""
_NUMBER = re.compile(
    r"[−+-]?[\d.,]+(e[+-]?\d+)?(\s?[%×a-zA-Zµ/]{0,9})?(\s?±\s?[\d.,]+\s?[%a-zA-Z]{0,9})?"
)
_CODE = re.compile("`([^`]+)`")


@dataclass(frozen=True, slots=True)
class Badge:
    """A verdict in a table or paragraph: a word, such as ``honest``, with a mark and a colour."""

    text: str
    kind: BadgeKind


Cell = str | int | float | bool | None | Badge
"""Value of a cell of a table."""


class Report:
    """A report page, built from top to bottom; all text is escaped.

    The page holds no time and no random name: the same content gives the same bytes.

    Args:
        title: Heading of the page.
        subtitle: Sentence below it.
        command: Command that makes this report, shown in the footer.
        origin: Versions and machine that the footer names; by default those of `provenance`.
    """

    def __init__(
        self,
        title: str,
        subtitle: str = "",
        *,
        command: str = "",
        origin: Mapping[str, object] | None = None,
    ) -> None:
        self.title = title
        self.subtitle = subtitle
        self.command = command
        self._origin = origin
        self._parts: list[tuple[str, Any]] = []

    def section(self, heading: str) -> None:
        """Begin a section."""
        self._parts.append(("section", heading))

    def paragraph(self, *pieces: str | Badge) -> None:
        """Add a paragraph of text and badges. Words between backticks are set as code, here and in
        tables.
        """
        self._parts.append(("paragraph", pieces))

    def definitions(self, items: Mapping[str, Cell]) -> None:
        """Add names with their values, one per row."""
        self._parts.append(("definitions", dict(items)))

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = ""
    ) -> None:
        """Add a table. Columns of numbers are set to the right; None is an empty cell."""
        columns = list(zip(headers, *rows, strict=True))
        numeric = [bool(rows) and all(map(_is_number, cells)) for _, *cells in columns]
        part = {
            "headers": headers,
            "rows": [list(row) for row in rows],
            "numeric": numeric,
            "caption": caption,
        }
        self._parts.append(("table", part))

    def figure(self, fig: "Figure", caption: str) -> None:
        """Add a figure drawn with the helpers of this package, with its caption."""
        svg = to_svg(fig, prefix=f"f{len(self._parts)}", description=caption)
        self._parts.append(("figure", {"svg": Markup(svg), "caption": caption}))

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """Fold what is added inside the ``with`` block under a summary."""
        self._parts.append(("details", summary))
        yield
        self._parts.append(("end of details", None))

    def render(self) -> str:
        """Return the whole page."""
        origin = {
            "command": self.command,
            **(provenance() if self._origin is None else self._origin),
        }
        return _TEMPLATES.get_template("report.html").render(
            report=self, parts=self._parts, origin=origin
        )

    def write(self, path: str | Path) -> None:
        """Write the page, complete or not at all."""
        write_atomic(path, self.render())


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return bool(_NUMBER.fullmatch(cell))
    return cell is None or (
        isinstance(cell, int | float | np.number) and not isinstance(cell, bool)
    )


def _inline(value: str | float | bool | None) -> str:
    """Return a value as text of a page, with words between backticks as code."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return Markup(_CODE.sub(r"<code>\1</code>", escape(str(value))))


_TEMPLATES = Environment(
    loader=PackageLoader("assay.pages", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    finalize=lambda value: (
        type(value)(visible(value, len(value))) if isinstance(value, str) else value
    ),
)
_TEMPLATES.filters["inline"] = _inline
