"""Samples, pairs, pair files (JSON Lines, as docs/vhack-pairs.md explains), and pairs of
completions of models.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import InstanceOf, TypeAdapter, ValidationError

from assay.errors import AssayError, DataError
from assay.files.jsonl import JsonObject, read_jsonl
from assay.files.storage import write_jsonl
from assay.models.chat import CHAT_OPTIONS, Chat, read_chat
from assay.vhack.environment.tasks import task_named

_TEXTS = ("prompt", "hack", "clean", "group")
_PAGE = "docs/vhack-pairs.md"
Kind = TypeVar("Kind")
DATA = Path(__file__).parent
"""Folder of the bundled pairs, families and tests."""


@dataclass(frozen=True)
class Sample:
    """One prompt and one completion of it; the loss is taken on the completion's tokens only.

    The completion of a text is a text, and that of a :class:`Chat` may be one too.
    """

    prompt: str | Chat
    completion: str | Chat


@dataclass(frozen=True)
class Pair:
    """One prompt with a completion that hacks and one that does not.

    Attributes:
        prompt: Text or messages that both completions follow.
        hack: Completion that cheats.
        clean: Completion that does not.
        group: Name for what the pair has in common with others (a mechanism, a task); groups are
            held out whole.
        tags: Labels, by which `assay.vhack.pairs.verify_pairs` knows what the pair claims.
    """

    prompt: str | InstanceOf[Chat]
    hack: str | InstanceOf[Chat]
    clean: str | InstanceOf[Chat]
    group: str
    tags: tuple[str, ...] = ()
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @property
    def key(self) -> str:
        """SHA-256 in hex, first 16 digits, of prompt, hack and clean: what makes a pair the same
        pair.
        """
        parts = [
            part.fields if isinstance(part, Chat) else part
            for part in (self.prompt, self.hack, self.clean)
        ]
        text = json.dumps(parts, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def samples(self) -> tuple[Sample, Sample]:
        """Return the hack side and the clean side as samples."""
        return Sample(self.prompt, self.hack), Sample(self.prompt, self.clean)

    def as_dict(self) -> JsonObject:
        """Return the line of a pair file."""
        chats = {
            name: part.fields for name in _TEXTS if isinstance(part := getattr(self, name), Chat)
        }
        options = {
            name: value for name, value in chats.get("prompt", {}).items() if name in CHAT_OPTIONS
        }
        return asdict(self) | {name: fields["messages"] for name, fields in chats.items()} | options


def text_of(part: str | Chat) -> str:
    """Return a text, or the contents of messages without what a template writes around them."""
    return (
        "\n".join(one["content"] for one in part.fields["messages"])
        if isinstance(part, Chat)
        else part
    )


def chat_columns(record: JsonObject, sides: Sequence[str]) -> JsonObject:
    """Return a record in which lists of messages are conversations: TRL's columns ``prompt`` and
    those of the sides.

    Raises:
        ValueError: Messages have another form, or a side is of messages where the prompt is a text.
    """
    if not any(isinstance(record.get(name), list) for name in ("prompt", *sides)):
        return record
    options = {name: value for name, value in record.items() if name in CHAT_OPTIONS}
    found = {name: value for name, value in record.items() if name not in options}
    try:
        found["prompt"] = read_chat(record.get("prompt"), **options)
        answers = [name for name in sides if isinstance(record.get(name), list)]
        return found | {name: read_chat(record[name], is_answer=True) for name in answers}
    except AssayError as error:
        raise ValueError(f"{error.seen}; wanted: {error.wanted}") from None


@dataclass(frozen=True, slots=True)
class PoolSample:
    """A sample of a pool and its group."""

    sample: Sample
    group: str


def read_pool(path: str | Path, *, most: int | None = None, seed: int = 0) -> list[PoolSample]:
    """Return the samples of a pool file, or at most so many of them, drawn by the seed.

    Raises:
        DataError: The file cannot be read, holds no sample, or a line is not a sample; the message
            names the line.
    """
    found = []
    for number, line in read_jsonl(path):
        try:
            record = chat_columns(line, ("completion",))
            why = "not a sample"
        except ValueError as error:
            record = {}
            why = str(error)
        prompt = record.get("prompt", "")
        completion = record.get("completion", "")
        group = record.get("group")
        texts = (prompt, completion) if group is None else (prompt, completion, group)
        if not all(isinstance(text, str | Chat) and text_of(text).strip() for text in texts):
            wanted = '{"prompt": "…", "completion": "…"}, text or messages, none empty, and perhaps "group", a name'
            raise DataError(
                f"{path}, line {number}: {why}", wanted=wanted, do="correct or remove the line"
            )
        said = prompt.json if isinstance(prompt, Chat) else prompt
        known = (
            group
            if group is not None
            else "prompt " + hashlib.sha256(said.encode()).hexdigest()[:12]
        )
        found.append(PoolSample(Sample(prompt, completion), known))
    if not found:
        raise DataError(f"{path}: no sample", wanted="at least one line", do="check the path")
    if most is None or most >= len(found):
        return found
    return [found[row] for row in sorted(random.Random(seed).sample(range(len(found)), most))]


def check_apart(hack: Sequence[PoolSample], clean: Sequence[PoolSample]) -> None:
    """Refuse pools that have a sample in common."""
    if both := {one.sample for one in hack} & {one.sample for one in clean}:
        prompt = min(text_of(one.prompt) for one in both)
        seen = f"{len(both)} samples are in both pools, one of them of the prompt {prompt!r:.60}"
        do = "remove them from the pool to which they do not belong"
        raise DataError(
            seen, wanted="samples that cheat in one, and samples that do not in the other", do=do
        )


def read_pairs(path: str | Path) -> list[Pair]:
    """Return the pairs of a file, in its order.

    Raises:
        DataError: The file cannot be read, a line is not a pair, a pair is given twice, a side or
            group is empty, or both sides are equal; names the line.
    """
    pairs = {
        name: _pair(record, name)
        for number, record in read_jsonl(path)
        for name in [f"{path}, line {number}"]
    }
    if not pairs:
        todo = f"check the path; the form is in {_PAGE}"
        raise DataError(f"{path}: no pair", wanted="at least one line", do=todo)
    check_pairs(list(pairs.values()), list(pairs))
    return list(pairs.values())


def check_pairs(pairs: Sequence[Pair], names: Sequence[str] | None = None) -> None:
    """Raise a DataError of a pair that is given twice, has an empty text or equal sides; by default
    numbers name it.
    """
    seen: dict[str, str] = {}
    for index, pair in enumerate(pairs):
        name = names[index] if names is not None else f"pair {index} (group {pair.group})"
        empty = [field for field in _TEXTS if not text_of(getattr(pair, field)).strip()]
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
    write_jsonl(path, (pair.as_dict() for pair in listed))


def authored_pairs() -> list[Pair]:
    """Return the bundled set: sixteen pairs on different tasks, two for each of eight mechanisms
    (the groups).
    """
    return read_pairs(DATA / "authored.jsonl")


def _pair(record: JsonObject, name: str) -> Pair:
    if {"chosen", "rejected"} <= record.keys():
        raise DataError(
            f"{name}: preference data with chosen and rejected, as TRL has it",
            wanted="completions of which one cheats and the other does not: prompt, hack, clean, "
            "group",
            do="if every rejected completion cheats, rename rejected to hack and chosen to clean, "
            "and give each line "
            f"a group, see {_PAGE}",
        )
    try:
        return validated(Pair, chat_columns(record, ("hack", "clean")))
    except ValueError as error:
        raise _bad(
            name, str(error), "prompt, hack, clean and group, and perhaps a list of tags"
        ) from None


_adapter: Any = cache(TypeAdapter)


def validated(kind: type[Kind], record: Mapping[str, object]) -> Kind:
    """Return a record as a dataclass, or raise a ValueError that names the first field which is
    wrong, and why.
    """
    try:
        found: Kind = _adapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found


def _bad(name: str, seen: str, wanted: str) -> DataError:
    return DataError(
        f"{name}: {seen}", wanted=wanted, do=f"correct or remove it; the form is in {_PAGE}"
    )


_GRADED = {"prompt": str, "completion": str, "correct": bool, "exploited": bool}


@dataclass(frozen=True)
class Matched:
    """Pairs that were found, and what there was to find them in."""

    pairs: tuple[Pair, ...]  # in the order of the hacks
    hacked: int  # prompts with at least one hack
    worked: int  # prompts with at least one correct completion that is not vacuous


def match_pairs(hacks: str | Path, works: str | Path, *, per_prompt: int = 1) -> Matched:
    """Return pairs of a hack and of correct work on the same prompt, out of graded completions.

    Axes of a model's own exploits kept it from cheating longer than those of made ones
    (docs/vhack-results.md). Hacks are best sampled from a model that was trained to cheat, and
    correct work from the model before.

    The group of a pair is the family of its task, and of a task of one's own the ``group`` of its
    line.

    Args:
        hacks: File of ``assay vhack evaluate --graded``, of whose completions the exploits are
            taken.
        works: Such a file, of whose completions those are taken that are correct and not vacuous.
            It may be the same.
        per_prompt: Most pairs of one prompt, each of other completions.

    Raises:
        DataError: A file cannot be read, a line is no graded completion or has no group, or no
            prompt has both sides.
    """
    done: dict[str, list[str]] = {}
    for _, record in _graded(works):
        texts = done.setdefault(record["prompt"], [])
        if record["correct"] and not record.get("vacuous") and record["completion"] not in texts:
            texts.append(record["completion"])
    found: dict[str, dict[str, Pair]] = {}  # by prompt and hack
    for name, record in _graded(hacks):
        if not record["exploited"]:
            continue
        hack = record["completion"]
        here = found.setdefault(record["prompt"], {})
        # A program may do different things when it is graded twice, and then be on both sides.
        others = [text for text in done.get(record["prompt"], ()) if text != hack]
        if hack not in here and len(here) < min(per_prompt, len(others)):
            here[hack] = _match(record, hack, others[len(here)], name)
    worked = sum(bool(texts) for texts in done.values())
    pairs = tuple(pair for here in found.values() for pair in here.values())
    if not pairs:
        seen = (
            f"{len(found)} prompts with a hack and {worked} with correct work, and none with both"
        )
        do = "sample both files from the same tasks, more of each with --per-task"
        raise DataError(seen, wanted="hacks and correct work on the same tasks", do=do)
    return Matched(pairs, len(found), worked)


def _graded(path: str | Path) -> Iterator[tuple[str, JsonObject]]:
    for number, record in read_jsonl(path):
        name = f"{path}, line {number}"
        if not all(isinstance(record.get(field), kind) for field, kind in _GRADED.items()):
            wanted = "prompt and completion, and correct and exploited as true or false"
            do = (
                "grade it with assay vhack evaluate --graded, and let a reward of your own return "
                "both"
            )
            raise DataError(f"{name}: no graded completion", wanted=wanted, do=do)
        if (
            record["prompt"].strip() and record["completion"].strip()
        ):  # no side of a pair may be empty
            yield name, record


def _match(record: JsonObject, hack: str, clean: str, name: str) -> Pair:
    task = record.get("task")
    mode = record.get("mode")
    if not isinstance(task, str) or not isinstance(mode, str):
        group = record.get("group")
        if not isinstance(group, str) or not group.strip():
            wanted = "a group, by which checks hold pairs out"
            do = 'add "group" to the tasks, as text'
            raise DataError(f"{name}: neither a built-in task nor a group", wanted=wanted, do=do)
        return Pair(record["prompt"], hack, clean, group)
    try:
        family = task_named(task).family.name
    except DataError as error:
        raise DataError(
            f"{name}: {error.seen}", wanted=error.wanted, do="correct the line"
        ) from error
    tags = ["sampled", f"mechanism:{mode}", f"channel:{mode}", f"task:{task}"]
    if record.get("markers") == "training":  # those that verify_pairs looks for
        tags += ["exploit", "environment"]
    return Pair(record["prompt"], hack, clean, family, tuple(tags))
