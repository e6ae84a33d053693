"""TOML in: files that people write, read with a bound."""

import tomllib
from pathlib import Path

from assay.errors import DataError
from assay.reports._jsonl import JsonObject, read_whole

LONGEST_FILE = 2**22
"""Bytes of the longest file that is read: 4 MiB."""


def read_toml(path: str | Path) -> JsonObject:
    """Return the tables of a TOML file.

    Raises:
        DataError: The file cannot be read, is larger than 4 MiB, is not UTF-8 or is not TOML.
    """
    try:
        return tomllib.loads(read_whole(path, LONGEST_FILE).decode())
    except UnicodeDecodeError as error:
        raise _bad(path, f"byte {error.start + 1} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError names line and column
        raise _bad(path, str(error)) from error


def _bad(path: str | Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}", wanted="a TOML file", do="repair it, or write the file again")
