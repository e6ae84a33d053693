"""TOML files that people write, read with a bound on size, depth and numbers."""

import re
import tomllib
from pathlib import Path
from typing import Any

from assay.files.jsonl import DEEPEST, JsonObject, parts, refuse_mark
from assay.files.reading import malformed, read_whole

LONGEST_TOML = 2**22
"""Bytes of the longest TOML file that is read: 4 MiB."""

# A string within one line, closed or not.
_STRING = re.compile(r"""\"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?""")
# A dotted key of more than DEEPEST parts, in a text whose strings are one letter each.
_LONG_KEY = re.compile(rf"(?<![\w-])[\w-]++(?:[ \t]*+\.[ \t]*+[\w-]++){{{DEEPEST}}}")


def parse_toml(text: str) -> JsonObject:
    """Return the tables of a TOML text; a ValueError or RecursionError says what is wrong with it.

    Keys have 64 parts at most, and whole numbers 64 bits.
    """
    refuse_mark(text)
    # The parser takes memory by the square of the number of parts.
    if _LONG_KEY.search(_STRING.sub("s", text)):
        raise ValueError(f"a key of more than {DEEPEST} parts")
    tables = tomllib.loads(text)
    pending: list[Any] = [tables]
    while pending:
        value = pending.pop()
        pending += parts(value)
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text with a zero byte, which no path may have")
        # Python reads a whole number of any size in hexadecimal digits, and cannot print it.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"a whole number of {value.bit_length()} bits, where TOML has 64")
    return tables


def read_toml(path: str | Path) -> JsonObject:
    """Return the tables of a TOML file of at most 4 MiB; other content is a DataError."""
    try:
        return parse_toml(read_whole(path, LONGEST_TOML).decode())
    except UnicodeDecodeError as error:
        raise malformed(path, f"byte {error.start + 1} is not UTF-8", "a TOML file") from error
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError names line and column
        raise malformed(path, str(error), "a TOML file") from error
