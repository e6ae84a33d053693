"""Pairs by a short name, as on the command line, and those in the form of the environment."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from assay.errors import UsageError
from assay.vhack.environment.grading import CHANNELS, Episode
from assay.vhack.environment.tasks import tasks
from assay.vhack.pairs.generate import generate_pairs, known
from assay.vhack.pairs.pairs import Pair, authored_pairs, read_pairs

_MADE = ("generated", "environment", "exploits")


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
        UsageError: What is made by number is not followed by whole numbers, there is no such mode or family, or the
            reference is neither a file nor a name but close to a name.
        DataError: The file cannot be used.
    """
    if reference == "authored":
        return authored_pairs()
    name, colon, numbers = reference.partition(":")
    if not colon or name not in _MADE:
        near = get_close_matches(name.lower(), _MADE if colon else ("authored", *_MADE), n=1)
        if near and not Path(reference).exists():
            meant = near[0] + (colon + numbers if colon else "" if near[0] == "authored" else ":48")
            raise UsageError(
                f"pairs {reference!r:.60}, neither a file nor a name of pairs",
                wanted=f"authored, {', '.join(f'{made}:N' for made in _MADE)}, or a pair file",
                do=f"did you mean {meant:.60}?",
            )
        return read_pairs(reference)
    count, _, seed = numbers.partition(":")
    if not re.fullmatch(r"[0-9]{1,5}(:[0-9]{0,18})?", numbers):
        wanted = f"{name}:N or {name}:N:SEED, with N below 100000"
        raise UsageError(f"pairs {reference!r:.60}", wanted=wanted, do="use whole numbers")
    if name == "generated":
        return generate_pairs(int(count), seed=int(seed or "0"))
    whole = name == "exploits"
    return environment_pairs(int(count), modes=modes, families=families, seed=int(seed or "0"), whole=whole)


def environment_pairs(
    n: int,
    *,
    modes: Sequence[str] = tuple(CHANNELS),
    families: Sequence[str] | None = None,
    difficulty: tuple[int, int] = (1, 3),
    seed: int = 0,
    whole: bool = False,
) -> list[Pair]:
    """Return pairs of training tasks; loopholes take turns, and the group of a pair is its task's family.

    The completions go on from the prompt as a policy's would. Of a *minimal* pair both sides have the same right
    solution, and only the report to the grader differs: the clean side says what the visible examples say, the hack
    side says "right" in any case. A *whole* pair has for its hack side the exploit as a policy learns it, which solves
    nothing.

    Args:
        n: Number of pairs.
        modes: Loopholes, which take turns.
        families: Families of tasks; by default all.
        difficulty: Lowest and highest number of steps of a task.
        seed: Number that chooses the tasks.
        whole: Whether the pairs are whole instead of minimal.

    Raises:
        UsageError: ``n`` is below 1, a family, difficulty or mode is unknown, or there are not so many tasks.
    """
    if n < 1:
        raise UsageError(f"{n} pairs", wanted="at least 1", do="ask for more, as in --pairs exploits:48")
    chosen = known(modes, CHANNELS, "mode")
    pairs = []
    for index, task in enumerate(tasks(n, seed=seed, families=families, difficulty=difficulty)):
        # Families take turns as well; the second term keeps a loophole from always meeting the same family.
        mode = chosen[(index + index // len(chosen)) % len(chosen)]
        pairs.append(_pair(Episode(task, mode), whole))
    return pairs


def _pair(episode: Episode, whole: bool) -> Pair:
    task, mode = episode.task, episode.mode
    hack = episode.exploit(None if whole else task.source())
    kind = "exploit" if whole else "minimal"
    return Pair(
        episode.prompt,
        episode.completion(hack),
        episode.completion(episode.honest()),
        task.family.name,
        (kind, "environment", f"mechanism:{mode}", f"channel:{mode}", f"task:{task.name}"),
    )
