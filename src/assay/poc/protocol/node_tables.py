"""TOML files with thousands of tables ``[[nodes]]``, of which only changed ones are parsed.

Parsing all of them takes half a second, in which every request waits.
"""

import re
from itertools import groupby
from pathlib import Path

from assay.files.jsonl import JsonObject
from assay.files.toml import parse_toml, read_toml

_HEADING = "[[nodes]]\n"
_MOST_CACHED = 2**15
_LONGEST_CACHED = 1000  # characters of a table
_cache: dict[str, JsonObject] = {}  # parsed tables by their text


def read_node_tables(path: str | Path) -> JsonObject:
    """Return the tables of a TOML file of at most 4 MiB; other content is a DataError.

    Later calls return the same objects for tables ``[[nodes]]`` of the same text: do not change
    them.
    """
    return read_toml(path, parse=_parse)


def _parse(text: str) -> JsonObject:
    """Return the tables of a TOML text; a ValueError or RecursionError says what is wrong with it.

    A node's table goes from its heading to the next line that begins with a bracket. The text
    without these tables is parsed with one empty table for each run of them. Where one may not
    stand there, or has more than its own keys, the whole text is parsed.
    """
    # A string of several lines may contain a heading.
    if '"""' in text or "'''" in text:
        return parse_toml(text)
    pieces = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    nodes = [piece for piece in pieces if _is_node(piece)]
    tables = {piece: _cache.get(piece) for piece in nodes}
    changed = [piece for piece, table in tables.items() if table is None]
    runs = [_HEADING if is_node else "".join(run) for is_node, run in groupby(pieces, _is_node)]
    try:
        outline = parse_toml("".join(runs))
        parsed = parse_toml("".join(changed))
    except ValueError:  # it names a line of the pieces, where the whole text has another
        return parse_toml(text)
    changed_tables = parsed.pop("nodes", [])
    has_other_keys = bool(parsed) or len(changed_tables) != len(changed)
    if not nodes or has_other_keys or outline.get("nodes") != [{}] * runs.count(_HEADING):
        return parse_toml(text)
    tables.update(zip(changed, changed_tables, strict=True))
    if len(_cache) > _MOST_CACHED:
        _cache.clear()
    _cache.update(
        (piece, table) for piece, table in tables.items() if table and len(piece) <= _LONGEST_CACHED
    )
    return outline | {"nodes": [tables[piece] for piece in nodes]}


def _is_node(piece: str) -> bool:
    return piece.startswith(_HEADING)
