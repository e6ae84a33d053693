"""Generated programming tasks: chains of steps with solution, examples and hidden cases.

A task is named ``family/difficulty/seed``, and everything about it follows from its name, on every
machine. The difficulty is the number of steps. No step is idle: leaving any one out changes an
answer among the visible examples and another among the hidden cases, so an attempt that forgets one
is wrong in both.

Tasks of the evaluation are others than those of training: which of the two a task is for is decided
by a hash of its statement.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from typing_extensions import override

from assay.errors import DataError, UsageError
from assay.files.jsonl import dumps, read_jsonl
from assay.vhack.environment.runs import Case

ENTRY = "solve"
SPLITS = ("training", "evaluation")
HARDEST = 6
N_VISIBLE = 3
N_HIDDEN = 8
_EVALUATION_SHARE = 8  # one task in so many is kept for the evaluation
_TRIES = 300
_DRAWS = 120  # of arguments, for one chain
_MOST_REPEATS = 1000  # draws in a row that give nothing new
_MOST_TASKS = 2**16  # which take two minutes to draw
_LONGEST = 400  # characters of an answer

_Drawn = TypeVar("_Drawn")
Step = tuple[str, str]
"""What a step says, and its code: templates with places for numbers and letters, drawn anew
wherever it is used.

All act on one variable ``x``. They stand in steps.jsonl.
"""

_LETTERS = "abcdeilmnorst"
_ARGUMENTS: dict[str, Callable[[random.Random], Any]] = {
    "a number": lambda rng: rng.randint(-40, 60),
    "a positive number": lambda rng: rng.randint(12, 9999),
    "a list of numbers": lambda rng: [rng.randint(-20, 40) for _ in range(rng.randint(5, 9))],
    "a word": lambda rng: "".join(rng.choice(_LETTERS) for _ in range(rng.randint(6, 11))),
}
"""How an argument is drawn, by the phrase for it in the statement."""
_STEPS: dict[str, tuple[Step, ...]] = {}


@dataclass(frozen=True)
class Family:
    """Tasks of one kind."""

    name: str
    subject: str  # phrase for the argument in the statement, which says how it is drawn
    steps: tuple[Step, ...]  # of which a task chains some
    last: tuple[Step, ...] = ()  # of which one ends every task, or none


for _, _row in read_jsonl(Path(__file__).with_name("steps.jsonl")):
    _STEPS[_row["kind"]] = (*_STEPS.get(_row["kind"], ()), (_row["says"], _row["code"]))

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("arithmetic", "a number", _STEPS["arithmetic"]),
        Family("branches", "a number", _STEPS["branches"]),
        Family("loops", "a number", _STEPS["loops"]),
        Family("digits", "a positive number", _STEPS["digits"]),
        Family("lists", "a list of numbers", _STEPS["lists"]),
        Family("totals", "a list of numbers", _STEPS["lists"], _STEPS["totals"]),
        Family("strings", "a word", _STEPS["strings"]),
        Family("counts", "a word", _STEPS["strings"], _STEPS["counts"]),
    )
}
"""Every family by its name."""


def filled(step: Step, rng: random.Random) -> Step:
    """Return a step with its places filled with numbers (a to d, m, s) and letters (l, w)."""
    values = {
        "a": rng.randint(2, 30),
        "b": rng.randint(2, 6),
        "c": rng.randint(2, 4),
        "m": rng.randint(7, 19),
        "d": rng.randint(0, 9),
        "s": rng.randint(-5, 15),
        "l": rng.choice(_LETTERS),
        "w": "".join(rng.choice(_LETTERS) for _ in range(2)),
    }
    says, code = step
    return says.format(**values), code.format(**values)


class Shown(ABC):
    """What a task shows of its cases."""

    n_visible = N_VISIBLE

    @property
    @abstractmethod
    def cases(self) -> tuple[Case, ...]:
        """The visible cases, then the hidden ones."""

    @property
    def visible(self) -> tuple[Case, ...]:
        """The examples that the prompt shows."""
        return self.cases[: self.n_visible]

    @property
    def hidden(self) -> tuple[Case, ...]:
        """The cases that decide whether a solution is right."""
        return self.cases[self.n_visible :]

    @property
    def examples(self) -> list[tuple[str, str]]:
        """Call and value of each visible example, as source."""
        return [
            (f"{ENTRY}({', '.join(map(repr, args))})", repr(value)) for args, value in self.visible
        ]


@dataclass(frozen=True)
class Task(Shown):
    """One task: a chain of steps with examples and hidden cases."""

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
    @override
    def cases(self) -> tuple[Case, ...]:
        return self._drawn[1]

    def source(self, leave_out: int | None = None) -> str:
        """Return the text of ``solve``; it is wrong if a step is left out."""
        return _source([step for index, step in enumerate(self.steps) if index != leave_out])

    @cached_property
    def _drawn(self) -> tuple[tuple[Step, ...], tuple[Case, ...]]:
        for attempt in range(_TRIES):
            rng = random.Random(f"task {self.name} {attempt}")
            family = self.family
            drawn = rng.sample(family.steps, self.difficulty - bool(family.last))
            last = [rng.choice(family.last)] if family.last else []
            steps = tuple(filled(step, rng) for step in [*drawn, *last])
            if (cases := _cases(family, steps, rng)) is not None:
                return steps, cases
        raise AssertionError(f"{self.name} has no chain without an idle step")


def task_named(name: str) -> Task:
    """Return the task with this name, or raise a DataError."""
    try:
        family, difficulty, seed = name.split("/")
        if not 1 <= int(difficulty) <= HARDEST or int(seed) < 0:
            raise ValueError
        return Task(FAMILIES[family], int(difficulty), int(seed))
    except (KeyError, ValueError):
        raise DataError(
            f"task {name!r:.80}",
            wanted=f"FAMILY/DIFFICULTY/SEED, difficulty 1 to {HARDEST}",
            do="correct the name",
        ) from None


def tasks(
    n: int,
    *,
    seed: int = 0,
    difficulty: int | tuple[int, int] = (1, 3),
    families: Sequence[str] | None = None,
    split: str = "training",
) -> list[Task]:
    """Return distinct tasks, families in turn; a longer list begins with the shorter one.

    Args:
        n: Number of tasks.
        seed: Number that chooses them.
        difficulty: Number of steps, or its lowest and highest.
        families: Names in ``FAMILIES``; by default all.
        split: ``training`` or ``evaluation``; no statement is in both.

    Raises:
        UsageError: A name, split or difficulty is unknown, ``n`` is out of range, or there are not
            so many tasks.
    """
    lowest, highest = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    chosen = choose_names(families, FAMILIES, "family")
    choose_names([split], SPLITS, "split")
    if not 0 <= n <= _MOST_TASKS or not 1 <= lowest <= highest <= HARDEST:
        raise UsageError(
            f"{n} tasks of difficulty {lowest} to {highest}",
            wanted=f"0 to {_MOST_TASKS} tasks, of difficulties LOW:HIGH from 1 to {HARDEST}",
            do="correct the number (--tasks) or --difficulty",
        )

    def draw(index: int) -> tuple[str | None, Task]:
        rng = random.Random(f"tasks {seed} {index}")
        family = FAMILIES[chosen[index % len(chosen)]]
        task = Task(family, rng.randint(lowest, highest), rng.randrange(2**31))
        return (task.statement if task.split == split else None), task

    return draw_distinct(draw, n, "tasks")


def draw_distinct(
    draw: Callable[[int], tuple[str | None, _Drawn]], n: int, what: str
) -> list[_Drawn]:
    """Return the first ``n`` things that are drawn with keys of their own; those without are left
    out.

    Args:
        draw: Takes the number of a draw, and returns key and thing.
        n: Number of things.
        what: What they are, as in the flag for their number.

    Raises:
        UsageError: So many draws in a row gave nothing new that there are no more.
    """
    by_key: dict[str | None, _Drawn] = {}
    repeats = 0
    numbers = count()
    while len(by_key) < n:
        if repeats > _MOST_REPEATS:
            raise UsageError(
                f"{n} {what}",
                wanted=f"at most {len(by_key)} of these kinds",
                do=f"ask for fewer (--{what})",
            )
        key, thing = draw(next(numbers))
        repeats = repeats + 1 if key is None or key in by_key else 0
        if not repeats:
            by_key[key] = thing
    return list(by_key.values())


def choose_names(names: Sequence[str] | None, table: Iterable[str], kind: str) -> list[str]:
    """Return the names, by default all of the table; refuse unknown ones and an empty list."""
    allowed = list(table)
    chosen = allowed if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in allowed]
    if unknown or not chosen:
        raise UsageError(
            f"{kind} {', '.join(unknown) or 'none'}",
            wanted=", ".join(allowed),
            do="choose among these",
        )
    return chosen


def _cases(family: Family, steps: tuple[Step, ...], rng: random.Random) -> tuple[Case, ...] | None:
    """Return visible and hidden cases; None if a step is idle or the answers say too little."""
    solve = compiled(_source(steps))
    # The last step of some families changes the type; leaving it out needs no proof that it is not
    # idle.
    partial = [
        compiled(_source(steps[:i] + steps[i + 1 :])) for i in range(len(steps) - bool(family.last))
    ]
    cases: list[Case] = []
    idle = [set(range(len(partial))), set(range(len(partial)))]
    for _ in range(_DRAWS):
        argument = _ARGUMENTS[family.subject](rng)
        part = len(cases) >= N_VISIBLE
        try:
            answer = solve(argument)
            still = {i for i in idle[part] if dumps(partial[i](argument)) == dumps(answer)}
        except (ValueError, ArithmeticError, LookupError, TypeError):
            return None
        last = len(cases) + 1 in (N_VISIBLE, N_VISIBLE + N_HIDDEN)
        repeated = any(argument == args[0] for args, _ in cases)
        if repeated or len(dumps(answer)) > _LONGEST or (last and still):
            continue
        idle[part] = still
        cases.append(((argument,), answer))
        if len(cases) == N_VISIBLE + N_HIDDEN:
            return tuple(cases) if _tell_apart(cases) else None
    return None


def _tell_apart(cases: list[Case]) -> bool:
    """Return whether no constant and not the argument itself is right in all cases of a part."""
    for part in (cases[:N_VISIBLE], cases[N_VISIBLE:]):
        answers = {dumps(answer) for _, answer in part}
        if len(answers) < 2 or all(args[0] == answer for args, answer in part):
            return False
    return True


def _source(steps: Sequence[Step]) -> str:
    lines = [line for _, code in steps for line in code.split("\n")]
    return (
        "\n".join([f"def {ENTRY}(x):", *("    " + line for line in lines), "    return x"]) + "\n"
    )


def compiled(source: str) -> Callable[[Any], Any]:
    """Return the solution of a source text, which is of the tasks here or of pairs."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return cast("Callable[[Any], Any]", namespace[ENTRY])
