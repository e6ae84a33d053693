"""Self-contained report pages: one file, no outside assets, light and dark, phone and paper."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from assay.errors import UsageError
from assay.files.storage import write_atomic
from assay.pages.figures import to_svg
from assay.pages.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


BadgeKind = Literal["pass", "fail", "undecided"]
"""Colour and mark of a badge."""
_MARKS: Mapping[str, str] = {"pass": "✓", "fail": "✕", "undecided": "?"}
_NUMBER = re.compile(r"[−+-]?[\d.,]+(e[+-]?\d+)?(\s?[%×a-zA-Zµ/]{0,9})?(\s?±\s?[\d.,]+\s?[%a-zA-Z]{0,9})?")
_CODE = re.compile("`([^`]+)`")
_CONTENTS_FROM = 4  # sections from which a list of contents helps


@dataclass(frozen=True, slots=True)
class Badge:
    """A verdict in a table or paragraph: a word with a mark and a colour.

    Attributes:
        text: Word, such as ``honest``.
        kind: One of ``pass``, ``fail`` or ``undecided``.
    """

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
        self, title: str, subtitle: str = "", *, command: str = "", origin: Mapping[str, object] | None = None
    ) -> None:
        self.title = title
        self.subtitle = subtitle
        self.command = command
        self._origin = origin
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._figures = 0

    def section(self, heading: str) -> None:
        """Begin a section."""
        self._sections.append(heading)
        self._parts.append(f'<h2 id="s{len(self._sections)}">{escape(heading)}</h2>')

    def paragraph(self, *pieces: str | Badge) -> None:
        """Add a paragraph of text and badges. Words between backticks are set as code, here and in tables."""
        self._parts.append(f"<p>{''.join(_inline(piece) for piece in pieces)}</p>")

    def definitions(self, items: Mapping[str, Cell]) -> None:
        """Add names with their values, one per row."""
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{_inline(value)}</dd>" for name, value in items.items())
        self._parts.append(f"<dl>{rows}</dl>")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "") -> None:
        """Add a table. Columns of numbers are set to the right; None is an empty cell.

        Raises:
            UsageError: A row does not have as many cells as there are headers.
        """
        for row in rows:
            if len(row) != len(headers):
                raise UsageError(f"a row of {len(row)} cells", wanted=f"{len(headers)} cells", do="fill with None")
        numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
        head = _row("th", headers, numeric)
        body = "".join(_row("td", row, numeric) for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="scroll" tabindex="0"><table>{title}<thead>{head}</thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, fig: "Figure", caption: str) -> None:
        """Add a figure drawn with the helpers of this package, with its caption."""
        self._figures += 1
        svg = to_svg(fig, prefix=f"f{self._figures}", description=caption)
        self._parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """Fold what is added inside the ``with`` block under a summary."""
        self._parts.append(f"<details><summary>{escape(summary)}</summary>")
        try:
            yield
        finally:
            self._parts.append("</details>")

    def render(self) -> str:
        """Return the whole page."""
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        style = resources.files("assay.pages").joinpath("report.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1>{subtitle}</header>\n{self._contents()}<main>\n"
            + "\n".join(self._parts)
            + f"\n</main>\n{self._footer()}\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page, complete or not at all.

        Raises:
            StorageError: The file cannot be written.
        """
        write_atomic(path, self.render())

    def _contents(self) -> str:
        if len(self._sections) < _CONTENTS_FROM:
            return ""
        links = "".join(f'<li><a href="#s{i}">{escape(s)}</a></li>' for i, s in enumerate(self._sections, 1))
        return f'<nav aria-label="Contents"><ol>{links}</ol></nav>\n'

    def _footer(self) -> str:
        origin = dict(provenance() if self._origin is None else self._origin)
        versions = origin.pop("versions", None)
        if isinstance(versions, Mapping):
            origin["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        if origin.pop("dirty", None):
            origin["commit"] = f"{origin.get('commit')} with local changes"
        items = {"command": self.command, **origin}
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
            for name, value in items.items()
            if value not in (None, "")
        )
        return f"<footer><dl>{rows}</dl></footer>"


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return bool(_NUMBER.fullmatch(cell))
    return cell is None or (isinstance(cell, int | float | np.number) and not isinstance(cell, bool))


def _inline(value: Cell) -> str:
    if isinstance(value, Badge):
        return f'<span class="badge {value.kind}"><b>{_MARKS[value.kind]}</b>{escape(value.text)}</span>'
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return _CODE.sub(r"<code>\1</code>", escape(str(value)))


def _row(tag: Literal["th", "td"], cells: Sequence[Cell], numeric: Sequence[bool]) -> str:
    marks = (' class="n"' if right else "" for right in numeric)
    return "<tr>" + "".join(f"<{tag}{m}>{_inline(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"
