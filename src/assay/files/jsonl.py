"""Strict JSON in, canonical JSON out, and TOML in: files that people write, read with a bound.

Reading refuses what Python's parser forgives: NaN and infinities, numbers too large for a float, a
key given twice, unpaired surrogates. Writing has one form, so the same record is always the same
bytes.
"""

import errno
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from assay.errors import DataError, UsageError

LONGEST_LINE = 2**26
"""Bytes of the longest line that is read: 64 MiB."""

DEEPEST = 64
"""Levels of the deepest value that is read. Files of assay have ten, and a thousand end the Python
that shows them.
"""

MOST_PARTS = 2**22
"""Commas and opening brackets of the largest value that is read: three bytes of ``[],`` take
seventy of memory.
"""

LONGEST_HEADER = 2**25
"""Bytes of the longest header of a safetensors file that is read: 32 MiB."""

LONGEST_TENSORS = 2**32
"""Bytes of the largest basis, δS or adapter that is read: 4 GiB."""

JsonObject = dict[str, Any]
"""An object of JSON, as it was read."""


def dumps(value: object) -> str:
    """Return one line of JSON: keys in the order given, no spaces, shortest floats that read back
    to the same bits.

    It is not json.dumps with other options: there is one form, and what strict JSON cannot hold is
    a UsageError. Numpy scalars are written as the Python number of the same value.
    """
    try:
        text = json.dumps(
            value,
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
            default=_python_number,
        )
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        wanted = "objects, lists, strings, booleans, null and finite numbers"
        do = "convert or drop it before writing"
        raise UsageError(f"a value that is not JSON: {error}", wanted=wanted, do=do) from error
    return text


def _python_number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def loads(text: str | bytes, source: str) -> JsonObject:
    """Return the object that strict JSON text holds, in UTF-8 when given as bytes.

    Other text, and what is nested too deeply, is a DataError that names its source, such as
    ``proof.jsonl, line 3``.
    """
    try:
        value = parse(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise _bad(
            source, f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _bad(source, str(error)) from error
    if not isinstance(value, dict):
        raise _bad(source, f"a {type(value).__name__} where an object should be")
    return value


def parse(text: str) -> Any:
    """Return the value of strict JSON. A ValueError, or a RecursionError: it is something else, too
    deep or too large.

    What it takes in memory is bounded before the parser sees it.
    """
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > MOST_PARTS:
        raise ValueError(f"more than {MOST_PARTS} commas and brackets")
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark; save the file as UTF-8 without one")
    value = json.loads(
        text, object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_float=_finite
    )
    if "\\u" in text:
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # an escaped lone surrogate has no UTF-8 form
    if opened > DEEPEST and is_deep(value, DEEPEST):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return value


def is_deep(value: Any, levels: int) -> bool:
    """Return whether anything stands below so many levels of objects and lists in a value that was
    read from JSON.
    """
    level: list[Any] = [value]
    for _ in range(levels):
        level = [part for whole in level for part in parts(whole)]
    return bool(level)


def parts(value: Any) -> Iterable[Any]:
    """Return what stands in an object or a list that was read, and nothing of other values."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _bad(source: str | Path, reason: str, wanted: str = "a JSON object") -> DataError:
    return DataError(
        f"{source}: {reason}", wanted=wanted, do="repair or remove it, or write the file again"
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return the object of these pairs, as an ``object_pairs_hook`` of :func:`json.loads`; name a
    key given twice.
    """
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r:.60} is given twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large for a float")
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[int, JsonObject]]:
    """Yield the objects of a JSON Lines file with their line numbers, counted from 1, read one line
    at a time.

    An empty line, a long one and one that is no strict JSON object are a DataError that names the
    line. Empty lines at the end are passed over.
    """
    empty = 0
    for number, line in read_lines(path):
        if not line.strip():
            empty = empty or number
            continue
        if empty:
            raise _bad(f"{path}, line {empty}", "empty")
        yield number, loads(line, f"{path}, line {number}")


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file as they are, line ends included, with their numbers, counted from
    1.

    A file of another shape is a DataError that names it.
    """
    with _regular(Path(path)) as file:
        for number in count(1):
            if not (line := file.readline(LONGEST_LINE + 1)):
                return
            if number == 1:
                _check_shape(path, line)
            if len(line) > LONGEST_LINE:
                raise _bad(f"{path}, line {number}", f"longer than {LONGEST_LINE} bytes")
            yield number, line


SHAPES = (
    (b"\x1f\x8b", "a gzip file", "gunzip it first"),
    (b"PK\x03\x04", "a zip file", "unzip it first"),
    (
        b"PAR1",
        "a parquet file",
        "write it with pandas: read_parquet(…).to_json(…, orient='records', lines=True)",
    ),
    ((b"\xff\xfe", b"\xfe\xff"), "a file in UTF-16", "save it as UTF-8"),
    (b"[", "one JSON array", "write an object on each line: jq -c '.[]' FILE"),
    (b"{\n", "one JSON object on several lines", "write an object on each line: jq -c . FILE"),
)
"""How files of other shapes begin, what they are, and how they become JSON Lines."""


def _check_shape(path: str | Path, line: bytes) -> None:
    for begins, shape, do in SHAPES:
        if line.replace(b"\r\n", b"\n").startswith(begins):
            raise DataError(
                f"{path}, line 1: this is {shape}",
                wanted="JSON Lines: one object on each line",
                do=do,
            )


def read_json(path: str | Path) -> JsonObject:
    """Return the one object of a JSON file of at most 64 MiB, read strictly."""
    return loads(read_whole(path, LONGEST_LINE), str(path))


def read_whole(path: str | Path, longest: int) -> bytes:
    """Return the bytes of a regular file of at most so many bytes."""
    with _regular(Path(path)) as file:
        text = file.read(longest + 1)
    if len(text) > longest:
        raise DataError(
            f"{path}: longer than {longest} bytes", wanted="a smaller file", do="pass another one"
        )
    return text


def check_tensors(path: str | Path, longest: int | None = None) -> None:
    """Refuse, before a library opens it, what is no safetensors file, or larger than so many bytes.

    The library holds names, shapes and offsets against the size of the file, and takes several
    times the memory of the header for that.
    """
    with _regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        header = int.from_bytes(file.read(8), "little")
    if longest is not None and size > longest:
        raise _bad(path, f"longer than {longest} bytes", "a smaller file")
    if header > min(LONGEST_HEADER, size):
        wanted = f"a safetensors file with a header of {LONGEST_HEADER} bytes at most"
        raise _bad(path, f"a header of {header} bytes", wanted)


def check_kind(schema: str, path: str | Path) -> None:
    """Refuse a safetensors file that does not name this schema."""
    check_tensors(path)
    try:
        with safe_open(path, framework="np") as reader:
            found = (reader.metadata() or {}).get("schema")
    except SafetensorError as error:
        raise _bad(path, str(error), "a safetensors file") from error
    if found != schema:
        raise _bad(path, f"schema {found!r:.60}", f"a file of schema {schema}")


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file. A pipe would be waited for without end, and a device may have no end."""
    try:
        if "\0" in str(path):  # a ValueError of Python
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(
                    f"{path} is a pipe or a device",
                    wanted="a regular file",
                    do="copy it to a file first",
                )
            yield file
    except OSError as error:
        wanted = "a file that can be read"
        do = "check its path and permissions"
        raise DataError(f"{path}: {error.strerror}", wanted=wanted, do=do) from error


LONGEST_FILE = 2**22
"""Bytes of the longest file that is read: 4 MiB."""


def read_toml(path: str | Path) -> JsonObject:
    """Return the tables of a TOML file of at most 4 MiB, which are not to be changed: some are kept
    for the next.
    """
    try:
        text = read_whole(path, LONGEST_FILE).decode()
        return _tables(text) if _NODE in text else _parse(text)
    except UnicodeDecodeError as error:
        raise _bad(path, f"byte {error.start + 1} is not UTF-8", "a TOML file") from error
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError names line and column
        raise _bad(path, str(error), "a TOML file") from error


_NODE = "[[nodes]]\n"
_known: dict[str, JsonObject] = {}  # tables [[nodes]] by their text, of files that were read lately
_MOST_KNOWN = 2**15
_LONGEST_KNOWN = 1000  # tables, and characters of each


def _tables(text: str) -> JsonObject:
    """Return what TOML text holds; of ten thousand tables ``[[nodes]]`` only those are parsed that
    are not known.

    Such a table goes from its line to the next that begins with a bracket. The others are parsed
    without it, with one line ``[[nodes]]`` for each row of them: where one may not stand there, or
    has more than its own keys, the whole text is parsed.
    """
    cut = () if '"""' in text or "'''" in text else re.split("^(?=\\[)", text, flags=re.MULTILINE)
    nodes = [part for part in cut if part.startswith(_NODE)]
    found = {part: _known.get(part) for part in nodes}
    new = [part for part, table in found.items() if table is None]
    rows = [
        _NODE if own else "".join(row)
        for own, row in groupby(cut, lambda part: part.startswith(_NODE))
    ]
    try:
        rest = _parse("".join(rows))
        fresh = _parse("".join(new))
    except ValueError:  # of which the line is another than in the text
        return _parse(text)
    tables = fresh.pop("nodes", [])
    if (
        not nodes
        or fresh
        or len(tables) != len(new)
        or rest.get("nodes") != [{}] * rows.count(_NODE)
    ):
        return _parse(text)
    found.update(zip(new, tables, strict=True))
    if len(_known) > _MOST_KNOWN:
        _known.clear()
    _known.update(
        (part, table) for part, table in found.items() if table and len(part) <= _LONGEST_KNOWN
    )
    return rest | {"nodes": [found[part] for part in nodes]}


# A string of a line, whole or cut off, and a key or name of a table with too many parts once
# strings are one letter.
_STRINGS = re.compile(r"""\"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?""")
_LONG_KEY = re.compile(rf"(?<![\w-])[\w-]++(?:[ \t]*+\.[ \t]*+[\w-]++){{{DEEPEST}}}")


def _parse(text: str) -> JsonObject:
    if _LONG_KEY.search(_STRINGS.sub("s", text)):  # the parser would take memory by its square
        raise ValueError(f"a key of more than {DEEPEST} parts")
    tables = tomllib.loads(text)
    waiting: list[Any] = [tables]
    while waiting:
        value = waiting.pop()
        waiting += parts(value)
        # Python reads any whole number that is written in hexadecimal digits, and cannot show it.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"a whole number of {value.bit_length()} bits, where TOML has 64")
    return tables
