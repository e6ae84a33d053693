"""Small tasks with a correct solution, made from families with parameters.

The families are in ``families.jsonl``. A task is named by its family and parameters (``scale_shift/a=3,b=7``), and
everything about it follows from that name: statement, solution, visible examples and hidden cases.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from assay.errors import DataError
from assay.reports import read_jsonl
from assay.vhack.environment import Case
from assay.vhack.pairs._pairs import DATA

_N_HIDDEN = 8
_TRIES = 200


def _int(rng: random.Random) -> int:
    return rng.randint(-40, 60)


def _natural(rng: random.Random) -> int:
    return rng.randint(1, 200)


def _ints(rng: random.Random) -> list[int]:
    return [rng.randint(-20, 40) for _ in range(rng.randint(4, 9))]


_WORDS = (
    *("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "hazel"),
    *("ivory", "jolly", "kayak", "lemon", "mango", "noble", "ocean", "pearl"),
)


def _word(rng: random.Random) -> str:
    return "".join(rng.sample(_WORDS, rng.randint(1, 2)))


def _words(rng: random.Random) -> list[str]:
    return rng.sample(_WORDS, rng.randint(3, 6))


_DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "int": _int,
    "natural": _natural,
    "ints": _ints,
    "word": _word,
    "words": _words,
}


@dataclass(frozen=True)
class PairFamily:
    """Tasks of one kind, as a line of ``families.jsonl`` describes them.

    Attributes:
        name: Name of the family, and group of its pairs.
        argument: Name of the one argument of ``solve``.
        says: Phrase for what ``solve`` returns, with ``{a}`` and ``{b}`` for the parameters.
        body: Lines of the solution, with the same places; the last one returns.
        a: Lowest and highest value of the first parameter.
        b: Lowest and highest value of the second; 0 and 0 where there is only one.
        draw: Kind of the argument, which says how it is drawn.
    """

    name: str
    argument: str
    says: str
    body: Sequence[str]
    a: Sequence[int]
    b: Sequence[int]
    draw: str


PAIR_FAMILIES = {record["name"]: PairFamily(**record) for _, record in read_jsonl(DATA / "families.jsonl")}
"""Every family by its name."""


@dataclass(frozen=True)
class PairTask:
    """One task: a family with its parameters."""

    family: PairFamily
    a: int
    b: int

    @property
    def name(self) -> str:
        """The family and the parameters, as in ``scale_shift/a=3,b=7``."""
        return f"{self.family.name}/a={self.a},b={self.b}"

    @property
    def statement(self) -> str:
        """One sentence that says what is asked for, without its full stop."""
        return f"solve({self.family.argument}) returns {self.family.says.format(a=self.a, b=self.b)}"

    @property
    def solution(self) -> str:
        """The source of a correct ``solve``."""
        lines = [line.format(a=self.a, b=self.b) for line in self.family.body]
        return "\n".join([f"def solve({self.family.argument}):", *("    " + line for line in lines)])

    def fresh(self, n: int, seed: int = 0) -> tuple[Case, ...]:
        """Return cases with arguments that are among neither the examples nor the hidden cases, at most ``n``."""
        namespace: dict[str, Any] = {}
        exec(self.solution, namespace)  # text of `PAIR_FAMILIES`
        rng = random.Random(f"fresh {self.name} {seed}")
        known = [args[0] for args, _ in self.cases]
        found: list[Case] = []
        for _ in range(_TRIES):
            argument = _DRAWS[self.family.draw](rng)
            if len(found) < n and argument not in known:
                known.append(argument)
                found.append(((argument,), namespace["solve"](argument)))
        return tuple(found)

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Two visible examples, then the hidden cases; arguments differ, and so do the two visible answers."""
        namespace: dict[str, Any] = {}
        exec(self.solution, namespace)  # text of `PAIR_FAMILIES`
        rng = random.Random(f"cases of {self.name}")
        found: list[Case] = []
        for _ in range(_TRIES):
            argument = _DRAWS[self.family.draw](rng)
            case = ((argument,), namespace["solve"](argument))
            fresh = all(case[0] != other[0] for other in found)
            if fresh and (len(found) != 1 or case[1] != found[0][1]):
                found.append(case)
            if len(found) == 2 + _N_HIDDEN:
                return tuple(found)
        raise AssertionError(f"{self.name} has too few different cases")

    @property
    def visible(self) -> tuple[Case, ...]:
        """The examples that the prompt shows."""
        return self.cases[:2]

    @property
    def hidden(self) -> tuple[Case, ...]:
        """The cases that decide whether a solution is right."""
        return self.cases[2:]

    @property
    def examples(self) -> list[tuple[str, str]]:
        """Call and value of each visible example, as source."""
        return [(f"solve({', '.join(map(repr, args))})", repr(value)) for args, value in self.visible]


def pair_task_named(name: str) -> PairTask:
    """Return the task with this name, or raise a DataError if its family is unknown or does not have these numbers."""
    kind, _, parameters = name.partition("/")
    try:
        family = PAIR_FAMILIES[kind]
        first, second = parameters.split(",")
        a, b = int(first.removeprefix("a=")), int(second.removeprefix("b="))
        if not (family.a[0] <= a <= family.a[1] and family.b[0] <= b <= family.b[1]):
            raise ValueError
        return PairTask(family, a, b)
    except (KeyError, ValueError):
        raise DataError(
            f"task {name!r:.80}",
            wanted="FAMILY/a=N,b=N with numbers that the family allows",
            do="use the tags that the generator wrote, or give hidden cases of your own with --tests",
        ) from None
