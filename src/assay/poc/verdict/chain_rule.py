"""Parameters of the count rule that a chain takes, chosen from measured laws of honest noise.

The rule of Gonka's chain counts vectors further apart than ``dist_threshold``, and calls a node
fraudulent where a one-sided binomial test of that count against ``p_mismatch`` gives a p-value
below ``p_value_threshold``. It has no law of its own, so both thresholds have to come from one.

Here ``p_mismatch`` is the largest rate at which honest machines that were not measured are accused
in at most ``p_value_threshold`` of audits, at the upper end of the 95 % interval of the share of
residuals above the threshold, averaged over the scale of machines. Among all thresholds of the
distance, that one is taken which catches a small share of cheap nonces best on the noisiest build.
"""

import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import scipy

from assay.errors import CalibrationError
from assay.poc.verdict.build_noise import BuildNoise
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.honest_noise import unpack_scores
from assay.poc.verdict.sample_plan import ALPHA, EFFECT
from assay.stats import proportion_interval
from assay.stats.chord import FloatArray

CHAIN_PRESET = "artifact"
CHAIN_SAMPLE = 200  # nonces of an audit on the chain, unless its parameters say otherwise
MULTIPLES = np.geomspace(1.0, 20.0, 121)  # thresholds that are tried, over the typical size
DIGITS = 3  # of a published parameter, at least
_interval = cache(proportion_interval)


@dataclass(frozen=True, kw_only=True)
class ChainRule:
    """The three parameters, under the names that the chain gives them."""

    dist_threshold: float
    p_mismatch: float
    p_value_threshold: float

    def fewest(self, n: int) -> int:
        """Return the fewest mismatches of n nonces that are called fraud; n + 1 where none are."""

        def is_fraud(count: int) -> bool:
            return bool(
                scipy.stats.binom.sf(count - 1, n, self.p_mismatch) < self.p_value_threshold
            )

        return bisect_left(range(n + 1), True, key=is_fraud)


DEFAULTS = {
    "default of the chain's client": ChainRule(
        dist_threshold=0.4, p_mismatch=0.1, p_value_threshold=0.05
    ),
    "default of its vLLM": ChainRule(dist_threshold=0.02, p_mismatch=0.001, p_value_threshold=0.01),
}
"""What the chain uses where nothing was measured."""


class Cheat(NamedTuple):
    """A share of nonces whose residuals are a multiple of the honest noise."""

    share: float
    multiple: float

    def __str__(self) -> str:
        part = "all" if self.share == 1 else f"{self.share:.0%} of the"
        return f"{part} nonces at {self.multiple:g} times the noise"


TARGET = Cheat(0.1, 5.0)
"""The cheat by which thresholds are compared, as samples of `verify` are planned for it."""

CHEATS = (Cheat(1.0, EFFECT["vector"]), TARGET, Cheat(0.4, 5.0), Cheat(1.0, 16.0))


@dataclass(frozen=True, kw_only=True)
class RuleCost:
    """What a rule costs honest and cheap nodes of one build, by audit of n nonces.

    Args:
        rule: Name of the rule.
        machines: Number formats of the build, or how many machines where these are unknown.
        false_accusation: Chance that an honest machine which was not measured is accused.
        low: Lower end of its 95 % interval, at that of the share of large residuals.
        high: Upper end.
        power: Chance that each cheat is accused, by its name.
    """

    rule: str
    machines: str
    false_accusation: float
    low: float
    high: float
    power: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ChainExport:
    """Chosen parameters, and what they and the defaults cost."""

    parameters: ChainRule
    checked: int
    costs: tuple[RuleCost, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; ``stat_test`` can be pasted into the model's parameters."""
        return {
            "stat_test": asdict(self.parameters),
            "checked": self.checked,
            "costs": [asdict(cost) for cost in self.costs],
        }


def export_rule(
    calibration: Calibration, *, checked: int = CHAIN_SAMPLE, alpha: float = ALPHA
) -> ChainExport:
    """Choose the parameters of the chain's rule, and measure what they cost.

    Args:
        calibration: Measured noise of the preset ``artifact``. One set of parameters serves all of
            its builds, so a file with a noisy build costs power against cheats of a quiet one.
        checked: Nonces of an audit.
        alpha: Bound on the false accusations of an audit.

    Raises:
        CalibrationError: No build is of that preset, or one is of a quick measurement.
    """
    builds = [
        build
        for build in calibration.builds
        if build.preset == CHAIN_PRESET and build.control is None
    ]
    if not builds:
        presets = ", ".join(sorted({build.preset for build in calibration.builds}))
        raise CalibrationError(
            f"a calibration of {presets}",
            wanted=f"one of {CHAIN_PRESET}, the preset of the chain",
            do=f"measure one: assay poc calibrate --model M --preset {CHAIN_PRESET} -o FILE",
        )
    if limits := next((build.limits for build in builds if build.limits), None):
        raise CalibrationError(
            limits,
            wanted="a full measurement: the rule rests on its tail",
            do=f"measure one: assay poc calibrate --model M --preset {CHAIN_PRESET} -o FILE",
        )
    tails = [_Tail(build, checked) for build in builds]
    noisiest = max(tails, key=lambda tail: tail.size)
    rules = [
        _bounded_rule(threshold, tails, checked, alpha)
        for threshold in dict.fromkeys(
            _rounded(size, math.ceil) for size in noisiest.size * MULTIPLES
        )
    ]
    # What is cheap on the noisiest build. No rule that spares that build sees less on a quiet one.
    best = max(rules, key=lambda rule: noisiest.power(rule, TARGET))
    named = {"measured": best, **DEFAULTS}
    costs = [tail.cost(name, rule) for name, rule in named.items() for tail in tails]
    return ChainExport(parameters=best, checked=checked, costs=tuple(costs))


def _bounded_rule(
    threshold: float, tails: "Sequence[_Tail]", checked: int, alpha: float
) -> ChainRule:
    """Return the rule of a threshold that accuses honest machines as often as alpha allows."""
    upper_ends = [(tail, tail.intervals(threshold)[:, 1]) for tail in tails]

    def is_bounded(count: int) -> bool:
        return all(tail.accused(rate_S, count) <= alpha for tail, rate_S in upper_ends)

    fewest = 1 + bisect_left(range(1, checked + 1), True, key=is_bounded)
    # The largest rate against which so many mismatches have a p-value of alpha.
    p_mismatch = 1.0
    if fewest <= checked:
        p_mismatch = float(scipy.stats.beta.ppf(alpha, fewest, checked - fewest + 1))
    rule = ChainRule(dist_threshold=threshold, p_mismatch=p_mismatch, p_value_threshold=alpha)
    for digits in range(DIGITS, sys.float_info.dig + 1):
        rule = replace(rule, p_mismatch=_rounded(p_mismatch, math.floor, digits))
        # Against a smaller rate, one mismatch less may be fraud: in long audits, three digits are
        # not enough.
        if rule.fewest(checked) >= fewest:
            break
    return rule


class _Tail:
    """How often residuals of one build are above a threshold, on machines of every scale, [S]."""

    def __init__(self, build: BuildNoise, checked: int) -> None:
        self._build = build
        self._checked = checked
        self._scales_S, self._weights_S = build.spread.fine
        self._scores = unpack_scores(build.scores) if build.scores else None
        self.size = build.law.size

    def power(self, rule: ChainRule, cheat: Cheat) -> float:
        """Return the chance that a rule accuses a cheat, over machines."""
        honest_S = self._shares(rule.dist_threshold)
        cheap_S = self._shares(rule.dist_threshold / cheat.multiple)
        rate_S = (1 - cheat.share) * honest_S + cheat.share * cheap_S
        return self.accused(rate_S, rule.fewest(self._checked))

    def cost(self, name: str, rule: ChainRule) -> RuleCost:
        """Return what a rule costs."""
        fewest = rule.fewest(self._checked)
        low_S, high_S = self.intervals(rule.dist_threshold).T
        formats = dict.fromkeys(" / ".join(pair) for pair in self._build.formats)
        measured = " and ".join(formats) or f"{len(self._build.machines)} machines"
        return RuleCost(
            rule=name,
            machines=measured,
            false_accusation=self.power(rule, Cheat(0.0, 1.0)),
            low=self.accused(low_S, fewest),
            high=self.accused(high_S, fewest),
            power={str(cheat): self.power(rule, cheat) for cheat in CHEATS},
        )

    def accused(self, rate_S: FloatArray, fewest: int) -> float:
        """Return the chance of so many mismatches, over machines, each at a rate of its own."""
        accused_S = scipy.stats.binom.sf(fewest - 1, self._checked, rate_S)
        return min(1.0, float(self._weights_S @ accused_S))

    def _shares(self, threshold: float) -> FloatArray:
        """Return the share of residuals above a threshold, measured or else by the law."""
        threshold_S = threshold / self._scales_S
        if self._scores is None:
            return self._build.law.survival(threshold_S)
        below_S = np.searchsorted(self._scores, threshold_S / self.size, side="right")
        return np.asarray(1 - below_S / len(self._scores), np.float64)

    def intervals(self, threshold: float) -> FloatArray:
        """Return the 95 % intervals of the share of residuals above a threshold, [S, 2]."""
        # Scores may be quantiles, which say nothing of the tail beyond them.
        kept = self._build.n if self._scores is None else len(self._scores)
        n = min(self._build.n, kept)
        # Rounded, because the product of a share of n and n may lie above the number that it is.
        counts_S = np.ceil(np.round(self._shares(threshold) * n, 9)).astype(int)
        return np.array([_interval(int(count), n) for count in counts_S])


def _rounded(value: float, direction: Callable[[float], int], digits: int = DIGITS) -> float:
    """Return a positive number with so many significant digits, rounded by ``direction``."""
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{direction(round(value / step, 9)) * step:.{digits}g}")
