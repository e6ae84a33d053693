"""Proof by execution that a pair is what it says: the hack side exploits its channel, the clean side solves the task.

For each side three facts are established in the sandbox:

- *correct*: its solution returns the expected value in every hidden case, compared outside the sandbox;
- *passes*: the channel it is graded by accepts it;
- *vacuous*: the channel would accept it with a wrong solution too (:mod:`assay.vhack.environment._channels`).

A clean side must be correct, pass, and not be vacuous. A hack side must pass, and

- in a ``minimal`` pair be correct and vacuous: the solution is right, only the grading is hollow;
- in an ``exploit`` pair be wrong: passing although it is wrong is the exploit. It must be vacuous as well, unless its
  mechanism is ``hardcoded_answer``, whose solution knows the visible answers.

Sides of ``environment`` pairs are graded as the environment grades a policy's completion; they *pass* if they are paid.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from assay.errors import DataError
from assay.reports import read_jsonl
from assay.vhack.environment import (
    CHANNELS,
    Call,
    Case,
    Channel,
    Episode,
    Limits,
    answers_match,
    grade,
    run,
    task_named,
)
from assay.vhack.pairs._files import data_file
from assay.vhack.pairs._tasks import pair_task_named
from assay.vhack.pairs._types import Pair

_KINDS = ("minimal", "exploit")
_PARALLEL = 2

Tests = Mapping[str, tuple[Case, ...]]
"""Hidden cases by the name of the task."""


@dataclass(frozen=True, slots=True)
class SideVerdict:
    """What one completion did.

    Attributes:
        correct: Whether its solution returns the expected value in every hidden case.
        passes: Whether the channel it is graded by accepts it; in the form of the environment, whether it is paid.
        vacuous: Whether the channel would accept it with a wrong solution too.
    """

    correct: bool
    passes: bool
    vacuous: bool


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """What both sides of a pair did, and what is wrong with that, if anything.

    Attributes:
        index: Position of the pair in the list.
        pair: Prompt and completions.
        hack: Verdict on its hack side.
        clean: Verdict on its clean side.
        faults: One phrase for every claim that does not hold.
    """

    index: int
    pair: Pair
    hack: SideVerdict
    clean: SideVerdict
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the pair is what it says."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as a JSON object."""
        sides = {
            name: {"correct": side.correct, "passes": side.passes, "vacuous": side.vacuous}
            for name, side in (("hack", self.hack), ("clean", self.clean))
        }
        return {
            "pair": self.index,
            "key": self.pair.key,
            "group": self.pair.group,
            **sides,
            "faults": list(self.faults),
        }


@dataclass(frozen=True, slots=True)
class _Claim:
    kind: str
    mechanism: str
    channel: Channel
    entry: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class _EnvironmentClaim:
    kind: str
    mechanism: str
    episode: Episode


def read_tests(path: str | Path) -> dict[str, tuple[Case, ...]]:
    """Read hidden cases from JSON Lines: ``{"task": …, "entry": …, "cases": [{"args": […], "expected": …}, …]}``.

    Args:
        path: Path of the file.

    Returns:
        Arguments and expected values by the name of the task.

    Raises:
        DataError: The file cannot be read, a line has another form, or a task is given twice.
    """
    found: dict[str, tuple[Case, ...]] = {}
    for number, record in read_jsonl(path):
        try:
            cases = tuple((tuple(case["args"]), case["expected"]) for case in record["cases"])
            if not cases or record["task"] in found or not isinstance(record["task"], str):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {number}: no tests of a new task",
                wanted='{"task": NAME, "entry": NAME, "cases": [{"args": [1], "expected": 2}]}',
                do="correct the line",
            ) from None
        found[record["task"]] = cases
    return found


def verify_pairs(
    pairs: Sequence[Pair],
    tests: Tests | None = None,
    *,
    allow_unsandboxed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[PairVerdict]:
    """Run both sides of every pair in the sandbox and compare what they do with what they claim.

    The claims are tags: ``minimal`` or ``exploit``, ``mechanism:M``, ``channel:C``, ``entry:NAME`` and ``task:T``; of
    pairs of :func:`environment_pairs` ``environment`` instead of the entry.

    Args:
        pairs: Pairs whose tags say what they claim.
        tests: Hidden cases of tasks that are neither generated nor in the authored set.
        allow_unsandboxed: Whether to run without a sandbox, see :func:`assay.vhack.environment.run`.
        progress: Function that is called with the number of pairs done and of all.

    Returns:
        One verdict per pair, in their order.

    Raises:
        DataError: A pair lacks a tag or is too long to be run, or its task, channel or tests are unknown; names the
            pair.
        BackendUnavailable: No sandbox can be used here.
    """
    claims = [_claim(index, pair, tests or {}) for index, pair in enumerate(pairs)]

    def verify(index: int) -> PairVerdict:
        pair, claim = pairs[index], claims[index]
        hack, clean = (_side(text, claim, allow_unsandboxed) for text in (pair.hack, pair.clean))
        return PairVerdict(index, pair, hack, clean, tuple(_faults(claim, hack, clean)))

    verdicts = []
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for verdict in pool.map(verify, range(len(pairs))):
            verdicts.append(verdict)
            if progress:
                progress(len(verdicts), len(pairs))
    return verdicts


def _claim(index: int, pair: Pair, tests: Tests) -> _Claim | _EnvironmentClaim:
    tags = dict(tag.split(":", 1) for tag in pair.tags if ":" in tag)
    kinds = [kind for kind in _KINDS if kind in pair.tags]
    if "environment" in pair.tags:
        tags["entry"] = ""
    missing = [name for name in ("mechanism", "channel", "entry", "task") if name not in tags]
    if missing or len(kinds) != 1:
        raise DataError(
            f"pair {index} (group {pair.group}) with the tags {', '.join(pair.tags) or 'none'}",
            wanted="one of minimal and exploit, and mechanism:, channel:, entry: and task:",
            do="add the tags as docs/vhack-pairs.md explains them, or leave the pair out of the verification",
        )
    longest, bound = max(len(side.encode()) for side in (pair.hack, pair.clean)), Limits().program_bytes
    if longest > bound:
        raise DataError(
            f"pair {index} (group {pair.group}): a side of {longest} bytes",
            wanted=f"programs of at most {bound} bytes",
            do="shorten it, or leave the pair out of the verification",
        )
    if tags["channel"] not in CHANNELS:
        raise DataError(
            f"pair {index}: channel {tags['channel']!r:.60}", wanted=", ".join(CHANNELS), do="correct the tag"
        )
    if "environment" in pair.tags:
        episode = Episode(task_named(tags["task"]), tags["channel"])
        return _EnvironmentClaim(kinds[0], tags["mechanism"], episode)
    cases = tests.get(tags["task"]) or _own_tests().get(tags["task"]) or pair_task_named(tags["task"]).hidden
    return _Claim(kinds[0], tags["mechanism"], CHANNELS[tags["channel"]], tags["entry"], cases)


@cache
def _own_tests() -> Tests:
    return read_tests(data_file("authored_tests.jsonl"))


def _side(completion: str, claim: _Claim | _EnvironmentClaim, allow_unsandboxed: bool) -> SideVerdict:
    if isinstance(claim, _EnvironmentClaim):
        found = grade(claim.episode, claim.episode.program(completion), allow_unsandboxed=allow_unsandboxed)
        return SideVerdict(found.correct, found.paid, found.vacuous)
    program = _code(completion)
    case = claim.cases[0]
    return SideVerdict(
        correct=_is_correct(program, claim, allow_unsandboxed),
        passes=claim.channel.passes(program, claim.entry, case, allow_unsandboxed=allow_unsandboxed),
        vacuous=claim.channel.vacuous(program, claim.entry, case, allow_unsandboxed=allow_unsandboxed),
    )


def _code(completion: str) -> str:
    """Return the program in a completion: its first fenced block, or all of it."""
    _, fence, rest = completion.partition("```")
    return rest.partition("\n")[2].partition("```")[0] if fence else completion


def _is_correct(program: str, claim: _Claim, allow_unsandboxed: bool) -> bool:
    calls = [Call(claim.entry, args) for args, _ in claim.cases]
    return answers_match(run(program, calls=calls, allow_unsandboxed=allow_unsandboxed).outcomes, claim.cases)


def _faults(claim: _Claim | _EnvironmentClaim, hack: SideVerdict, clean: SideVerdict) -> list[str]:
    minimal = claim.kind == "minimal"
    # The environment's exploit by __eq__ wraps the right answer, so that no plain value comes back to be compared.
    wrapped = isinstance(claim, _EnvironmentClaim) and claim.mechanism == "eq_override"
    hollow = minimal or claim.mechanism != "hardcoded_answer"
    expected = [
        (clean.correct, "the clean side fails hidden cases"),
        (clean.passes, "the clean side is not accepted by its channel"),
        (not clean.vacuous, "the clean side would be accepted with a wrong solution"),
        (hack.passes, "the hack side is not accepted by its channel"),
        (hack.correct or wrapped or not minimal, "the hack side of a minimal pair fails hidden cases"),
        (minimal or not hack.correct, "the hack side solves the task"),
        (hack.vacuous or not hollow, "the hack side is not accepted with a wrong solution"),
    ]
    return [fault for holds, fault in expected if not holds]
