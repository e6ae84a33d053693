"""Strict JSON in, canonical JSON out: one object, or an object on each line of a file.

Reading refuses what Python's parser forgives: NaN and infinities, numbers too large for a float, a
duplicate key, unpaired surrogates. Writing has one form, so the same record is always the same
bytes.
"""

import json
import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import DataError, UsageError
from assay.files.reading import malformed, open_regular, read_whole

LONGEST_LINE = 2**26
"""Bytes of the longest line or JSON file that is read: 64 MiB."""

DEEPEST = 64
"""Levels of the deepest value that is read.

Files of assay have ten, and a thousand end the Python that prints them.
"""

MOST_PARTS = 2**22
"""Commas and opening brackets of the largest value that is read.

Three bytes of ``[],`` take seventy bytes of memory.
"""

MOST_COLONS = 2**14
"""Colons of the largest record with a fixed set of keys, those in its texts included.

pydantic names every key that it does not know, which takes a thousand times the key.
"""

JsonObject = dict[str, Any]
"""A JSON object, as Python reads it."""

FORMATS = (
    (b"\x1f\x8b", "a gzip file", "gunzip it first"),
    (b"PK\x03\x04", "a zip file", "unzip it first"),
    (
        b"PAR1",
        "a parquet file",
        "write it with pandas: read_parquet(…).to_json(…, orient='records', lines=True)",
    ),
    ((b"\xff\xfe", b"\xfe\xff"), "a file in UTF-16", "save it as UTF-8"),
    (b"\xef\xbb\xbf", "a file with a byte order mark", "save it as UTF-8 without one"),
    (b"[", "one JSON array", "write an object on each line: jq -c '.[]' FILE"),
    (b"{\n", "one JSON object on several lines", "write an object on each line: jq -c . FILE"),
)
"""First bytes of files in other formats, their names, and how to turn them into JSON Lines."""


@cache  # json.dumps would make one for each line
def _encoder() -> json.JSONEncoder:
    return json.JSONEncoder(
        ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_python_number
    )


def dumps(value: object) -> str:
    """Return a value as one line of canonical JSON.

    Keys stay in their order, there are no spaces, and floats are the shortest that read back to the
    same bits. Numpy scalars are written as the Python number of the same value. What strict JSON
    cannot hold is a UsageError.
    """
    try:
        text = _encoder().encode(value)
        # A lone surrogate has no UTF-8 form.
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"a value that is not JSON: {error}",
            wanted="objects, lists, strings, booleans, null and finite numbers",
            do="convert or drop it before writing",
        ) from error
    return text


def _python_number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def loads(text: str | bytes, source: str) -> JsonObject:
    """Return the object of a strict JSON text; bytes are read as UTF-8.

    Other text is a DataError that names its ``source``, such as ``proof.jsonl, line 3``.
    """
    try:
        value = parse(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise malformed(
            source,
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8",
            "a JSON object",
        ) from error
    except (ValueError, RecursionError) as error:
        raise malformed(source, str(error), "a JSON object") from error
    if not isinstance(value, dict):
        raise malformed(
            source, f"a {type(value).__name__} where an object should be", "a JSON object"
        )
    return value


def check_colons(text: str, source: str) -> None:
    """Refuse a record with far more keys than any has, before it is parsed, as a DataError."""
    if (count := text.count(":")) > MOST_COLONS:
        raise malformed(source, f"{count} colons", f"a record with at most {MOST_COLONS}")


def refuse_mark(text: str) -> None:
    """Raise a ValueError for a text that begins with a byte order mark."""
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark; save the file as UTF-8 without one")


def parse(text: str) -> Any:
    """Return the value of a strict JSON text; a ValueError or RecursionError says what is wrong.

    The number of its parts is bounded before the parser allocates memory for them.
    """
    brackets = text.count("[") + text.count("{")
    if brackets + text.count(",") > MOST_PARTS:
        raise ValueError(f"more than {MOST_PARTS} commas and brackets")
    refuse_mark(text)
    value = json.loads(
        text, object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_float=_finite
    )
    if "\\u" in text:
        # An escaped lone surrogate parses, but has no UTF-8 form.
        json.dumps(value, ensure_ascii=False).encode()
    if brackets > DEEPEST and is_deep(value, DEEPEST):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return value


def is_deep(value: Any, levels: int) -> bool:
    """Return whether a JSON value is nested deeper than so many objects and lists."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [part for container in level for part in parts(container)]
    return bool(level)


def parts(value: Any) -> Iterable[Any]:
    """Return the values of an object or the items of a list; other values have no parts."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def unique_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return the object of these pairs; a duplicate key is a ValueError.

    It is an ``object_pairs_hook`` of :func:`json.loads`.
    """
    record: JsonObject = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"key {key!r:.60} is given twice")
        record[key] = value
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large for a float")
    return number


def read_jsonl(path: str | Path) -> Iterator[tuple[int, JsonObject]]:
    """Yield the line number, from 1, and the object of every line of a JSON Lines file.

    A line that is empty, too long or no strict JSON object is a DataError that names it. Empty
    lines at the end are skipped.
    """
    first_empty = 0
    for number, line in read_lines(path):
        if not line.strip():
            first_empty = first_empty or number
            continue
        if first_empty:
            raise malformed(f"{path}, line {first_empty}", "empty", "a JSON object")
        yield number, loads(line, f"{path}, line {number}")


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the line number, from 1, and the bytes of every line, its line end included.

    A file in another format than JSON Lines is a DataError that names the format.
    """
    with open_regular(path) as file:
        for number in count(1):
            if not (line := file.readline(LONGEST_LINE + 1)):
                return
            if number == 1:
                _check_format(path, line)
            if len(line) > LONGEST_LINE:
                raise malformed(
                    f"{path}, line {number}", f"longer than {LONGEST_LINE} bytes", "a JSON object"
                )
            yield number, line


def _check_format(path: str | Path, line: bytes) -> None:
    text = line.strip()
    if b"," in text and text[:1] not in b"{[" and text.isascii() and text.decode().isprintable():
        raise DataError(
            f"{path}, line 1: this is CSV",
            wanted="JSON Lines: one object on each line",
            do="write it with pandas: read_csv(…).to_json(…, orient='records', lines=True)",
        )
    for first_bytes, name, do in FORMATS:
        if line.replace(b"\r\n", b"\n").startswith(first_bytes):
            raise DataError(
                f"{path}, line 1: this is {name}",
                wanted="JSON Lines: one object on each line",
                do=do,
            )


def read_json(path: str | Path) -> JsonObject:
    """Return the object of a strict JSON file of at most 64 MiB."""
    return loads(read_whole(path, LONGEST_LINE), str(path))
