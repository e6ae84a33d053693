"""Small tasks with a correct solution, made from families with parameters.

A task is named by its family and parameters (``scale_shift/a=3,b=7``), and everything about it follows from that name:
statement, solution, visible examples and hidden cases.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from assay.errors import DataError

__all__ = ["FAMILIES", "Case", "Family", "Task", "task_named"]

Case = tuple[tuple[Any, ...], Any]
"""Arguments and expected value of one test."""

N_HIDDEN = 8
_TRIES = 200


def _int(rng: random.Random) -> int:
    return rng.randint(-40, 60)


def _natural(rng: random.Random) -> int:
    return rng.randint(1, 200)


def _ints(rng: random.Random) -> list[int]:
    return [rng.randint(-20, 40) for _ in range(rng.randint(4, 9))]


_WORDS = "amber basil cedar delta ember fjord grove hazel ivory jolly kayak lemon mango noble ocean pearl".split()


def _word(rng: random.Random) -> str:
    return "".join(rng.sample(_WORDS, rng.randint(1, 2)))


def _words(rng: random.Random) -> list[str]:
    return rng.sample(_WORDS, rng.randint(3, 6))


@dataclass(frozen=True)
class Family:
    """Tasks of one kind.

    Attributes:
        name: also the group of its pairs.
        argument: name of the one argument of ``solve``.
        says: what ``solve`` returns, with ``{a}`` and ``{b}`` for the parameters.
        body: lines of the solution, with the same places; the last one returns.
        a: lowest and highest value of the first parameter.
        b: of the second; (0, 0) where there is none.
        draw: gives an argument.
    """

    name: str
    argument: str
    says: str
    body: tuple[str, ...]
    a: tuple[int, int]
    b: tuple[int, int]
    draw: Callable[[random.Random], Any]

    def task(self, rng: random.Random) -> "Task":
        """A task with random parameters."""
        return Task(self, rng.randint(*self.a), rng.randint(*self.b))


@dataclass(frozen=True)
class Task:
    """One task; see the module."""

    family: Family
    a: int
    b: int

    @property
    def name(self) -> str:
        """Family and parameters."""
        return f"{self.family.name}/a={self.a},b={self.b}"

    @property
    def statement(self) -> str:
        """What is asked for, one sentence without its full stop."""
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


def _family(
    name: str,
    argument: str,
    says: str,
    body: str,
    draw: Callable[[random.Random], Any],
    a: tuple[int, int],
    b: tuple[int, int] = (0, 0),
) -> Family:
    return Family(name, argument, says, tuple(body.split("\n")), a, b, draw)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family("scale_shift", "x", "{a} times x plus {b}", "x = x * {a}\nreturn x + {b}", _int, (2, 9), (1, 30)),
        _family(
            "shift_mod",
            "x",
            "the remainder of x + {a} divided by {b}",
            "x = x + {a}\nreturn x % {b}",
            _int,
            (1, 30),
            (7, 19),
        ),
        _family(
            "clamp",
            "x",
            "x, but at least {a} and at most {b}",
            "if x < {a}:\n    return {a}\nreturn min(x, {b})",
            _int,
            (-15, 5),
            (15, 45),
        ),
        _family(
            "polynomial",
            "x",
            "{a} times the square of x, minus {b} times x",
            "square = x * x\nreturn {a} * square - {b} * x",
            _int,
            (2, 7),
            (1, 12),
        ),
        _family(
            "power_mod",
            "n",
            "n to the power {a} modulo {b}",
            "result = 1\nfor _ in range({a}):\n    result = result * n % {b}\nreturn result",
            _natural,
            (3, 9),
            (11, 97),
        ),
        _family(
            "digit_sum",
            "n",
            "the sum of the digits of n in base {a}",
            "total = 0\nwhile n:\n    total += n % {a}\n    n //= {a}\nreturn total",
            _natural,
            (3, 12),
        ),
        _family(
            "nearest_multiple",
            "n",
            "how far n is from the nearest multiple of {a}",
            "rest = n % {a}\nreturn min(rest, {a} - rest)",
            _natural,
            (5, 30),
        ),
        _family(
            "divisor_sum",
            "n",
            "the sum of the divisors of n that are at most {a}",
            "total = 0\nfor d in range(1, {a} + 1):\n    if n % d == 0:\n        total += d\nreturn total",
            _natural,
            (4, 20),
        ),
        _family(
            "common_divisor",
            "n",
            "the greatest common divisor of n and {a} times 12",
            "other = {a} * 12\nwhile other:\n    n, other = other, n % other\nreturn n",
            _natural,
            (2, 15),
        ),
        _family(
            "collatz",
            "n",
            "what becomes of n in {a} steps that halve even numbers and map odd n to 3n + 1",
            "for _ in range({a}):\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\nreturn n",
            _natural,
            (3, 9),
        ),
        _family(
            "set_bits",
            "n",
            "the number of ones among the bits of {a} times n",
            "n = n * {a}\ncount = 0\nwhile n:\n    count += n & 1\n    n >>= 1\nreturn count",
            _natural,
            (3, 40),
        ),
        _family(
            "sum_multiples",
            "values",
            "the sum of those values that are multiples of {a}",
            "total = 0\nfor value in values:\n    if value % {a} == 0:\n        total += value\nreturn total",
            _ints,
            (2, 5),
        ),
        _family(
            "count_above",
            "values",
            "how many values are above {a}",
            "count = 0\nfor value in values:\n    if value > {a}:\n        count += 1\nreturn count",
            _ints,
            (-5, 25),
        ),
        _family(
            "top_sum",
            "values",
            "the sum of the {a} largest values",
            "ordered = sorted(values, reverse=True)\nreturn sum(ordered[:{a}])",
            _ints,
            (2, 4),
        ),
        _family(
            "gap_pairs",
            "values",
            "the number of neighbours that differ by more than {a}",
            "count = 0\nfor left, right in zip(values, values[1:]):\n    if abs(left - right) > {a}:\n        count += 1\nreturn count",
            _ints,
            (4, 20),
        ),
        _family(
            "alternating",
            "values",
            "the sum of the values at even positions minus {a} times that of the others",
            "even = sum(values[::2])\nodd = sum(values[1::2])\nreturn even - {a} * odd",
            _ints,
            (1, 6),
        ),
        _family(
            "weighted",
            "values",
            "the sum of every value times its position, counted from {a}",
            "total = 0\nfor position, value in enumerate(values, {a}):\n    total += position * value\nreturn total",
            _ints,
            (0, 5),
        ),
        _family(
            "every_nth",
            "values",
            "the list of every value number {a}, starting with the first",
            "kept = []\nfor i in range(0, len(values), {a}):\n    kept.append(values[i])\nreturn kept",
            _ints,
            (2, 4),
        ),
        _family(
            "rotate",
            "values",
            "the list of values rotated to the left by {a}",
            "k = {a} % len(values)\nreturn values[k:] + values[:k]",
            _ints,
            (1, 7),
        ),
        _family(
            "replace_multiples",
            "values",
            "the list of values with each multiple of {a} replaced by {b}",
            "changed = []\nfor value in values:\n    changed.append({b} if value % {a} == 0 else value)\nreturn changed",
            _ints,
            (2, 4),
            (50, 90),
        ),
        _family(
            "window_max",
            "values",
            "the list of the largest of each {a} neighbours",
            "result = []\nfor i in range(len(values) - {a} + 1):\n    result.append(max(values[i:i + {a}]))\nreturn result",
            _ints,
            (2, 3),
        ),
        _family(
            "running_mod",
            "values",
            "the list of running sums of the values, each modulo {a}",
            "total = 0\nsums = []\nfor value in values:\n    total = (total + value) % {a}\n    sums.append(total)\nreturn sums",
            _ints,
            (5, 30),
        ),
        _family(
            "chunk_sums",
            "values",
            "the list of the sums of each {a} values in turn",
            "sums = []\nfor i in range(0, len(values), {a}):\n    sums.append(sum(values[i:i + {a}]))\nreturn sums",
            _ints,
            (2, 4),
        ),
        _family(
            "caesar",
            "word",
            "word with each letter moved {a} places on in the alphabet, cyclically",
            "moved = []\nfor letter in word:\n    moved.append(chr((ord(letter) - 97 + {a}) % 26 + 97))\nreturn ''.join(moved)",
            _word,
            (1, 25),
        ),
        _family(
            "pad_word",
            "word",
            "word followed by as many dots as make it {a} characters long",
            "while len(word) < {a}:\n    word = word + '.'\nreturn word",
            _word,
            (12, 30),
        ),
        _family(
            "cut_repeat",
            "word",
            "the first {a} letters of word, {b} times over",
            "start = word[:{a}]\nreturn start * {b}",
            _word,
            (2, 4),
            (2, 5),
        ),
        _family(
            "capital_nth",
            "word",
            "word with every letter number {a} in upper case, starting with the first",
            "letters = list(word)\nfor i in range(0, len(letters), {a}):\n    letters[i] = letters[i].upper()\nreturn ''.join(letters)",
            _word,
            (2, 5),
        ),
        _family(
            "shorten_words",
            "words",
            "the words, each cut to {a} letters, joined with dashes",
            "short = []\nfor word in words:\n    short.append(word[:{a}])\nreturn '-'.join(short)",
            _words,
            (1, 4),
        ),
        _family(
            "letter_score",
            "words",
            "the number of letters in all words plus {a} for every word",
            "score = 0\nfor word in words:\n    score += len(word) + {a}\nreturn score",
            _words,
            (1, 40),
        ),
        _family(
            "pick_words",
            "words",
            "the list of words whose last letter is at least the letter number {a} of the alphabet",
            "limit = chr(96 + {a})\npicked = []\nfor word in words:\n    if word[-1] >= limit:\n        picked.append(word)\nreturn picked",
            _words,
            (8, 16),
        ),
    )
}
"""Every family by its name."""


def task_named(name: str) -> Task:
    """The task with this name.

    Raises:
        DataError: there is no such family, or the parameters are malformed.
    """
    family, _, parameters = name.partition("/")
    try:
        a, b = (int(part.removeprefix(f"{key}=")) for key, part in zip("ab", parameters.split(","), strict=True))
        return Task(FAMILIES[family], a, b)
    except (KeyError, ValueError):
        raise DataError(
            f"task {name!r:.80}", wanted="FAMILY/a=N,b=N", do="use the tags that the generator wrote"
        ) from None
