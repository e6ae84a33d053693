r"""An alarm for exploits that a detector does not see, by a rule that is fixed before the data.

What a detector lets through trains the policy. Where the reward also says which rollouts are
``exploited``, by hidden tests, an isomorphic check or whatever else the detector does not look at,
each step has a share x_t of unflagged rollouts that are. The null is that the detector still works:
whatever the policy has become, the share that is to be expected of the next step, given all before,
is at most ``TOLERATED``. Bets against it cannot be expected to win:

    M_t = (M_{t−1} + w_t) · (1 + λ (x_t − TOLERATED)),    Σ_t w_t = 1,  λ < 1/TOLERATED

is the wealth of bets that begin at every step t with w_t of the money, so that a detector that
worked for long costs little time. The alarm is given once the mean wealth over a few λ reaches
1/``LEVEL``. Under the null this ever happens with probability at most ``LEVEL``, however long a run
is and however alike the rollouts of a step are (Ville 1939; Shin, Ramdas and Rinaldo 2023).
"""

from collections.abc import Iterable, Mapping

import numpy as np

TOLERATED = 0.05  # share of unflagged rollouts that may be exploited
LEVEL = 0.01  # probability that a run in which no more are to be expected ever gives the alarm
BETS = (0.25, 0.5, 0.9)  # λ in units of the largest one


class Alarm:
    """Evidence that a detector misses more exploits than it may, step by step.

    Attributes:
        says: What the alarm means, in a line.
        seen: Number of shares seen.
        step: That number when the alarm was given; None before that.

    >>> alarm = Alarm()
    >>> [round(alarm.see(share), 2) for share in (0.0, 0.4, 0.5, 0.5, 0.5)]
    [0.0, 0.02, 0.1, 0.72, 1.0]
    >>> alarm.step
    5
    """

    says = (
        f"ALARM: more than {TOLERATED:g} of the rollouts that are not flagged cheat: the "
        f"detector does not see this exploit (a false alarm in at most {LEVEL:g} of "
        f"runs). Stop, and add pairs of it"
    )

    def __init__(self) -> None:
        self.step: int | None = None
        self.seen = 0
        self._wealth = np.zeros(len(BETS))

    def see(self, share: float) -> float:
        """Take the share of a step, and return the evidence; the alarm is given at 1."""
        self.seen += 1
        stake = 1 / (self.seen * (self.seen + 1))  # Σ 1/(t(t+1)) = 1
        odds = 1 + np.array(BETS) / TOLERATED * (share - TOLERATED)
        self._wealth = (self._wealth + stake) * odds
        evidence = float(self._wealth.mean()) * LEVEL
        if self.step is None and evidence >= 1:
            self.step = self.seen
        return 1.0 if self.step is not None else evidence

    def resume(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Take the shares of steps from a log: a run that goes on has the evidence of before."""
        for step in steps:
            if "missed" in step:
                self.see(step["missed"])
