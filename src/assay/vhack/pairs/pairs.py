"""Samples, pairs and pair files: JSON Lines, as docs/vhack-pairs.md explains."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, Field, InstanceOf, TypeAdapter, ValidationError

from assay.errors import AssayError, DataError
from assay.files.jsonl import JsonObject, read_jsonl
from assay.files.names import normal_form
from assay.files.storage import write_jsonl
from assay.models.chat import CHAT_OPTIONS, Chat, read_chat

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
    group: Annotated[str, AfterValidator(normal_form)]
    tags: Annotated[tuple[str, ...], Field(fail_fast=True)] = ()
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @property
    def key(self) -> str:
        """Identity of the pair: first 16 hex digits of the SHA-256 of prompt, hack and clean."""
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
    """Return a text, or the contents and tool calls of messages without what a template adds."""
    if isinstance(part, str):
        return part
    texts: list[str] = []
    for message in part.fields["messages"]:
        calls = [json.dumps(call) for call in message.get("tool_calls", ())]
        # A message of calls alone has an empty content.
        texts += [message["content"], *calls] if message["content"] or not calls else calls
    return "\n".join(texts)


def chat_columns(record: JsonObject, sides: Sequence[str]) -> JsonObject:
    """Return a record with lists of messages as conversations: prompt and sides, as in TRL.

    Raises:
        ValueError: Messages have another form, or a side is of messages where the prompt is a text.
    """
    if not any(isinstance(record.get(name), list) for name in ("prompt", *sides)):
        return record
    options = {name: value for name, value in record.items() if name in CHAT_OPTIONS}
    columns = {name: value for name, value in record.items() if name not in options}
    try:
        columns["prompt"] = read_chat(record.get("prompt"), **options)
        answers = [name for name in sides if isinstance(record.get(name), list)]
        return columns | {name: read_chat(record[name], is_answer=True) for name in answers}
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
    samples = read_each(path, _pool_sample, what="sample")
    if most is None or most >= len(samples):
        return samples
    return [samples[row] for row in sorted(random.Random(seed).sample(range(len(samples)), most))]


def _pool_sample(line: JsonObject, name: str) -> PoolSample:
    """Return a line's sample, in the group that it names or in one of its prompt."""
    try:
        record = chat_columns(line, ("completion",))
        why = "not a sample"
    except ValueError as error:
        record = {}
        why = str(error)
    prompt = record.get("prompt", "")
    completion = record.get("completion", "")
    prompt_text = str(prompt.json if isinstance(prompt, Chat) else prompt)
    own_group = "prompt " + hashlib.sha256(prompt_text.encode()).hexdigest()[:12]
    group = own_group if record.get("group") is None else record["group"]
    texts = (prompt, completion, group)
    if not all(isinstance(text, str | Chat) and text_of(text).strip() for text in texts):
        raise DataError(
            f"{name}: {why}",
            wanted='{"prompt": "…", "completion": "…"}, text or messages, none empty, and '
            'perhaps "group", a name',
            do="correct or remove the line",
        )
    return PoolSample(Sample(prompt, completion), normal_form(group))


def check_apart(hack: Sequence[PoolSample], clean: Sequence[PoolSample]) -> None:
    """Refuse pools that have a sample in common."""
    shared = {member.sample for member in hack} & {member.sample for member in clean}
    if shared:
        prompt = min(text_of(sample.prompt) for sample in shared)
        raise DataError(
            f"{len(shared)} samples are in both pools, one of them of the prompt {prompt!r:.60}",
            wanted="samples that cheat in one, and samples that do not in the other",
            do="remove them from the pool to which they do not belong",
        )


def read_pairs(path: str | Path) -> list[Pair]:
    """Return the pairs of a file, in its order.

    Raises:
        DataError: The file cannot be read, a line is not a pair, a pair is given twice, a side or
            group is empty, or both sides are equal; names the line.
    """
    named_pairs = read_each(path, lambda record, name: (name, _pair(record, name)), what="pair")
    pairs = [pair for _, pair in named_pairs]
    check_pairs(pairs, [name for name, _ in named_pairs])
    return pairs


def pair_names(pairs: Sequence[Pair], names: Sequence[str] | None = None) -> list[str]:
    """Return the name of each pair in errors; refuse a pair that occurs twice."""
    listed = _listed_names(pairs, names)
    names_by_key: dict[str, str] = {}
    for pair, name in zip(pairs, listed, strict=True):
        if (first := names_by_key.setdefault(pair.key, name)) != name:
            raise _bad(name, f"the same pair as {first}", "each pair once")
    return listed


def _listed_names(pairs: Sequence[Pair], names: Sequence[str] | None) -> list[str]:
    numbered = [f"pair {index} (group {pair.group!r})" for index, pair in enumerate(pairs)]
    return numbered if names is None else list(names)


def check_pairs(pairs: Sequence[Pair], names: Sequence[str] | None = None) -> None:
    """Refuse a pair that occurs twice, has an empty text or equal sides.

    ``names`` are those of the pairs in errors, by default their numbers.
    """
    for pair, name in zip(pairs, _listed_names(pairs, names), strict=True):
        empty = [field for field in _TEXTS if not text_of(getattr(pair, field)).strip()]
        if empty:
            raise _bad(name, f"{' and '.join(empty)} empty", "text in every field")
        if pair.hack == pair.clean:
            raise _bad(name, "hack and clean are the same text", "two different completions")
    pair_names(pairs, names)


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
    """Return the bundled set: sixteen pairs, two for each of eight mechanisms (the groups)."""
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


def read_each(
    path: str | Path, read: Callable[[JsonObject, str], Kind], *, what: str
) -> list[Kind]:
    """Return what each line of a file is, by a function of its object and its name in errors.

    Raises:
        DataError: The file cannot be read or has no line of ``what``.
    """
    values = [read(record, f"{path}, line {number}") for number, record in read_jsonl(path)]
    if not values:
        raise DataError(
            f"{path}: no {what}",
            wanted="at least one line",
            do="check the path",
        )
    return values


_adapter: Any = cache(TypeAdapter)


def validated(kind: type[Kind], record: Mapping[str, object]) -> Kind:
    """Return a record as a dataclass; a ValueError names the first bad field, and why."""
    try:
        instance: Kind = _adapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return instance


def _bad(name: str, seen: str, wanted: str) -> DataError:
    return DataError(
        f"{name}: {seen}", wanted=wanted, do=f"correct or remove it; the form is in {_PAGE}"
    )
