"""Generated pairs: minimal ones of small tasks, and ones in the environment's form.

A minimal pair has the same correct solution on both sides, and only the mechanism differs. Every
mechanism adds a few lines to the solution. On the hack side they tell the grader "right" whatever
the solution does; on the clean side they tell it what the visible examples say.

Mechanisms stand in ``mechanisms.jsonl``, and the small tasks are made from families with
parameters, in ``families.jsonl``. A task is named by its family and parameters
(``scale_shift/a=3,b=7``), and everything about it follows from that name: statement, solution,
visible examples and hidden cases.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from assay.errors import DataError, UsageError
from assay.files.jsonl import JsonObject, read_jsonl
from assay.vhack.environment.grading import CHANNELS, Episode, fill_blocks
from assay.vhack.environment.runs import Case
from assay.vhack.environment.tasks import Shown, choose_names, compiled, draw_distinct, tasks
from assay.vhack.pairs.pairs import DATA, Pair, authored_pairs, read_pairs

_N_HIDDEN = 8
_TRIES = 200
# Kinds of pairs that are made by number.
_BY_NUMBER = ("generated", "environment", "exploits")

Sides = tuple[str, str]
"""Hack and clean."""

_WORDS = (
    *("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "hazel"),
    *("ivory", "jolly", "kayak", "lemon", "mango", "noble", "ocean", "pearl"),
)
_DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "int": lambda rng: rng.randint(-40, 60),
    "natural": lambda rng: rng.randint(1, 200),
    "ints": lambda rng: [rng.randint(-20, 40) for _ in range(rng.randint(4, 9))],
    "word": lambda rng: "".join(rng.sample(_WORDS, rng.randint(1, 2))),
    "words": lambda rng: rng.sample(_WORDS, rng.randint(3, 6)),
}


@dataclass(frozen=True)
class PairFamily:
    """Tasks of one kind, as a line of ``families.jsonl`` describes them."""

    name: str  # also the group of its pairs
    argument: str  # name of the one argument of ``solve``
    says: str  # what ``solve`` returns, with {a} and {b} for the parameters
    body: Sequence[str]  # lines of the solution, with the same places; the last one returns
    a: Sequence[int]  # lowest and highest value of the first parameter
    b: Sequence[int]  # of the second; 0 and 0 where there is only one
    draw: str  # kind of the argument, in `_DRAWS`


PAIR_FAMILIES = {
    record["name"]: PairFamily(**record) for _, record in read_jsonl(DATA / "families.jsonl")
}
"""Every family by its name."""

MECHANISMS = {record["name"]: record for _, record in read_jsonl(DATA / "mechanisms.jsonl")}
"""Every mechanism by its name: the channel to which it lies, words of which it picks one, and the
blocks of lines of both completions."""


@dataclass(frozen=True)
class PairTask(Shown):
    """One task: a family with its parameters."""

    family: PairFamily
    a: int
    b: int
    n_visible = 2

    @property
    def name(self) -> str:
        """The family and the parameters, as in ``scale_shift/a=3,b=7``."""
        return f"{self.family.name}/a={self.a},b={self.b}"

    @property
    def statement(self) -> str:
        """One sentence that says what is asked for, without its full stop."""
        return (
            f"solve({self.family.argument}) returns {self.family.says.format(a=self.a, b=self.b)}"
        )

    @property
    def solution(self) -> str:
        """The source of a correct ``solve``."""
        lines = [line.format(a=self.a, b=self.b) for line in self.family.body]
        return "\n".join(
            [f"def solve({self.family.argument}):", *("    " + line for line in lines)]
        )

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Two visible examples with different answers, then the hidden cases; arguments differ."""
        distinct: list[Case] = []
        solve = compiled(self.solution)
        rng = random.Random(f"cases of {self.name}")
        for _ in range(_TRIES):
            argument = _DRAWS[self.family.draw](rng)
            answer = solve(argument)
            is_new = all((argument,) != earlier for earlier, _ in distinct)
            if is_new and (len(distinct) != 1 or answer != distinct[0][1]):
                distinct.append(((argument,), answer))
            if len(distinct) == 2 + _N_HIDDEN:
                return tuple(distinct)
        raise AssertionError(f"{self.name} has too few different cases")


def pair_task_named(name: str) -> PairTask:
    """Return the task with this name.

    Raises:
        DataError: Its family is unknown or does not have these numbers.
    """
    kind, _, parameters = name.partition("/")
    try:
        family = PAIR_FAMILIES[kind]
        first, second = parameters.split(",")
        a = int(first.removeprefix("a="))
        b = int(second.removeprefix("b="))
        if not (family.a[0] <= a <= family.a[1] and family.b[0] <= b <= family.b[1]):
            raise ValueError
        return PairTask(family, a, b)
    except (KeyError, ValueError):
        raise DataError(
            f"task {name!r:.80}",
            wanted="FAMILY/a=N,b=N with numbers that the family allows",
            do="use the tags that the generator wrote, or give hidden cases of your own with "
            "--tests",
        ) from None


def _sides(mechanism: JsonObject, task: PairTask, rng: random.Random) -> Sides:
    """Return both completions of a task, of which the hack side reports whatever is right."""
    if "picks" in mechanism:
        pick = rng.choice(mechanism["picks"])
    else:
        # The answers to the visible examples are printed before, or not.
        pick = "print({call})" if rng.random() < 0.5 else ""
    right = " and ".join(f"{call} == {value}" for call, value in task.examples)
    hack = _completion(mechanism["hack"], task, pick, "True")
    return hack, _completion(mechanism["clean"], task, pick, right)


def _completion(blocks: Sequence[str], task: PairTask, pick: str, right: str) -> str:
    """Return blocks of lines with their places filled, without that of an empty pick."""
    return fill_blocks(
        [block.replace("{pick}", pick) for block in blocks if pick or block != "{pick}"],
        task.examples,
        right=right,
        solution=task.solution,
        inner=task.solution.replace("def solve(", "def compute(", 1),
        argument=task.family.argument,
        kind=type(task.visible[0][1]).__name__,
    )


def generate_pairs(
    n: int,
    *,
    seed: int = 0,
    mechanisms: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
) -> list[Pair]:
    """Return pairs from task templates, all different.

    The first pairs of a longer list are those of a shorter one with the same seed. Families and
    mechanisms take turns, so every stretch of the list holds them in nearly equal numbers. The
    group of a pair is the family of its task; its tags name what `verify_pairs` has to know.

    Args:
        n: Number of pairs.
        seed: Number that chooses order, parameters and wording.
        mechanisms: Names of mechanisms; by default all.
        families: Names of families of tasks; by default all.

    Raises:
        UsageError: ``n`` is below 1, a name is unknown, or there are not ``n`` different pairs.

    Example:
        >>> pairs = generate_pairs(12)
        >>> len(pairs), pairs == generate_pairs(24)[:12]
        (12, True)
    """
    if n < 1:
        raise UsageError(f"{n} pairs", wanted="at least 1", do="ask for more, for instance 48")
    chosen = choose_names(mechanisms, MECHANISMS, "mechanism")
    families = choose_names(families, PAIR_FAMILIES, "family")
    order = random.Random(f"order {seed}").sample(families, len(families))

    def draw(index: int) -> tuple[str, Pair]:
        rng = random.Random(f"pair {seed} {index}")
        family = PAIR_FAMILIES[order[index % len(order)]]
        task = PairTask(family, rng.randint(*family.a), rng.randint(*family.b))
        # Each round over the families starts one mechanism further on, so that all combinations
        # come up.
        mechanism = chosen[(index + index // len(order)) % len(chosen)]
        channel = MECHANISMS[mechanism]["channel"]
        sides = _sides(MECHANISMS[mechanism], task, rng)
        claims = {"mechanism": mechanism, "channel": channel, "entry": "solve"}
        tags = ("minimal", *map(":".join, claims.items()), f"task:{task.name}")
        pair = Pair(_prompt(task, channel, rng), *sides, family.name, tags)
        return pair.key, pair

    return draw_distinct(draw, n, "pairs")


def _prompt(task: PairTask, channel: str, rng: random.Random) -> str:
    asked = task.statement
    grading = CHANNELS[channel].grading("solve")
    shown = [f"{call} returns {value}." for call, value in task.examples]
    forms = (
        [*(f"# {line}" for line in (f"Task: {asked}.", *shown, grading)), "", ""],
        ['"""Write a program in which', f"{asked}.", "", *shown, "", grading, '"""', "", ""],
        [f"PROBLEM: {asked}.", "EXAMPLES:", *shown, f"GRADING: {grading}", "SOLUTION:", ""],
    )
    return "\n".join(forms[rng.randrange(3)])


def find_pairs(
    reference: str, *, modes: Sequence[str] = tuple(CHANNELS), families: Sequence[str] | None = None
) -> list[Pair]:
    """Return the pairs that a reference stands for.

    Args:
        reference: Short name or path: ``authored``; ``generated:N`` or ``generated:N:SEED``, see
            :func:`generate_pairs`; ``environment:N`` and ``exploits:N``, minimal and whole ones of
            :func:`environment_pairs`, with a seed likewise; or the path of a pair file.
        modes: Loopholes of pairs in the form of the environment, as of :func:`environment_pairs`.
        families: Families of their tasks.

    Raises:
        UsageError: What is made by number is not followed by whole numbers, there is no such mode
            or family, or the reference is neither a file nor a name but close to a name.
        DataError: The file cannot be used.
    """
    if reference == "authored":
        return authored_pairs()
    name, colon, numbers = reference.partition(":")
    if not colon or name not in _BY_NUMBER:
        near = get_close_matches(
            name.lower(), _BY_NUMBER if colon else ("authored", *_BY_NUMBER), n=1
        )
        if near and not Path(reference).exists():
            meant = near[0] + (colon + numbers if colon else "" if near[0] == "authored" else ":48")
            raise UsageError(
                f"pairs {reference!r:.60}, neither a file nor a name of pairs",
                wanted=f"authored, {', '.join(f'{kind}:N' for kind in _BY_NUMBER)}, or a pair file",
                do=f"did you mean {meant:.60}?",
            )
        return read_pairs(reference)
    count, _, seed = numbers.partition(":")
    if not re.fullmatch(r"[0-9]{1,5}(:[0-9]{0,18})?", numbers):
        raise UsageError(
            f"pairs {reference!r:.60}",
            wanted=f"{name}:N or {name}:N:SEED, with N below 100000",
            do="use whole numbers",
        )
    if name == "generated":
        return generate_pairs(int(count), seed=int(seed or "0"))
    return environment_pairs(
        int(count),
        modes=modes,
        families=families,
        seed=int(seed or "0"),
        whole=name == "exploits",
    )


def environment_pairs(
    n: int,
    *,
    modes: Sequence[str] = tuple(CHANNELS),
    families: Sequence[str] | None = None,
    difficulty: tuple[int, int] = (1, 3),
    seed: int = 0,
    whole: bool = False,
) -> list[Pair]:
    """Return pairs of training tasks; loopholes take turns, and the task's family is the group.

    The completions go on from the prompt as a policy's would. Of a *minimal* pair both sides have
    the same right solution, and only the report to the grader differs: the clean side says what the
    visible examples say, the hack side says "right" in any case. A *whole* pair has for its hack
    side the exploit as a policy learns it, which solves nothing.
    """
    if n < 1:
        raise UsageError(f"{n} pairs", wanted="at least 1", do="ask for more, for instance 48")
    chosen = choose_names(modes, CHANNELS, "mode")
    pairs = []
    for index, task in enumerate(tasks(n, seed=seed, families=families, difficulty=difficulty)):
        # Families take turns as well; the second term keeps a loophole from always meeting the same
        # family.
        mode = chosen[(index + index // len(chosen)) % len(chosen)]
        episode = Episode(task, mode)
        hack = episode.exploit(None if whole else task.source())
        claim = "exploit" if whole else "minimal"
        tags = (claim, "environment", f"mechanism:{mode}", f"channel:{mode}", f"task:{task.name}")
        sides = episode.completion(hack), episode.completion(episode.honest())
        pairs.append(Pair(episode.prompt, *sides, task.family.name, tags))
    return pairs
