"""How lines of untrusted files are read: exactly the known fields, in exactly the bytes in which they are written."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from assay.errors import DataError, ProofFormatError
from assay.reports import loads, read_lines

T = TypeVar("T")
_DO = "ask the node for it again"

MOST_PARTS: Mapping[bytes, int] = MappingProxyType({b",": 2**23, b"[": 2**21, b"{": 2**13})
"""How often a character may be in a line: enough for two million runs of nonces in a header."""


def malformed(seen: str, wanted: str) -> ProofFormatError:
    """Return the error of a value that is not what its format says."""
    return ProofFormatError(seen, wanted=wanted, do=_DO)


def malformed_line(path: str | Path, number: int, seen: str, wanted: str, do: str = "") -> ProofFormatError:
    """Return the error of a line, with the name of the file and the number of the line."""
    return ProofFormatError(f"{path}, line {number}: {seen}", wanted=wanted, do=do or _DO)


def check_fields(value: Any, names: set[str], what: str) -> None:
    """Refuse what is not an object with exactly these keys.

    Raises:
        ProofFormatError: Names the keys that are missing or unknown.
    """
    if not isinstance(value, dict):
        raise malformed(f"{what} is {value!r:.60}", "an object with " + ", ".join(sorted(names)))
    if value.keys() != names:
        odd = ", ".join(sorted(value.keys() ^ names))
        raise malformed(f"{what} with {odd:.200} missing or unknown", "exactly " + ", ".join(sorted(names)))


def parse_footer(line: Any, kind: Callable[..., T]) -> T:
    """Return the last line of a file: counts, the seconds that they took, and the SHA-256 of the lines before.

    Args:
        line: Value of the line.
        kind: Dataclass of the footer.

    Raises:
        ProofFormatError: A field is missing, unknown or of another type.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    check_fields(line, {"footer"}, "the footer")
    check_fields(line["footer"], names, "the footer")
    values = line["footer"]
    whole = type(values["sha256"]) is str and all(type(values[name]) is int for name in names - {"sha256", "seconds"})
    if not whole or type(values["seconds"]) not in (int, float) or not 0 <= values["seconds"] < math.inf:
        raise malformed(f"footer {values!r:.200}", "counts, seconds and a SHA-256")
    return kind(**values)


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1.

    Raises:
        ProofFormatError: The file cannot be read, or a line is too long.
    """
    try:
        yield from read_lines(path)
    except DataError as error:
        raise ProofFormatError(error.seen, wanted=error.wanted, do=error.do) from error


def parse_line(
    path: str | Path,
    number: int,
    line: bytes,
    parse: Callable[[Any], T],
    write: Callable[[T], str],
    most: Mapping[bytes, int] = MOST_PARTS,
) -> T:
    """Parse a line and refuse it if the value would be written in other bytes.

    Args:
        path: Name of the file, for errors.
        number: Number of the line, for errors.
        line: Bytes of the line, line end included; empty where the file ends.
        parse: Function that makes the value of the JSON object, or of None where the file ends.
        write: Function that writes the value as canonical JSON.
        most: Number of times that a character may be in the line. Values take many times the room of their text, so
            they are counted before any is made.

    Raises:
        ProofFormatError: The line is wrong; names the file and the line.
    """
    for character, times in most.items():
        if (count := line.count(character)) > times:
            raise malformed_line(path, number, f"{count} times {character.decode()!r}", f"at most {times}")
    try:
        value = parse(loads(line, f"{path}, line {number}") if line else None)
    except DataError as error:
        raise ProofFormatError(error.seen, wanted=error.wanted, do=error.do) from error
    except ProofFormatError as error:
        raise malformed_line(path, number, error.seen, error.wanted, error.do) from None
    written = write(value)
    if line.endswith(b"\r\n"):
        raise malformed_line(
            path, number, "the line ends of Windows (CRLF)", "LF alone", "fetch the file again as binary"
        )
    if line != written.encode() + b"\n":
        raise malformed_line(path, number, f"{line[:60]!r} in another form than it is written in", f"{written:.60}…")
    return value
