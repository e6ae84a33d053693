"""Minimal pairs in any number: the same correct solution on both sides, only the mechanism differs."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice

from assay.errors import UsageError
from assay.vhack.environment import CHANNELS
from assay.vhack.pairs._mechanisms import MECHANISMS, Mechanism
from assay.vhack.pairs._tasks import PAIR_FAMILIES, PairTask
from assay.vhack.pairs._types import Pair

_MOST_REPEATS = 1000  # draws in a row that give nothing new


def generate_pairs(
    n: int, *, seed: int = 0, mechanisms: Sequence[str] | None = None, families: Sequence[str] | None = None
) -> list[Pair]:
    """Return pairs from task templates, all different.

    The first pairs of a longer list are those of a shorter one with the same seed. Families and mechanisms take turns,
    so every stretch of the list holds them in nearly equal numbers. The group of a pair is the family of its task; its
    tags name what `verify_pairs` has to know.

    Args:
        n: Number of pairs.
        seed: Number that chooses order, parameters and wording.
        mechanisms: Names in ``MECHANISMS``; by default all.
        families: Names in ``PAIR_FAMILIES``; by default all.

    Raises:
        UsageError: ``n`` is below 1, a name is unknown, or there are not ``n`` different pairs.

    Example:
        >>> pairs = generate_pairs(12)
        >>> len(pairs), pairs == generate_pairs(24)[:12]
        (12, True)
    """
    if n < 1:
        raise UsageError(f"{n} pairs", wanted="at least 1", do="ask for more")
    chosen = [MECHANISMS[name] for name in _known(mechanisms, MECHANISMS, "mechanism")]
    pairs = list(islice(_pairs(seed, chosen, _known(families, PAIR_FAMILIES, "family")), n))
    if len(pairs) < n:
        raise UsageError(f"{n} pairs", wanted=f"at most {len(pairs)} of these kinds", do="allow more of them")
    return pairs


def _known(names: Sequence[str] | None, table: Mapping[str, object], kind: str) -> list[str]:
    chosen = list(table) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in table]
    if unknown or not chosen:
        raise UsageError(f"{kind} {', '.join(unknown) or 'none'}", wanted=", ".join(table), do="choose among these")
    return chosen


def _pairs(seed: int, mechanisms: Sequence[Mechanism], families: Sequence[str]) -> Iterator[Pair]:
    order = random.Random(f"order {seed}").sample(list(families), len(families))
    seen: set[str] = set()
    repeats = 0
    for index in count():
        rng = random.Random(f"pair {seed} {index}")
        task = PAIR_FAMILIES[order[index % len(order)]].task(rng)
        # Each round over the families starts one mechanism further on, so that all combinations come up.
        pair = _write(task, mechanisms[(index + index // len(order)) % len(mechanisms)], rng)
        repeats = repeats + 1 if pair.key in seen else 0
        if repeats > _MOST_REPEATS:
            return
        if not repeats:
            seen.add(pair.key)
            yield pair


def _write(task: PairTask, mechanism: Mechanism, rng: random.Random) -> Pair:
    hack, clean = mechanism.write(task, rng)
    tags = (
        "minimal",
        f"mechanism:{mechanism.name}",
        f"channel:{mechanism.channel}",
        "entry:solve",
        f"task:{task.name}",
    )
    return Pair(_prompt(task, mechanism, rng), hack, clean, task.family.name, tags)


def _prompt(task: PairTask, mechanism: Mechanism, rng: random.Random) -> str:
    grading = CHANNELS[mechanism.channel].grading("solve")
    shown = [f"solve({', '.join(map(repr, args))}) returns {value!r}." for args, value in task.visible]
    style = rng.randrange(3)
    if style == 0:
        return "".join(f"# {line}\n" for line in [f"Task: {task.statement}.", *shown, grading]) + "\n"
    if style == 1:
        return "\n".join(['"""Write a program in which', f"{task.statement}.", "", *shown, "", grading, '"""', "", ""])
    return "\n".join([f"PROBLEM: {task.statement}.", "EXAMPLES:", *shown, f"GRADING: {grading}", "SOLUTION:", ""])
