"""The rules that are held against each other, all with one question: accused after how many nonces?

Legend of shapes: N nonces, R audits, C checked nonces, A numbers of nonces at which the verdict is asked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import special

from assay import stats
from assay.poc.protocol import get_pipeline
from assay.poc.verdict import Law, MachineNoise, Noise, fit_noise, sequential_test
from assay.research.clusters._builds import FloatArray

ALPHA, BETA = 1e-3, 1e-2
OURS, NAMED, FIRST, ORACLE = "ours", "ours, cheat named", "first version", "oracle"
COUNTS = ((0.41, 0.10, 0.05), (0.75, 0.10, 0.05), (0.02, 0.001, 0.01))
"""Published count tests: distance that is a mismatch, share of mismatches that is granted, and level."""

FIRST_EFFECT = 2.0
ASKED = (64, 300)
"""Numbers of nonces at which it is asked whether a node would be called honest."""

BoolArray = npt.NDArray[np.bool_]
_BINS = 16  # of the oracle's laws


class Rule(Protocol):
    """A rule for the distances of one audit."""

    def simulated(self, values_RC: npt.ArrayLike, *, at: Sequence[int] = ()) -> tuple[BoolArray, BoolArray]:
        """Return whether each audit accuses after each nonce, and whether it says honest after those asked for."""
        ...


@dataclass(frozen=True)
class CountRule:
    """A binomial test of the number of distances above a threshold, at a fixed number of nonces.

    Args:
        threshold: Distance above which a nonce is a mismatch.
        granted: Share of mismatches that an honest node is granted.
        level: Level of the test.
    """

    threshold: float
    granted: float
    level: float

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"count ({self.threshold:g}, {self.granted:g}, {self.level:g})"

    def simulated(self, values_RC: npt.ArrayLike, *, at: Sequence[int] = ()) -> tuple[BoolArray, BoolArray]:
        """Return whether the test of so many nonces accuses; it says honest wherever it does not."""
        missed_RC = np.cumsum(np.asarray(values_RC) > self.threshold, axis=1)
        checked_C = np.arange(1, missed_RC.shape[1] + 1)
        p_RC = np.where(missed_RC > 0, special.bdtrc(missed_RC - 1.0, checked_C, self.granted), 1.0)
        accused_RC = p_RC < self.level
        return accused_RC, ~accused_RC[:, np.asarray(at, dtype=int) - 1]


@dataclass(frozen=True)
class Oracle:
    """The likelihood ratio of a cheat's law over the honest one of that very pair, both known.

    The laws are histograms over common bins, which bound what a single nonce can say: of a cheat that is far off, a
    rule with tails may need a nonce less.

    Args:
        honest: Honest distances [N] of the pair.
        cheat: Distances [N] of the cheat.
    """

    honest: FloatArray
    cheat: FloatArray

    def simulated(self, values_RC: npt.ArrayLike, *, at: Sequence[int] = ()) -> tuple[BoolArray, BoolArray]:
        """Return whether the ratio reached 1/alpha, and whether it is below beta."""
        edges = np.quantile(np.concatenate([self.honest, self.cheat]), np.linspace(0, 1, _BINS + 1)[1:-1])
        honest, cheat = (self._shares(edges, one) for one in (self.honest, self.cheat))
        path_RC = np.log(cheat / honest)[np.searchsorted(edges, np.asarray(values_RC))].cumsum(axis=1)
        accused_RC = np.maximum.accumulate(path_RC, axis=1) >= -math.log(ALPHA)
        asked = np.asarray(at, dtype=int) - 1
        return accused_RC, (path_RC[:, asked] <= math.log(BETA)) & ~accused_RC[:, asked]

    @staticmethod
    def _shares(edges: FloatArray, values_N: FloatArray) -> FloatArray:
        counts = np.bincount(np.searchsorted(edges, values_N), minlength=_BINS) + 0.5
        return np.asarray(counts / counts.sum(), dtype=np.float64)


def fit(distances_N: FloatArray) -> "stats.NoiseFit[stats.LogNoise]":
    """Fit the law of published vectors."""
    return fit_noise(get_pipeline("artifact"), distances_N)  # type: ignore[return-value]


def rules_for(
    noise: MachineNoise,
    first: Law,
    effect: float | None,
    kind: str,
    judge: int,
    named: Mapping[str, Law] | None = None,
) -> dict[str, Rule]:
    """Return the rules that do not know the truth, for a machine of a kind against a validator's.

    Args:
        noise: Noise between the machines that are known.
        first: Law of the first version.
        effect: Effect from the power on these machines.
        kind: Kind of the machine that is judged.
        judge: Validator's machine.
        named: Laws of known cheats; the rule that knows them is left out without any.
    """
    law = noise.law_of(kind, judge)
    rules: dict[str, Rule] = {OURS: sequential_test(Noise(law, OURS, noise.spread, effect), alpha=ALPHA, beta=BETA)}
    if named:
        rules[NAMED] = sequential_test(Noise(law, NAMED, noise.spread, effect, named), alpha=ALPHA, beta=BETA)
    rules[FIRST] = sequential_test(Noise(first, FIRST, effect=FIRST_EFFECT), alpha=ALPHA, beta=BETA)
    return rules | {rule.name: rule for rule in (CountRule(*constants) for constants in COUNTS)}
