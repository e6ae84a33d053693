"""Self-contained report pages: one HTML file, no assets from outside, light and dark."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from assay.errors import visible
from assay.files.storage import write_atomic
from assay.pages.figures import to_svg
from assay.pages.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BadgeKind = Literal["pass", "fail", "undecided"]
"""Colour and mark of a badge."""

# A number with its unit and its error, as cells have it: "−1.5 %", "3.2 ms ± 0.1".
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
        """Add a paragraph of text and badges; words between backticks become code."""
        self._parts.append(("paragraph", pieces))

    def definitions(self, items: Mapping[str, Cell]) -> None:
        """Add names with their values, one per row."""
        self._parts.append(("definitions", dict(items)))

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = ""
    ) -> None:
        """Add a table; columns of numbers are set to the right, and None is an empty cell.

        Words between backticks become code.
        """
        columns = zip(headers, *rows, strict=True)
        part = {
            "headers": headers,
            "rows": [list(row) for row in rows],
            "numeric": [bool(rows) and all(map(_is_number, cells)) for _, *cells in columns],
            "caption": caption,
        }
        self._parts.append(("table", part))

    def figure(self, fig: "Figure", caption: str) -> None:
        """Add a figure of :func:`assay.pages.figures.figure`, with its caption."""
        svg = Markup(to_svg(fig, prefix=f"f{len(self._parts)}", description=caption))
        self._parts.append(("figure", {"svg": svg, "caption": caption}))

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """Fold what is added inside the ``with`` block under a summary."""
        self._parts.append(("details", summary))
        yield
        self._parts.append(("end of details", None))

    def render(self) -> str:
        """Return the whole page."""
        origin = provenance() if self._origin is None else self._origin
        return _template().render(
            report=self, parts=self._parts, origin={"command": self.command, **origin}
        )

    def write(self, path: str | Path) -> None:
        """Write the page, complete or not at all."""
        write_atomic(path, self.render())


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return bool(_NUMBER.fullmatch(cell))
    if isinstance(cell, bool):
        return False
    return cell is None or isinstance(cell, int | float | np.number)


def _inline(value: str | float | bool | None) -> str:
    """Return a value as HTML, with words between backticks as code."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return Markup(_CODE.sub(r"<code>\1</code>", escape(str(value))))


def _printable(value: object) -> object:
    """Return a value with control characters of text written out, which no page may have."""
    if isinstance(value, str):
        return type(value)(visible(value, len(value)))
    return value


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("assay.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_printable,
    )
    environment.filters["inline"] = _inline
    return environment.get_template("report.html")
