"""JSON Lines that are read strictly: header, records, and a footer with their SHA-256.

Anything that is not exactly what would be written, spaces and the order of keys included, is an
error that names the line.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from assay.errors import AssayError, DataError, ProofFormatError
from assay.files.jsonl import MOST_COLONS, dumps, read_lines
from assay.files.storage import write_lines
from assay.poc.protocol.checks import MAX_NAME

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How a dataclass is read from JSON: values of its types and no others."""

MOST_PARTS: Mapping[bytes, int] = MappingProxyType({b",": 2**23, b"[": 2**21, b"{": 2**13})
"""How often a character may be in a line: enough for two million runs of nonces in a header."""

FOOTER = b'{"footer":'  # beginning of the last line of a file


def must(holds: Callable[[Any], bool], wanted: str) -> Callable[[Any], Any]:
    """Return a validator for pydantic that refuses values for which ``holds`` is not true.

    pydantic's own ``Predicate`` would name the function where an error should say what is wanted.
    """

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(wanted)
        return value

    return check


# A text that a message can show on a terminal.
Text = Annotated[
    str,
    AfterValidator(
        must(
            lambda text: len(text) <= MAX_NAME and text.isprintable(),
            f"a text of at most {MAX_NAME} printable characters",
        )
    ),
]
Seconds = Annotated[int | float, Field(ge=0)]  # written as they were given


def format_error(seen: str, wanted: str) -> ProofFormatError:
    """Return the error of a value that is not what its format says."""
    return ProofFormatError(
        seen, wanted=wanted, do="check that this is the file you mean, or ask the node for it again"
    )


def line_error(path: str | Path, number: int, seen: str, wanted: str) -> ProofFormatError:
    """Return the error of a line, with the name of the file and the number of the line."""
    return format_error(f"{path}, line {number}: {seen}", wanted)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_as(kind: type[T], text: bytes) -> T:
    """Return JSON as a :data:`STRICT` type; a ProofFormatError names the wrong field."""
    if (count := text.count(b":")) > MOST_COLONS:
        raise format_error(f"{count} colons", f"at most {MOST_COLONS}, for its keys and texts")
    try:
        parsed: T = _adapter(cast("Any", kind)).validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"]))
        value = fault["input"]
        # The line of the file is named beside; the text of one line is always line 1.
        message = f"{fault['msg']:.200}".replace("at line 1 column", "at column")
        # No place: the text is no JSON, and pydantic says where.
        if not place or fault["type"] == "missing":
            raise format_error(
                f"no {place}" if place else message, "a line as assay writes it"
            ) from None
        verb = "holds" if isinstance(value, dict | list) else "is"
        shown = value[:60] if isinstance(value, str) else f"{value!r:.60}"
        raise format_error(
            f"{place} {verb} {shown}", message.removeprefix("Input should be ")
        ) from None
    return parsed


def parse_line(
    path: str | Path,
    number: int,
    line: bytes,
    read: Callable[[bytes], T],
    write: Callable[[T], str],
    most: Mapping[bytes, int] = MOST_PARTS,
    longest: int | None = None,
) -> T:
    """Parse a line, and refuse it unless it is in canonical form.

    ``most`` says how often a character may be in the line, as values take many times the room of
    their text, and ``longest`` how many bytes it may have. It is empty where the file ends.
    """
    if not line:
        raise line_error(
            path, number, "the end of the file", "a complete file: it is empty or was cut off"
        )
    if longest is not None and len(line) > longest:
        raise line_error(path, number, f"a line of {len(line)} bytes", f"at most {longest}")
    if not line.endswith(b"\n"):
        raise line_error(
            path, number, "the file ends within this line", "a complete file: it was cut off"
        )
    # Before the line is parsed, because every part of it takes memory of its own.
    for character, times in most.items():
        if (count := line.count(character)) > times:
            raise line_error(
                path, number, f"{count} times {character.decode()!r}", f"at most {times}"
            )
    if line.endswith(b"\r\n"):
        raise line_error(
            path,
            number,
            "the line ends of Windows (CRLF)",
            "LF alone: fetch the file again as binary",
        )
    # A line has one form: what was read must be the same bytes when it is written again.
    try:
        value = read(line)
        written = write(value)
    except AssayError as error:
        raise line_error(path, number, error.seen, error.wanted) from None
    if line != written.encode() + b"\n":
        raise line_error(
            path, number, f"{line[:60]!r} in another form than it is written in", f"{written:.60}…"
        )
    return value


class LastLine:
    """Base of footers: counts, seconds, and the SHA-256 of the record lines."""

    seconds: float

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps({"footer": vars(self)})

    @classmethod
    def read_end(
        cls,
        path: str | Path,
        number: int,
        line: bytes,
        lines: Iterator[tuple[int, bytes]],
        count: Callable[[float], Self],
    ) -> Self:
        """Read the last line of a file, and refuse one that does not fit or has lines after it.

        Args:
            path: File, for errors.
            number: Number of the line.
            line: The line.
            lines: What follows it.
            count: Returns the footer of the lines before it, for the seconds that it states.
        """
        footer = parse_line(
            path,
            number,
            line,
            lambda line: read_as(cls, line.removeprefix(FOOTER).removesuffix(b"}\n")),
            cls.line,
        )
        if footer != (counted := count(footer.seconds)):
            raise line_error(
                path,
                number,
                f"a footer that does not fit the lines before it: {line[:300]!r}",
                counted.line(),
            )
        for number, _ in lines:
            raise line_error(path, number, "a line after the footer", "the end of the file")
        return footer


class StrictFile(ABC):
    """A strict JSON Lines file: a header, one line for each record, and a footer."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file; a ProofFormatError names the incomplete or inconsistent line."""
        try:
            return cls._read(path, read_lines(path))
        except DataError as error:
            raise ProofFormatError(error.seen, wanted=error.wanted, do=error.do) from error

    @classmethod
    def parse(cls, source: str, content: bytes) -> Self:
        """Read and check a file in memory as :meth:`load` does; errors name the source."""
        return cls._read(source, enumerate(io.BytesIO(content), start=1))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file; the final name appears when it is whole.

        Raises:
            UsageError: The file exists and may not be replaced.
            StorageError: The file cannot be written.
        """
        write_lines(path, self.lines(), overwrite=overwrite)

    @abstractmethod
    def lines(self) -> list[str]:
        """Return the lines of the file, without their newlines."""

    @classmethod
    @abstractmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        """Read the lines with their numbers."""
