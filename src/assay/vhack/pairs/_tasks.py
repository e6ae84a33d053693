"""Small tasks with a correct solution, made from families with parameters.

The families are in ``families.jsonl``. A task is named by its family and parameters (``scale_shift/a=3,b=7``), and
everything about it follows from that name: statement, solution, visible examples and hidden cases.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from assay.errors import DataError
from assay.reports import JsonObject, read_jsonl
from assay.vhack.environment import Case
from assay.vhack.pairs._files import data_file

N_HIDDEN = 8
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


@dataclass(frozen=True)
class PairFamily:
    """Tasks of one kind.

    Attributes:
        name: Name of the family, and group of its pairs.
        argument: Name of the one argument of ``solve``.
        says: Phrase for what ``solve`` returns, with ``{a}`` and ``{b}`` for the parameters.
        body: Lines of the solution, with the same places; the last one returns.
        a: Lowest and highest value of the first parameter.
        b: Lowest and highest value of the second; (0, 0) where there is only one.
        draw: Function that draws an argument.
    """

    name: str
    argument: str
    says: str
    body: tuple[str, ...]
    a: tuple[int, int]
    b: tuple[int, int]
    draw: Callable[[random.Random], Any]

    def task(self, rng: random.Random) -> "PairTask":
        """Return a task with random parameters."""
        return PairTask(self, rng.randint(*self.a), rng.randint(*self.b))


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
    def body(self) -> tuple[str, ...]:
        """Lines of a correct solution, not indented."""
        return tuple(line.format(a=self.a, b=self.b) for line in self.family.body)

    @property
    def solution(self) -> str:
        """The source of a correct ``solve``."""
        return "\n".join([f"def solve({self.family.argument}):", *("    " + line for line in self.body)])

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Two visible examples, then the hidden cases; arguments differ, and so do the two visible answers."""
        namespace: dict[str, Any] = {}
        exec(self.solution, namespace)  # text of this module
        rng = random.Random(f"cases of {self.name}")
        found: list[Case] = []
        for _ in range(_TRIES):
            argument = self.family.draw(rng)
            case = ((argument,), namespace["solve"](argument))
            fresh = all(case[0] != other[0] for other in found)
            if fresh and (len(found) != 1 or case[1] != found[0][1]):
                found.append(case)
            if len(found) == 2 + N_HIDDEN:
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


def _family(record: JsonObject) -> PairFamily:
    return PairFamily(
        name=record["name"],
        argument=record["argument"],
        says=record["says"],
        body=tuple(record["body"]),
        a=(record["a"][0], record["a"][1]),
        b=(record["b"][0], record["b"][1]),
        draw=_DRAWS[record["draw"]],
    )


_DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "int": _int,
    "natural": _natural,
    "ints": _ints,
    "word": _word,
    "words": _words,
}

PAIR_FAMILIES: dict[str, PairFamily] = {
    record["name"]: _family(record) for _, record in read_jsonl(data_file("families.jsonl"))
}
"""Every family by its name."""


def pair_task_named(name: str) -> PairTask:
    """Return the task with this name.

    Raises:
        DataError: There is no such family, or the parameters are malformed.
    """
    family, _, parameters = name.partition("/")
    try:
        a, b = (int(part.removeprefix(f"{key}=")) for key, part in zip("ab", parameters.split(","), strict=True))
        return PairTask(PAIR_FAMILIES[family], a, b)
    except (KeyError, ValueError):
        raise DataError(
            f"task {name!r:.80}",
            wanted="FAMILY/a=N,b=N",
            do="use the tags that the generator wrote, or give hidden cases of your own with --tests",
        ) from None
