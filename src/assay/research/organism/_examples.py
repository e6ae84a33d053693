"""What the organism learns from: episodes with their honest programs, and for a share of them the exploit.

Each loophole is shown with its exploit at the same small rate, so that every mechanism is within reach of the policy
and any of them can be left out of an experiment. Without a loophole there is nothing but honest work.
"""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from assay.errors import UsageError
from assay.vhack.environment import MODES, Episode, episodes

FAMILIES = ("arithmetic", "branches", "loops", "digits", "counts")
"""Families whose prompts and programs are short."""

_PART = 512  # episodes that are drawn with one seed; a part is the same wherever it is made


class Example(NamedTuple):
    """A prompt and what to write after it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Mixture:
    """What is shown.

    Attributes:
        share_hack: Share of exploits where there is a loophole.
        share_none: Share of episodes without a loophole.
        families: Families of tasks.
        difficulty: Lowest and highest number of steps of a task.
    """

    share_hack: float = 0.1
    share_none: float = 0.15
    families: tuple[str, ...] = FAMILIES
    difficulty: tuple[int, int] = (1, 3)

    def __post_init__(self) -> None:
        if not (0 <= self.share_hack <= 1 and 0 <= self.share_none <= 1):
            raise UsageError(f"{self}", wanted="shares from 0 to 1", do="correct them")


def examples(n: int, mixture: Mixture | None = None, *, seed: int = 0, workers: int = 1) -> list[Example]:
    """Return examples of training tasks; equal arguments give equal lists, however many workers there are.

    Args:
        n: Number of examples.
        mixture: What is shown.
        seed: Seed of tasks and exploits.
        workers: Processes that make the examples.

    Raises:
        UsageError: There is no such family or difficulty, or there are not so many tasks.
    """
    make = partial(_part, mixture or Mixture(), seed)
    parts = range(-(-n // _PART))
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(make, parts))
    else:
        found = list(map(make, parts))
    return [example for part in found for example in part][:n]


def _part(mixture: Mixture, seed: int, part: int) -> list[Example]:
    drawn = episodes(
        _PART,
        seed=seed * 100_003 + part,
        modes=[mode for mode in MODES if mode != "none"],
        share_none=mixture.share_none,
        families=mixture.families,
        difficulty=mixture.difficulty,
    )
    rng = random.Random(f"examples {seed} {part}")
    return [_example(episode, rng.random() < mixture.share_hack) for episode in drawn]


def _example(episode: Episode, cheats: bool) -> Example:
    program = episode.exploit() if cheats and episode.mode != "none" else episode.honest()
    return Example(episode.prompt, episode.completion(program))
