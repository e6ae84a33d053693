"""Pair files: JSON Lines, one pair per line; docs/vhack-pairs.md explains the fields."""

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from assay.errors import DataError
from assay.reports import JsonObject, read_jsonl, write_jsonl
from assay.vhack.pairs._types import Pair

_TEXTS = ("prompt", "hack", "clean", "group")
_PAGE = "docs/vhack-pairs.md"


def read_pairs(path: str | Path) -> list[Pair]:
    """Return the pairs of a file, in its order.

    Raises:
        DataError: The file cannot be read, a line is not a pair, a pair is given twice, a side or group is empty, or
            both sides are equal; names the line.
    """
    numbered = [(number, _pair(record, f"{path}, line {number}")) for number, record in read_jsonl(path)]
    if not numbered:
        raise DataError(f"{path}: no pair", wanted="at least one line", do=f"check the path; the form is in {_PAGE}")
    pairs = [pair for _, pair in numbered]
    check_pairs(pairs, [f"{path}, line {number}" for number, _ in numbered])
    return pairs


def check_pairs(pairs: Sequence[Pair], names: Sequence[str] | None = None) -> None:
    """Refuse pairs that cannot be used as evidence.

    Args:
        pairs: Pairs of prompts and completions.
        names: What to call each in an error; by default ``pair I (group G)``, counted from 0.

    Raises:
        DataError: A pair is given twice, a side, prompt or group is empty, or both sides are equal.
    """
    seen: dict[str, str] = {}
    for index, pair in enumerate(pairs):
        name = names[index] if names is not None else f"pair {index} (group {pair.group})"
        empty = [field for field in _TEXTS if not getattr(pair, field).strip()]
        if empty:
            raise _bad(name, f"{' and '.join(empty)} empty", "text in every field")
        if pair.hack == pair.clean:
            raise _bad(name, "hack and clean are the same text", "two different completions")
        if pair.key in seen:
            raise _bad(name, f"the same pair as {seen[pair.key]}", "each pair once")
        seen[pair.key] = name


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write a pair file, complete or not at all.

    Raises:
        DataError: The pairs could not be read back, see `check_pairs`.
        StorageError: The file cannot be written; nothing of it is kept.
    """
    listed = list(pairs)
    check_pairs(listed)
    records = ({**{field: getattr(pair, field) for field in _TEXTS}, "tags": list(pair.tags)} for pair in listed)
    write_jsonl(path, records)


def data_file(name: str) -> Path:
    """Return the path of a data file of this package."""
    with resources.as_file(resources.files("assay.vhack.pairs").joinpath(name)) as path:
        return path


def authored_pairs() -> list[Pair]:
    """Return the bundled set: sixteen pairs on different tasks, two for each of eight mechanisms, their groups."""
    return read_pairs(data_file("authored.jsonl"))


def _pair(record: JsonObject, name: str) -> Pair:
    unknown, missing = sorted(record.keys() - {*_TEXTS, "tags"}), [f for f in _TEXTS if f not in record]
    if {"chosen", "rejected"} <= record.keys():
        raise DataError(
            f"{name}: preference data with chosen and rejected, as TRL has it",
            wanted="completions of which one cheats and the other does not: prompt, hack, clean, group",
            do="if every rejected completion cheats, rename rejected to hack and chosen to clean, and give each line "
            f"a group, see {_PAGE}",
        )
    if unknown or missing:
        seen = [f"without {', '.join(missing)}"] * bool(missing) + [f"with unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise _bad(name, f"an object {' and '.join(seen)}", "prompt, hack, clean, group and perhaps tags")
    wrong = [field for field in _TEXTS if not isinstance(record[field], str)]
    tags = record.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        wrong.append("tags")
    if wrong:
        raise _bad(name, f"{', '.join(wrong)} of another type", "text, and a list of texts for tags")
    return Pair(record["prompt"], record["hack"], record["clean"], record["group"], tuple(tags))


def _bad(name: str, seen: str, wanted: str) -> DataError:
    return DataError(f"{name}: {seen}", wanted=wanted, do=f"correct or remove it; the form is in {_PAGE}")
