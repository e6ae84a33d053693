"""Safetensors files, checked before the library opens them.

The library compares names, shapes and offsets with the size of the file. For that it takes several
times the memory of the header, whose length the file itself states.
"""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from assay.files.reading import malformed, open_regular

LONGEST_HEADER = 2**25
"""Bytes of the longest header of a safetensors file that is read: 32 MiB."""

LONGEST_TENSORS = 2**32
"""Bytes of the largest basis, δS or adapter that is read: 4 GiB."""


def check_tensors(path: str | Path, longest: int | None = None) -> None:
    """Refuse a file without a safetensors header, or of more than ``longest`` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = int.from_bytes(file.read(8), "little")
    if longest is not None and size > longest:
        raise malformed(path, f"longer than {longest} bytes", "a smaller file")
    if header > min(LONGEST_HEADER, size):
        raise malformed(
            path,
            f"no safetensors file: its first eight bytes say that {header} bytes of header follow",
            f"a safetensors file with a header of {LONGEST_HEADER} bytes at most",
        )


def check_schema(schema: str, path: str | Path) -> None:
    """Refuse a safetensors file whose metadata name another schema, or none."""
    check_tensors(path)
    try:
        with safe_open(path, framework="np") as reader:
            stated = (reader.metadata() or {}).get("schema")
    except SafetensorError as error:
        raise malformed(path, str(error), "a safetensors file") from error
    if stated != schema:
        raise malformed(path, f"schema {stated!r:.60}", f"a file of schema {schema}")
