"""Files that the result of a command must not replace."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.errors import UsageError
from assay.files.jsonl import LONGEST_LINE
from assay.framework.setting import Setting


def refuse_own_sources(settings: Mapping[str, Setting], values: Mapping[str, Any]) -> None:
    """Refuse a result that would replace a file from which it is made, or another result."""
    for result in (name for name in values if name == "output" or settings[name].flag.file):
        flag = settings[result].spelling
        for name, value in values.items():
            texts = value if isinstance(value, list | tuple) else [value]
            # A calibration that is merged into may be the result: it grows.
            if name not in (result, "merge") and any(
                isinstance(text, str) and _same_file(values[result], text) for text in texts
            ):
                raise UsageError(
                    f"{flag} {values[result]}, which is {settings[name].spelling} too",
                    wanted="a file of its own for every result",
                    do=f"choose another name with {flag}",
                )


def is_result(path: Path) -> bool:
    """Whether a file is empty, a page, or one line of JSON that names a form of assay."""
    with path.open("rb") as file:
        first = file.readline(LONGEST_LINE)
        return not first or first.startswith(b"<!") or (b'"assay.' in first and not file.read(1))


def _same_file(result: str, source: str) -> bool:
    """Return whether two paths are one file, or will be; a directory may hold both."""
    try:
        return Path(result).resolve() == Path(source).resolve() and not Path(result).is_dir()
    # A value that is no path, or links that lead to themselves.
    except (OSError, TypeError, ValueError, RuntimeError):
        return False
