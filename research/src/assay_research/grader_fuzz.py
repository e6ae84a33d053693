"""Attack a grader of one's own before a policy does: which completions without work are paid?

A grader is a Python function or a command. Every completion is graded in a process of its own with
a limit of time, for graders run programs in their own process, and some attacks end it.
"""

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import DataError, UsageError
from assay.files.jsonl import read_jsonl
from assay.vhack.training.rewards import read_grade
from assay_research.grader_attacks import ATTACKS, GraderAttack, Problem

_SHARE = 0.5  # of what the known solution is paid, from which on an attack is paid
_SHOWN = 400
_REFUSED = "refused"
_PAID = "paid"
_ENDED = "ended the grader"
_HUNG = "hung the grader"
_RAISED = "raised in the grader"
_NO_NUMBER = "returned no number"
_UNPAID = {
    _NO_NUMBER: "returns no finite number, which ends a step of training: pay 0",
    _RAISED: "raises an exception, which ends a step of training: catch it, and pay 0",
    _HUNG: "has no answer within the time: bound it",
    _ENDED: "is ended by the completion: run completions in another process",
}
"""What to say of attacks that were not paid, the mildest first."""

Grader = Callable[[Problem, str], tuple[str, float]]
"""Grades a completion: a reward with an empty text, or what happened in its place and 0."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack earned.

    Attributes:
        name: Name of the attack.
        tried: Number of completions.
        outcomes: How many were refused, paid, given no number, raised in the grader, ended or hung
            it.
        allows: What in the grader lets it through; empty where all were refused.
        example: The first completion that was paid, or not refused, cut.
        problem: Number of its problem.
    """

    name: str
    tried: int
    outcomes: dict[str, int]
    allows: str = ""
    example: str = ""
    problem: int | None = None

    @property
    def holds(self) -> bool:
        """Whether the grader refused all of it."""
        return self.outcomes.get(_REFUSED, 0) == self.tried


@dataclass(frozen=True)
class GraderReport:
    """What became of all attacks on a grader.

    Attributes:
        attacks: One result for each attack that applies.
        problems: Number of problems.
        seconds: Wall clock.
    """

    attacks: Sequence[AttackResult] = field(default_factory=tuple)
    problems: int = 0
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether nothing was paid, and nothing took the grader down."""
        return all(result.holds for result in self.attacks)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "holds": self.holds,
            "problems": self.problems,
            "seconds": round(self.seconds, 2),
            "attacks": [{**vars(result), "holds": result.holds} for result in self.attacks],
        }


def read_problems(path: str | Path) -> list[Problem]:
    """Return the problems of a file.

    Raises:
        DataError: It cannot be read, or a line has no prompt or no solution.
    """
    problems: list[Problem] = []
    for number, record in read_jsonl(path):
        if not all(isinstance(record.get(name), str) for name in ("prompt", "solution")):
            raise DataError(
                f"{path}, line {number}: no problem",
                wanted='{"prompt": "…", "solution": "a completion that is known to be right", …}',
                do="correct the line; other columns go to the grader",
            )
        problems.append(record)
    if not problems:
        raise DataError(f"{path}: no problem", wanted="at least one line", do="check the path")
    return problems


def attack_grader(
    grader: Grader,
    problems: Sequence[Problem],
    *,
    attacks: Sequence[GraderAttack] = ATTACKS,
    progress: Callable[[int, int], None] | None = None,
) -> GraderReport:
    """Grade the completions of every attack on every problem.

    An attack is paid from half of what the known solution earns.

    Raises:
        DataError: The grader does not pay a known solution.
    """
    started = time.monotonic()
    pays = []
    for number, problem in enumerate(problems):
        fault, reward = grader(problem, str(problem["solution"]))
        if fault or reward <= 0:
            raise DataError(
                f"problem {number}: the grader pays its known solution {reward:g}"
                + (f" ({fault})" if fault else ""),
                wanted="more than 0",
                do="correct the solution, or what the grader is given",
            )
        pays.append(reward)
    results = []
    for index, attack in enumerate(attacks):
        results += _try_attack(grader, attack, problems, pays)
        if progress:
            progress(index + 1, len(attacks))
    return GraderReport(results, len(problems), time.monotonic() - started)


def _try_attack(
    grader: Grader, attack: GraderAttack, problems: Sequence[Problem], pays: Sequence[float]
) -> list[AttackResult]:
    """Return the result of an attack, or none where it has no completion."""
    outcomes: dict[str, int] = {}
    first: dict[str, Any] = {}
    finding = _REFUSED
    for number, (problem, pay) in enumerate(zip(problems, pays, strict=True)):
        for completion in attack.completions(problem):
            fault, reward = grader(problem, completion)
            outcome = fault or (_PAID if reward >= _SHARE * pay else _REFUSED)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            # What was paid says more than what raised an exception.
            if outcome == _PAID != finding or (outcome != _REFUSED and not first):
                finding = outcome
                first = {"example": completion[:_SHOWN], "problem": number}
    tried = sum(outcomes.values())
    unpaid = [words for outcome, words in _UNPAID.items() if outcome in outcomes]
    allows = attack.allows if _PAID in outcomes else "".join(unpaid[-1:])
    return [AttackResult(attack.name, tried, outcomes, allows, **first)] if tried else []


class _ApartGrader:
    """A grader in a process of its own, which ends whatever a completion has started."""

    def __init__(self, *function: str, seconds: float) -> None:
        self.seconds = seconds
        # A command does not need the working directory, whose files may have names of modules.
        flags = [] if function else ["-P"]
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-m", "assay_research.grader_child", str(seconds), *function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._imported = self._answer(None)

    def _grade(self, *job: Any) -> tuple[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(job) + "\n").encode(errors="surrogatepass"))
        self._process.stdin.flush()
        reply = self._answer(2 * self.seconds + 10)
        if "reward" in reply:
            with suppress(DataError):
                return "", read_grade(reply["reward"]).reward
            return _NO_NUMBER, 0.0
        if "raised" in reply:
            return _RAISED, 0.0
        return (_HUNG if reply.get("hung") else _ENDED), 0.0

    def _answer(self, seconds: float | None) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return {"hung": True}
        line = self._process.stdout.readline()
        return dict(json.loads(line)) if line else {}

    def close(self) -> None:
        """End the process."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class FunctionGrader(_ApartGrader):
    """A grader that is ``module:function``, in a process of its own for each completion.

    The function has TRL's form, ``(prompts, completions, **columns)``, or takes a problem and a
    completion. It returns a number, a boolean, or a mapping with ``reward``.

    Args:
        where: ``module:function``, importable from the working directory.
        seconds: Limit of time for one completion.
    """

    def __init__(self, where: str, *, seconds: float) -> None:
        super().__init__(where, seconds=seconds)
        if "imported" not in self._imported:
            self.close()
            raise UsageError(
                f"--reward {where}: {self._imported.get('error', 'the import ended the process')}",
                wanted="module:function that can be imported from here",
                do=f"try python -c 'import {where.partition(':')[0]}'",
            )

    def __call__(self, problem: Problem, completion: str) -> tuple[str, float]:
        """Return the reward of a completion, or what happened in its place."""
        return self._grade(dict(problem), completion)


class CommandGrader(_ApartGrader):
    """A grader that is a command, run once for each completion.

    ``{completion}`` and ``{problem}`` in it stand for files: the completion, and the problem as
    JSON. Its last word is the reward where it is a number; otherwise exit code 0 is a pass.

    Args:
        command: Command line.
        seconds: Limit of time for one completion.
    """

    def __init__(self, command: str, *, seconds: float) -> None:
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise UsageError(
                f"--grader {command}: {error}",
                wanted="a command as a shell reads it",
                do="close its quotes",
            ) from None
        if not any("{completion}" in word for word in self.words):
            raise UsageError(
                f"--grader {command}",
                wanted="a command with {completion}, the file to grade",
                do="name it, as in 'python grade.py {completion} {problem}'",
            )
        if shutil.which(self.words[0]) is None:
            raise UsageError(
                f"--grader {command}: there is no command {self.words[0]}",
                wanted="a command that can be run from here",
                do="correct its name, or give its path",
            )
        super().__init__(seconds=seconds)

    def __call__(self, problem: Problem, completion: str) -> tuple[str, float]:
        """Return the reward of a completion, or what happened in its place."""
        with tempfile.TemporaryDirectory() as folder:
            places = {"completion": f"{folder}/completion.txt", "problem": f"{folder}/problem.json"}
            Path(places["completion"]).write_text(completion, "utf-8", errors="replace")
            Path(places["problem"]).write_text(json.dumps(dict(problem)), "utf-8")
            words = list(self.words)
            for name, place in places.items():
                words = [word.replace(f"{{{name}}}", place) for word in words]
            return self._grade(words, f"{folder}/output.txt")
