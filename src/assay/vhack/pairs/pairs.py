"""Samples, pairs, and pair files: JSON Lines with one pair per line, as docs/vhack-pairs.md explains."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from assay.errors import DataError
from assay.files.jsonl import JsonObject, read_jsonl
from assay.files.storage import write_jsonl

_TEXTS = ("prompt", "hack", "clean", "group")
_PAGE = "docs/vhack-pairs.md"
DATA = Path(__file__).parent
"""Folder of the bundled pairs, families and tests."""


@dataclass(frozen=True)
class Sample:
    """One prompt and one completion of it, as text; the loss is taken on the completion's tokens only."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """One prompt with a completion that hacks and one that does not.

    Attributes:
        prompt: Text that both completions follow.
        hack: Completion that cheats.
        clean: Completion that does not.
        group: Name for what the pair has in common with others (a mechanism, a task); groups are held out whole.
        tags: Labels, by which `assay.vhack.pairs.verify_pairs` knows what the pair claims.
    """

    prompt: str
    hack: str
    clean: str
    group: str
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """SHA-256 in hex, first 16 digits, of prompt, hack and clean: what makes a pair the same pair."""
        text = json.dumps([self.prompt, self.hack, self.clean], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def samples(self) -> tuple[Sample, Sample]:
        """Return the hack side and the clean side as samples."""
        return Sample(self.prompt, self.hack), Sample(self.prompt, self.clean)


def read_pairs(path: str | Path) -> list[Pair]:
    """Return the pairs of a file, in its order.

    Raises:
        DataError: The file cannot be read, a line is not a pair, a pair is given twice, a side or group is empty, or
            both sides are equal; names the line.
    """
    pairs = [_pair(record, f"{path}, line {number}") for number, record in read_jsonl(path)]
    if not pairs:
        todo = f"check the path; the form is in {_PAGE}"
        raise DataError(f"{path}: no pair", wanted="at least one line", do=todo)
    check_pairs(pairs, [f"{path}, line {number}" for number in range(1, len(pairs) + 1)])
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
    write_jsonl(path, (asdict(pair) for pair in listed))


def authored_pairs() -> list[Pair]:
    """Return the bundled set: sixteen pairs on different tasks, two for each of eight mechanisms (the groups)."""
    return read_pairs(DATA / "authored.jsonl")


def _pair(record: JsonObject, name: str) -> Pair:
    if {"chosen", "rejected"} <= record.keys():
        raise DataError(
            f"{name}: preference data with chosen and rejected, as TRL has it",
            wanted="completions of which one cheats and the other does not: prompt, hack, clean, group",
            do="if every rejected completion cheats, rename rejected to hack and chosen to clean, and give each line "
            f"a group, see {_PAGE}",
        )
    missing = [field for field in _TEXTS if field not in record]
    unknown = sorted(record.keys() - {*_TEXTS, "tags"})
    if unknown or missing:
        parts = {"without": missing, "with unknown": unknown}
        seen = [f"{word} {', '.join(names)}" for word, names in parts.items() if names]
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
