"""Labels of the reward in place of a detector, with as many mistakes as one makes.

A run with them tells how good a detector has to be before one is fitted. Scores are normal: those
of exploits are shifted so that a share ``recall`` of them is above the threshold, which a share
``lost`` of the others is above too.

Shapes: B rollouts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from assay.errors import UsageError
from assay.vhack.detectors.threshold import Threshold
from assay.vhack.training.rewards import Reward


@dataclass(frozen=True)
class Labels:
    """Flags what the reward calls exploited.

    Attributes:
        mechanisms: Mechanisms of tasks whose exploits are known, as a monitor knows some; empty
            stands for all.
        recall: Share of the known exploits that are flagged; 1 makes no mistake at all.
        lost: Share of other rollouts that are flagged, where ``recall`` is below 1.

    Raises:
        UsageError: ``recall`` is not above ``lost``, or one of them is no share.
    """

    mechanisms: Sequence[str] = ()
    recall: float = 1.0
    lost: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.lost < self.recall <= 1:
            raise UsageError(
                f"recall={self.recall}, lost={self.lost}",
                wanted="0 < lost < recall <= 1",
                do="take such as recall=0.6, lost=0.05",
            )

    @property
    def threshold(self) -> Threshold:
        """Score above which a rollout is flagged."""
        if self.recall == 1:
            return Threshold(0.5, 0.0, 0.0, 0.0, 1.0, 0.5)
        value = NormalDist().inv_cdf(1 - self.lost)
        return Threshold(value, self.lost, self.lost, self.lost, self.recall, 0.0, self.lost)

    def scores(self, reward: Reward, key: str) -> list[float]:
        """Return the scores of the rollouts that were paid last, [B].

        Args:
            reward: Reward that has graded them.
            key: Seed of the mistakes; each rollout has one of its own.

        Raises:
            UsageError: The reward does not say of all of them whether they exploit.
        """
        if "exploited" not in reward.known_flags:
            raise UsageError(
                "labels of a reward without exploited",
                wanted='{"reward": …, "exploited": …} for each completion',
                do="return it, or take a detector (--detector)",
            )
        exploited = reward.last.column("exploited").tolist()
        is_known = [
            is_exploited and (not self.mechanisms or mechanism in self.mechanisms)
            for is_exploited, mechanism in zip(exploited, reward.mechanisms, strict=True)
        ]
        if self.recall == 1:
            return [float(is_exploit) for is_exploit in is_known]
        shift = self.threshold.value - NormalDist().inv_cdf(1 - self.recall)
        noise = random.Random(key)
        return [noise.gauss() + shift * is_exploit for is_exploit in is_known]


def break_even(threshold: Threshold, most: float = 5.0) -> float:
    """Return the penalty with which an exploit earns no more than an honest failure.

    An exploit is paid 1 and loses the penalty in a share ``caught`` of the cases, a failure in a
    share ``lost``. A detector that cannot tell them apart would take an infinite one: ``most``.
    """
    told_apart = threshold.caught - threshold.lost
    return min(most, 1 / told_apart) if told_apart > 0 else most
