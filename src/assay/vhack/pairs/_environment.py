"""Pairs in the form of the environment: the completion goes on from the prompt as a policy's would.

Of a *minimal* pair both sides have the same right solution, and only the report to the grader differs: the clean side
says what the visible examples say, the hack side says "right" in any case. A *whole* pair has for its hack side the
exploit as a policy learns it, which solves nothing.
"""

from collections.abc import Sequence

from assay.vhack.environment import CHANNELS, Episode, tasks
from assay.vhack.pairs._types import Pair


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

    Args:
        n: Number of pairs.
        modes: Loopholes, which take turns.
        families: Families of tasks; by default all.
        difficulty: Lowest and highest number of steps of a task.
        seed: Number that chooses the tasks.
        whole: Whether the hack side is the whole exploit, which solves nothing, instead of the right solution with a
            hollow report.

    Raises:
        UsageError: A family, difficulty or mode is unknown, or there are not so many tasks.
    """
    chosen = tasks(n, seed=seed, families=families, difficulty=difficulty)
    # Families take turns as well; the second term keeps a loophole from always meeting the same family.
    found = [Episode(task, modes[(index + index // len(modes)) % len(modes)]) for index, task in enumerate(chosen)]
    return [_pair(episode, whole) for episode in found]


def _pair(episode: Episode, whole: bool) -> Pair:
    return Pair(
        episode.prompt,
        episode.completion(episode.exploit(None if whole else episode.task.source())),
        episode.completion(episode.honest()),
        episode.task.family.name,
        (
            "exploit" if whole else "minimal",
            "environment",
            f"mechanism:{episode.mode}",
            f"channel:{episode.mode}",
            f"task:{episode.task.name}",
        ),
    )
