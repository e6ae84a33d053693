"""Programming tasks without end: chains of steps with a solution, visible examples and hidden cases.

A task is named ``family/difficulty/seed``, and everything about it follows from its name, on every machine. The
difficulty is the number of steps. No step is idle: leaving any one out changes an answer among the visible examples
and another among the hidden cases, so an attempt that forgets one is wrong in both.

Tasks of the evaluation are others than those of training: which of the two a task is for is decided by a hash of its
statement.
"""

import hashlib
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from assay.errors import DataError, UsageError
from assay.reports import dumps
from assay.vhack.environment._steps import FAMILIES, Family, Step, filled
from assay.vhack.environment._types import Case

ENTRY = "solve"
SPLITS = ("training", "evaluation")
HARDEST = 6
N_VISIBLE = 3
N_HIDDEN = 8
_EVALUATION_SHARE = 8  # one task in so many is kept for the evaluation
_TRIES = 300
_DRAWS = 120  # of arguments, for one chain
_MOST_REPEATS = 600  # draws in a row that give nothing new
_LONGEST = 400  # characters of an answer


@dataclass(frozen=True)
class Task:
    """One task: a chain of steps with examples and hidden cases. `task_named` and `tasks` make them."""

    family: Family
    difficulty: int
    seed: int

    @property
    def name(self) -> str:
        """``family/difficulty/seed``."""
        return f"{self.family.name}/{self.difficulty}/{self.seed}"

    @property
    def statement(self) -> str:
        """One sentence that says what is asked for, without its full stop."""
        chain = "; then ".join(says for says, _ in self.steps)
        return f"{ENTRY}(x) takes {self.family.subject} and does this to it: {chain}"

    @property
    def split(self) -> str:
        """``training`` or ``evaluation``."""
        digest = hashlib.sha256(self.statement.encode()).digest()
        return SPLITS[digest[0] % _EVALUATION_SHARE == 0]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps in order, each with what it says and its code."""
        return self._drawn[0]

    @property
    def visible(self) -> tuple[Case, ...]:
        """The examples that the prompt shows."""
        return self._drawn[1][:N_VISIBLE]

    @property
    def hidden(self) -> tuple[Case, ...]:
        """The cases that decide whether a solution is right."""
        return self._drawn[1][N_VISIBLE:]

    @property
    def examples(self) -> list[tuple[str, str]]:
        """Call and value of each visible example, as source."""
        return [(f"{ENTRY}({', '.join(map(repr, args))})", repr(value)) for args, value in self.visible]

    def source(self, leave_out: int | None = None) -> str:
        """Return the text of ``solve``; it is wrong if a step is left out."""
        return _source([step for index, step in enumerate(self.steps) if index != leave_out])

    def fresh(self, n: int, seed: int = 0) -> tuple[Case, ...]:
        """Return cases with arguments that are among neither the examples nor the hidden cases, at most ``n``."""
        rng, solve = random.Random(f"fresh {self.name} {seed}"), _compiled(self.steps)
        known = [args[0] for args, _ in self._drawn[1]]
        found: list[Case] = []
        for _ in range(_DRAWS):
            argument = self.family.draw(rng)
            if len(found) < n and argument not in known:
                known.append(argument)
                with suppress(ValueError, ArithmeticError, LookupError, TypeError):
                    found.append(((argument,), solve(argument)))
        return tuple(found)

    @cached_property
    def _drawn(self) -> tuple[tuple[Step, ...], tuple[Case, ...]]:
        for attempt in range(_TRIES):
            rng = random.Random(f"task {self.name} {attempt}")
            steps = _chain(self.family, self.difficulty, rng)
            cases = _cases(self.family, steps, rng)
            if cases is not None:
                return steps, cases
        raise AssertionError(f"{self.name} has no chain without an idle step")


def task_named(name: str) -> Task:
    """Return the task with this name.

    Raises:
        DataError: There is no such family, or difficulty and seed are not whole numbers in their range.
    """
    try:
        family, difficulty, seed = name.split("/")
        if not 1 <= int(difficulty) <= HARDEST or int(seed) < 0:
            raise ValueError
        return Task(FAMILIES[family], int(difficulty), int(seed))
    except (KeyError, ValueError):
        raise DataError(
            f"task {name!r:.80}", wanted=f"FAMILY/DIFFICULTY/SEED, difficulty 1 to {HARDEST}", do="correct the name"
        ) from None


def tasks(
    n: int,
    *,
    seed: int = 0,
    difficulty: int | tuple[int, int] = (1, 3),
    families: Sequence[str] | None = None,
    split: str = "training",
) -> list[Task]:
    """Return tasks that all differ; families take turns. A longer list begins with the shorter one of its seed.

    Args:
        n: Number of tasks.
        seed: Number that chooses them.
        difficulty: Number of steps, or its lowest and highest.
        families: Names in ``FAMILIES``; by default all.
        split: ``training`` or ``evaluation``; no statement is in both.

    Raises:
        UsageError: A name, split or difficulty is unknown, ``n`` is negative, or there are not so many tasks.
    """
    lowest, highest = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    chosen = list(FAMILIES) if families is None else list(families)
    _check(n, lowest, highest, chosen, split)
    found: dict[str, Task] = {}
    repeats = 0
    for index in count():
        if len(found) == n or repeats > _MOST_REPEATS:
            break
        rng = random.Random(f"tasks {seed} {index}")
        family = FAMILIES[chosen[index % len(chosen)]]
        task = Task(family, rng.randint(lowest, highest), rng.randrange(2**31))
        if task.split != split or task.statement in found:
            repeats += 1
        else:
            found[task.statement] = task
            repeats = 0
    if len(found) < n:
        raise UsageError(f"{n} tasks", wanted=f"at most {len(found)} of these kinds", do="allow more of them")
    return list(found.values())


def _check(n: int, lowest: int, highest: int, families: list[str], split: str) -> None:
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        seen = f"family {', '.join(unknown) or 'none'}"
        raise UsageError(seen, wanted=", ".join(FAMILIES), do="choose among these")
    if split not in SPLITS:
        raise UsageError(f"split {split!r}", wanted=" or ".join(SPLITS), do="choose one of them")
    if n < 0 or not 1 <= lowest <= highest <= HARDEST:
        seen = f"{n} tasks of difficulty {lowest} to {highest}"
        wanted = f"0 tasks or more, of difficulties LOW:HIGH from 1 to {HARDEST}"
        raise UsageError(seen, wanted=wanted, do="correct the number (--tasks) or --difficulty")


def _chain(family: Family, difficulty: int, rng: random.Random) -> tuple[Step, ...]:
    if family.last:
        drawn = [*rng.sample(family.steps, difficulty - 1), rng.choice(family.last)]
    else:
        drawn = rng.sample(family.steps, difficulty)
    return tuple(filled(step, rng) for step in drawn)


def _cases(family: Family, steps: tuple[Step, ...], rng: random.Random) -> tuple[Case, ...] | None:
    """Return visible examples and hidden cases, or None if a step is idle in either or the answers say too little."""
    solve = _compiled(steps)
    # The last step of some families changes the type; leaving it out needs no proof that it is not idle.
    partial = [_compiled(steps[:i] + steps[i + 1 :]) for i in range(len(steps) - bool(family.last))]
    found: list[Case] = []
    idle = [set(range(len(partial))), set(range(len(partial)))]
    for _ in range(_DRAWS):
        argument = family.draw(rng)
        part = len(found) >= N_VISIBLE
        try:
            answer = solve(argument)
            still = {i for i in idle[part] if dumps(partial[i](argument)) == dumps(answer)}
        except (ValueError, ArithmeticError, LookupError, TypeError):
            return None
        last = len(found) + 1 in (N_VISIBLE, N_VISIBLE + N_HIDDEN)
        repeated = any(argument == args[0] for args, _ in found)
        if repeated or len(dumps(answer)) > _LONGEST or (last and still):
            continue
        idle[part] = still
        found.append(((argument,), answer))
        if len(found) == N_VISIBLE + N_HIDDEN:
            return tuple(found) if _tell_apart(found) else None
    return None


def _tell_apart(cases: list[Case]) -> bool:
    """Return whether neither a constant nor the argument itself is right in all visible or in all hidden cases."""
    for part in (cases[:N_VISIBLE], cases[N_VISIBLE:]):
        answers = {dumps(answer) for _, answer in part}
        if len(answers) < 2 or all(args[0] == answer for args, answer in part):
            return False
    return True


def _source(steps: Sequence[Step]) -> str:
    lines = [line for _, code in steps for line in code.split("\n")]
    return "\n".join([f"def {ENTRY}(x):", *("    " + line for line in lines), "    return x"]) + "\n"


def _compiled(steps: Sequence[Step]) -> Any:
    namespace: dict[str, Any] = {}
    exec(_source(steps), namespace)  # text of `FAMILIES`
    return namespace[ENTRY]
