"""The steps that tasks are chained from: what each says, and the code that does it.

A step is a pair of templates with places for numbers and letters, which are drawn anew wherever it is used. All act on
one variable ``x``. Several lines of code are one string with line breaks.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = tuple[str, str]
"""What it says, and its code."""

_LETTERS = "abcdeilmnorst"


@dataclass(frozen=True)
class Family:
    """Tasks of one kind.

    Attributes:
        name: Name of the family.
        subject: Phrase for the argument in the statement.
        draw: Function that draws an argument.
        steps: Steps, of which a task chains some.
        last: Steps of which one ends every task, or nothing.
    """

    name: str
    subject: str
    draw: Callable[[random.Random], Any]
    steps: tuple[Step, ...]
    last: tuple[Step, ...] = ()


def _int(rng: random.Random) -> int:
    return rng.randint(-40, 60)


def _natural(rng: random.Random) -> int:
    return rng.randint(12, 9999)


def _ints(rng: random.Random) -> list[int]:
    return [rng.randint(-20, 40) for _ in range(rng.randint(5, 9))]


def _text(rng: random.Random) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(6, 11)))


_ARITHMETIC = (
    ("add {a}", "x = x + {a}"),
    ("subtract {a}", "x = x - {a}"),
    ("multiply by {b}", "x = x * {b}"),
    ("take the remainder of division by {m}", "x = x % {m}"),
    ("divide by {b} and round down", "x = x // {b}"),
    ("change the sign", "x = -x"),
    ("take the absolute value", "x = abs(x)"),
    ("take the larger one of it and {a}", "x = max(x, {a})"),
    ("take the smaller one of it and {a}", "x = min(x, {a})"),
    ("square it", "x = x * x"),
)
_BRANCHES = (
    ("if it is even, add {a}, otherwise subtract {b}", "x = x + {a} if x % 2 == 0 else x - {b}"),
    ("if it is odd, multiply by {b}", "x = x * {b} if x % 2 == 1 else x"),
    ("if it is above {a}, subtract {m}", "x = x - {m} if x > {a} else x"),
    ("if it is below {a}, add {m}", "x = x + {m} if x < {a} else x"),
    ("if it is negative, change the sign, otherwise add {b}", "x = -x if x < 0 else x + {b}"),
    ("if it is a multiple of {b}, divide by {b}", "x = x // {b} if x % {b} == 0 else x"),
    ("if it is at least {a}, double it, otherwise add {m}", "x = 2 * x if x >= {a} else x + {m}"),
)
_LOOPS = (
    (
        "{b} times: multiply by {c} and take the remainder of division by {m}",
        "for _ in range({b}):\n    x = x * {c} % {m}",
    ),
    (
        "{b} times: add {a} if it is even, otherwise subtract 1",
        "for _ in range({b}):\n    x = x + {a} if x % 2 == 0 else x - 1",
    ),
    ("as long as it is above {a}: subtract {m}", "while x > {a}:\n    x = x - {m}"),
    ("as long as it is below {a}: add {b}", "while x < {a}:\n    x = x + {b}"),
    ("{b} times: halve it, rounding down, and add {a}", "for _ in range({b}):\n    x = x // 2 + {a}"),
    ("add all numbers from 1 to {m}", "for i in range(1, {m} + 1):\n    x = x + i"),
    ("add the remainders of {m} divided by 1 to {b}", "for i in range(1, {b} + 1):\n    x = x + {m} % i"),
)
_DIGITS = (
    ("take the sum of its digits", "x = sum(int(d) for d in str(x))"),
    ("write its digits backwards", "x = int(str(x)[::-1])"),
    ("append the digit {d}", "x = 10 * x + {d}"),
    ("put the digit {b} in front", "x = int('{b}' + str(x))"),
    ("drop its last digit", "x = x // 10"),
    ("multiply by {b}", "x = x * {b}"),
    ("add the largest of its digits", "x = x + max(int(d) for d in str(x))"),
    ("sort its digits, the smallest first", "x = int(''.join(sorted(str(x))))"),
    ("add the number of its digits", "x = x + len(str(x))"),
)
_LISTS = (
    ("add {a} to every value", "x = [v + {a} for v in x]"),
    ("multiply every value by {b}", "x = [v * {b} for v in x]"),
    ("keep the values above {s}", "x = [v for v in x if v > {s}]"),
    ("drop the multiples of {b}", "x = [v for v in x if v % {b} != 0]"),
    ("reverse the order", "x = x[::-1]"),
    ("sort, the smallest first", "x = sorted(x)"),
    ("drop the first one", "x = x[1:]"),
    ("drop the last one", "x = x[:-1]"),
    ("append {a}", "x = x + [{a}]"),
    ("replace every value by its remainder of division by {m}", "x = [v % {m} for v in x]"),
    ("replace every value by the sum of all up to it", "x = [sum(x[:i + 1]) for i in range(len(x))]"),
    ("keep every second value, from the first on", "x = x[::2]"),
)
_TOTALS = (
    ("take the sum", "x = sum(x)"),
    ("take the largest value, or 0 if there is none", "x = max(x, default=0)"),
    ("take the smallest value, or 0 if there is none", "x = min(x, default=0)"),
    ("count the values above {s}", "x = sum(1 for v in x if v > {s})"),
    ("take the sum of the squares", "x = sum(v * v for v in x)"),
    ("count the even values", "x = sum(1 for v in x if v % 2 == 0)"),
)
_STRINGS = (
    ("write it backwards", "x = x[::-1]"),
    ("append '{w}'", "x = x + '{w}'"),
    ("put '{w}' in front", "x = '{w}' + x"),
    ("drop the first letter", "x = x[1:]"),
    ("drop the last letter", "x = x[:-1]"),
    ("sort the letters", "x = ''.join(sorted(x))"),
    ("replace every '{l}' by '{w}'", "x = x.replace('{l}', '{w}')"),
    ("drop every '{l}'", "x = x.replace('{l}', '')"),
    ("keep every second letter, from the first on", "x = x[::2]"),
    ("repeat it {c} times", "x = x * {c}"),
    ("move the first {c} letters to the end", "x = x[{c}:] + x[:{c}]"),
)
_COUNTS = (
    ("take its length", "x = len(x)"),
    ("count the letter '{l}'", "x = x.count('{l}')"),
    ("count the vowels", "x = sum(1 for c in x if c in 'aeiou')"),
    ("count the different letters", "x = len(set(x))"),
    ("count the letters after '{l}' in the alphabet", "x = sum(1 for c in x if c > '{l}')"),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("arithmetic", "a number", _int, _ARITHMETIC),
        Family("branches", "a number", _int, _BRANCHES),
        Family("loops", "a number", _int, _LOOPS),
        Family("digits", "a positive number", _natural, _DIGITS),
        Family("lists", "a list of numbers", _ints, _LISTS),
        Family("totals", "a list of numbers", _ints, _LISTS, _TOTALS),
        Family("strings", "a word", _text, _STRINGS),
        Family("counts", "a word", _text, _STRINGS, _COUNTS),
    )
}
"""Every family by its name."""


def filled(step: Step, rng: random.Random) -> Step:
    """Return a step with its places filled: a, s numbers, b, c small factors, m a modulus, d a digit, l, w letters."""
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
