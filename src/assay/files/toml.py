"""TOML in: files that people write, read with a bound."""

import tomllib
from pathlib import Path
from typing import Any

from assay.errors import DataError
from assay.files.jsonl import JsonObject, parts, read_whole

LONGEST_FILE = 2**22
"""Bytes of the longest file that is read: 4 MiB."""


def read_toml(path: str | Path) -> JsonObject:
    """Return the tables of a TOML file.

    Raises:
        DataError: The file cannot be read, is larger than 4 MiB, is not UTF-8 or is not TOML.
    """
    try:
        return parse_toml(read_whole(path, LONGEST_FILE).decode())
    except UnicodeDecodeError as error:
        raise _bad(path, f"byte {error.start + 1} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError names line and column
        raise _bad(path, str(error)) from error


def parse_toml(text: str) -> JsonObject:
    """Return the tables of a text in TOML.

    Raises:
        ValueError: The text is not TOML, or has a whole number beyond those of TOML: Python reads any written in
            hexadecimal digits, and cannot show it. RecursionError means that it is nested too deeply.
    """
    tables = tomllib.loads(text)
    waiting: list[Any] = [tables]
    while waiting:
        value = waiting.pop()
        waiting += parts(value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"a whole number of {value.bit_length()} bits, where TOML has 64")
    return tables


def _bad(path: str | Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}", wanted="a TOML file", do="repair it, or write the file again")
