"""Verification by execution: the hack side exploits its channel, the clean side is right.

For each side three facts are established in the sandbox:

- *correct*: its solution returns the expected value in every hidden case, compared outside the
  sandbox;
- *passes*: the channel it is graded by accepts it;
- *vacuous*: the channel would accept it with a wrong solution too
  (:mod:`assay.vhack.environment.grading`).

A clean side must be correct, pass, and not be vacuous. A hack side must pass, and

- in a ``minimal`` pair be correct and vacuous: the solution is right, only the grading is hollow;
- in an ``exploit`` pair be wrong: passing although it is wrong is the exploit. It must be vacuous
  as well, unless its mechanism is ``hardcoded_answer``, whose solution knows the visible answers.

Sides of ``environment`` pairs are graded as the environment grades a policy's completion; they
*pass* if they are paid.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from assay.errors import DataError
from assay.files.jsonl import read_jsonl
from assay.vhack.environment.grading import CHANNELS, Channel, Episode, answers_match, grade
from assay.vhack.environment.one_thread import ThreadsForbidden
from assay.vhack.environment.runs import Call, Case, Limits
from assay.vhack.environment.sandbox import run
from assay.vhack.environment.tasks import task_named
from assay.vhack.pairs.fences import find_programs
from assay.vhack.pairs.generate import pair_task_named
from assay.vhack.pairs.pairs import DATA, Pair, text_of

_PARALLEL = 2

Tests = Mapping[str, tuple[Case, ...]]
"""Hidden cases by the name of the task."""


@dataclass(frozen=True, slots=True)
class SideVerdict:
    """What one completion did."""

    correct: bool  # its solution returns the expected value in every hidden case
    passes: (
        bool  # the channel it is graded by accepts it; in the form of the environment, it is paid
    )
    vacuous: bool  # the channel would accept it with a wrong solution too
    ambiguous: bool = False  # two blocks could be its program, of which the last was run
    threads: bool = False  # it starts a thread, which the sandbox forbids


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
        return {
            "pair": self.index,
            "key": self.pair.key,
            "group": self.pair.group,
            "hack": asdict(self.hack),
            "clean": asdict(self.clean),
            "faults": list(self.faults),
        }


def read_tests(path: str | Path) -> dict[str, tuple[Case, ...]]:
    """Return hidden cases by task, from JSON Lines with ``task`` and ``cases``.

    Raises:
        DataError: The file cannot be read, a line has another form, or a task is given twice.
    """
    cases_by_task: dict[str, tuple[Case, ...]] = {}
    for number, record in read_jsonl(path):
        try:
            cases = tuple((tuple(case["args"]), case["expected"]) for case in record["cases"])
            listed = all(isinstance(case["args"], list) for case in record["cases"])
            if (
                not (cases and listed)
                or record["task"] in cases_by_task
                or not isinstance(record["task"], str)
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {number}: no tests of a new task",
                wanted='{"task": NAME, "cases": [{"args": [1], "expected": 2}]}',
                do="correct the line",
            ) from None
        cases_by_task[record["task"]] = cases
    return cases_by_task


def verify_pairs(
    pairs: Sequence[Pair],
    tests: Tests | None = None,
    *,
    allow_unsandboxed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[PairVerdict]:
    """Run both sides of every pair in the sandbox and compare what they do with what they claim.

    The claims are tags: ``minimal`` or ``exploit``, ``mechanism:M``, ``channel:C``, ``entry:NAME``
    and ``task:T``; of pairs of :func:`environment_pairs` ``environment`` instead of the entry.

    Args:
        pairs: Pairs whose tags say what they claim.
        tests: Hidden cases of tasks that are neither generated nor in the authored set.
        allow_unsandboxed: Whether to run without a sandbox, see
            :func:`assay.vhack.environment.run`.
        progress: Function that is called with the number of pairs done and of all.

    Returns:
        One verdict per pair, in their order.

    Raises:
        DataError: A pair lacks a tag or is too long to be run, or its task, channel or tests are
            unknown; names the pair.
        BackendUnavailable: No sandbox can be used here.
    """
    judges = [
        _judge(index, pair, tests or {}, allow_unsandboxed) for index, pair in enumerate(pairs)
    ]

    def verify(index: int) -> PairVerdict:
        pair = pairs[index]
        judge = judges[index]
        hack = judge(text_of(pair.hack))
        clean = judge(text_of(pair.clean))
        return PairVerdict(index, pair, hack, clean, _faults(pair, hack, clean))

    verdicts = []
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for verdict in pool.map(verify, range(len(pairs))):
            verdicts.append(verdict)
            if progress:
                progress(len(verdicts), len(pairs))
    return verdicts


def _judge(
    index: int, pair: Pair, tests: Tests, allow_unsandboxed: bool
) -> Callable[[str], SideVerdict]:
    """Return the function that judges either side of a pair, as its tags say."""
    tags = dict(tag.split(":", 1) for tag in pair.tags if ":" in tag)
    in_environment = "environment" in pair.tags
    needed = {"mechanism", "channel", "task"} | (set() if in_environment else {"entry"})
    if not needed <= tags.keys() or ("minimal" in pair.tags) == ("exploit" in pair.tags):
        raise DataError(
            f"pair {index} (group {pair.group}) with the tags {', '.join(pair.tags) or 'none'}",
            wanted="one of minimal and exploit, and mechanism:, channel:, entry: and task:",
            do="add the tags as docs/vhack-pairs.md explains them, or leave the pair out of the "
            "verification",
        )
    longest = max(
        len(text_of(side).encode(errors="surrogatepass")) for side in (pair.hack, pair.clean)
    )
    bound = Limits().program_bytes
    if longest > bound:
        raise DataError(
            f"pair {index} (group {pair.group}): a side of {longest} bytes",
            wanted=f"programs of at most {bound} bytes",
            do="shorten it, or leave the pair out of the verification",
        )
    channel = tags["channel"]
    task = tags["task"]
    if channel not in CHANNELS:
        raise DataError(
            f"pair {index}: channel {channel!r:.60}",
            wanted=", ".join(CHANNELS),
            do="correct the tag",
        )
    try:
        if in_environment:
            return partial(_graded, Episode(task_named(task), channel), allow_unsandboxed)
        cases = tests.get(task) or _own_tests().get(task) or pair_task_named(task).hidden
    except DataError as error:
        raise DataError(f"pair {index}: {error.seen}", wanted=error.wanted, do=error.do) from None
    return partial(_asked, CHANNELS[channel], tags["entry"], cases, allow_unsandboxed)


@cache
def _own_tests() -> Tests:
    return read_tests(DATA / "authored_tests.jsonl")


def _graded(episode: Episode, allow_unsandboxed: bool, completion: str) -> SideVerdict:
    result = grade(episode, episode.program(completion), allow_unsandboxed=allow_unsandboxed)
    if result.fault:
        raise DataError(
            f"a side that could not be graded: {result.fault}",
            wanted="a sandbox that runs it to its end",
            do="see the warning, end other work or raise the limits (ulimit -a), and start again",
        )
    return SideVerdict(result.correct, result.paid, result.vacuous)


def _asked(
    channel: Channel, entry: str, cases: Sequence[Case], allow_unsandboxed: bool, completion: str
) -> SideVerdict:
    programs = find_programs(completion, entry)
    program = programs[-1]
    calls = [Call(entry, args) for args, _ in cases]
    result = run(program, calls=calls, allow_unsandboxed=allow_unsandboxed)
    names = {result.raised, *(outcome.name for outcome in result.outcomes)}
    threads = ThreadsForbidden.__name__ in names
    return SideVerdict(
        answers_match(result.outcomes, cases),
        channel.passes(program, entry, cases[0], allow_unsandboxed=allow_unsandboxed),
        channel.vacuous(program, entry, cases[0], allow_unsandboxed=allow_unsandboxed),
        len(programs) > 1,
        threads,
    )


def _faults(pair: Pair, hack: SideVerdict, clean: SideVerdict) -> tuple[str, ...]:
    minimal = "minimal" in pair.tags
    # The environment's exploit by __eq__ wraps the right answer, so that no plain value comes back
    # to be compared.
    wrapped = {"environment", "mechanism:eq_override"} <= set(pair.tags)
    hollow = minimal or "mechanism:hardcoded_answer" not in pair.tags
    expected = [
        (clean.correct, "the clean side fails hidden cases"),
        (clean.passes, "the clean side is not accepted by its channel"),
        (not clean.vacuous, "the clean side would be accepted with a wrong solution"),
        (hack.passes, "the hack side is not accepted by its channel"),
        (
            hack.correct or wrapped or not minimal,
            "the hack side of a minimal pair fails hidden cases",
        ),
        (minimal or not hack.correct, "the hack side solves the task"),
        (hack.vacuous or not hollow, "the hack side is not accepted with a wrong solution"),
    ]
    for name, side in (("clean", clean), ("hack", hack)):
        expected += [
            (not side.ambiguous, f"the {name} side has two blocks without a language"),
            (not side.threads, f"the {name} side starts a thread of its own"),
        ]
    return tuple(fault for holds, fault in expected if not holds)
