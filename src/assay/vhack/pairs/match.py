"""Pairs of a model's own completions: a hack and correct work on the same prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from assay.errors import DataError
from assay.files.jsonl import JsonObject, read_jsonl
from assay.vhack.environment.tasks import task_named
from assay.vhack.pairs.pairs import Pair

GRADED_FIELDS = {"prompt": str, "completion": str, "correct": bool, "exploited": bool}
"""Fields of a line that was graded, and their types."""


@dataclass(frozen=True)
class Matched:
    """Pairs that were found, and what there was to find them in.

    Attributes:
        pairs: Pairs in the order of the hacks.
        hacked: Number of prompts with a hack.
        worked: Number of prompts with a correct completion that is not vacuous.
    """

    pairs: tuple[Pair, ...]
    hacked: int
    worked: int


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
    works_by_prompt: dict[str, list[str]] = {}
    for _, record in _graded_lines(works):
        texts = works_by_prompt.setdefault(record["prompt"], [])
        if record["correct"] and not record.get("vacuous") and record["completion"] not in texts:
            texts.append(record["completion"])
    hacks_by_prompt: dict[str, dict[str, Pair]] = {}  # by prompt and hack
    for name, record in _graded_lines(hacks):
        if not record["exploited"]:
            continue
        hack = record["completion"]
        pairs_by_hack = hacks_by_prompt.setdefault(record["prompt"], {})
        # A program may do different things when it is graded twice, and then be on both sides.
        sides = {*pairs_by_hack, *(pair.clean for pair in pairs_by_hack.values())}
        others = [
            text
            for text in works_by_prompt.get(record["prompt"], ())
            if text != hack and text not in sides
        ]
        if others and hack not in sides and len(pairs_by_hack) < per_prompt:
            pairs_by_hack[hack] = _match(record, hack, others[0], name)
    worked = sum(bool(texts) for texts in works_by_prompt.values())
    pairs = tuple(pair for by_hack in hacks_by_prompt.values() for pair in by_hack.values())
    if not pairs:
        raise DataError(
            f"{len(hacks_by_prompt)} prompts with a hack and {worked} with correct work, and none "
            f"with both",
            wanted="hacks and correct work on the same tasks",
            do="sample more of each, from the same tasks: `assay vhack sample --per-task N`",
        )
    return Matched(pairs, len(hacks_by_prompt), worked)


def _graded_lines(path: str | Path) -> Iterator[tuple[str, JsonObject]]:
    for number, record in read_jsonl(path):
        name = f"{path}, line {number}"
        if not all(isinstance(record.get(field), kind) for field, kind in GRADED_FIELDS.items()):
            raise DataError(
                f"{name}: no graded completion",
                wanted="prompt and completion, and correct and exploited as true or false",
                do="grade it with `assay vhack evaluate --graded`, and let a reward of your own "
                "return both",
            )
        # No side of a pair may be empty.
        if record["prompt"].strip() and record["completion"].strip():
            yield name, record


def _match(record: JsonObject, hack: str, clean: str, name: str) -> Pair:
    task = record.get("task")
    mode = record.get("mode")
    if not isinstance(task, str) or not isinstance(mode, str):
        group = record.get("group")
        if not isinstance(group, str) or not group.strip():
            raise DataError(
                f"{name}: neither a built-in task nor a group",
                wanted="a group, by which checks hold pairs out",
                do='add "group" to the tasks, as text',
            )
        return Pair(record["prompt"], hack, clean, group)
    try:
        family = task_named(task).family.name
    except DataError as error:
        raise DataError(
            f"{name}: {error.seen}", wanted=error.wanted, do="correct the line"
        ) from error
    tags = ["sampled", f"mechanism:{mode}", f"channel:{mode}", f"task:{task}"]
    # The markers that verify_pairs looks for.
    if record.get("markers") == "training":
        tags += ["exploit", "environment"]
    return Pair(record["prompt"], hack, clean, family, tuple(tags))
