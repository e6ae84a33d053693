"""From a value, its interval and its nulls to a verdict, as all five checks do it."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, log2
from typing import Any

import numpy as np

from assay.stats import group_bootstrap
from assay.vhack.checks._types import Check, CheckSettings, CheckVerdict, FloatArray, Interval

SWAPPED = "labels swapped"
"""Name of the exact null."""

_TIE = 1e-12


def p_value(observed: float, draws: Sequence[float]) -> float:
    """Return the share of draws that reach the observed value, which counts as a draw (Phipson and Smyth 2010)."""
    reached = sum(draw >= observed - _TIE for draw in draws)
    return (1 + reached) / (1 + len(draws))


def measure(
    statistic: Callable[..., float],
    samples: Sequence[FloatArray],
    groups: Sequence[Sequence[str]],
    settings: CheckSettings,
) -> Interval:
    """Return a statistic with its group-bootstrap interval."""
    found = group_bootstrap(
        statistic,
        samples,
        groups,
        n_resamples=settings.n_resamples,
        seed=settings.seed,
        confidence=settings.confidence,
    )
    return Interval(found.value, found.low, found.high)


def swap_rule(settings: CheckSettings, what: str, above: float, swapped: str = "whole groups") -> str:
    """Return the rule of a check whose only null is that labels mean nothing."""
    return (
        f"Passes if, with the labels of {swapped} swapped at random, at most a share {settings.alpha:g} reaches "
        f"{what}, and the lower end of its {settings.confidence:.0%} group-bootstrap interval is above {above:g} and "
        f"above the null's 1 − {settings.alpha:g} quantile."
    )


def judge(
    *,
    name: str,
    title: str,
    statistic: str,
    rule: str,
    measured: Interval,
    nulls: Mapping[str, Sequence[float]],
    above: float,
    settings: CheckSettings,
    smallest_p: float = 0.0,
    details: Mapping[str, Any] | None = None,
) -> Check:
    """Return the check after applying the rule that all checks share.

    It passes if the value is reached by at most a share alpha of every null, and the lower end of its interval lies
    above ``above`` and above the 1 − alpha quantile of every null. The first part alone bounds the probability that
    noise passes; with too few groups it cannot be met, and the verdict is ``undecided``.
    """
    p_values = {null: p_value(measured.value, draws) for null, draws in nulls.items()}
    quantiles = {null: float(np.quantile(draws, 1 - settings.alpha)) for null, draws in nulls.items()}
    verdict: CheckVerdict
    if smallest_p > settings.alpha:
        verdict = "undecided"
        more = ceil(log2(smallest_p / settings.alpha))
        reason = (
            f"so few groups cannot give a p-value below {smallest_p:.3g}, and {settings.alpha:g} is needed: add pairs "
            f"until at least {more} more group{'s are' if more > 1 else ' is'} scored"
        )
    else:
        faults = [f"p = {p:.3g} against {null}" for null, p in p_values.items() if p > settings.alpha]
        if measured.low <= above:
            faults.append(f"the interval reaches down to {measured.low:.3g}, not above {above:g}")
        faults += [
            f"the interval reaches down to {measured.low:.3g}, not above {level:.3g} of {null}"
            for null, level in quantiles.items()
            if measured.low <= level
        ]
        verdict, reason = ("fail", "; ".join(faults)) if faults else ("pass", "every part of the rule holds")
    draws = {null: tuple(float(draw) for draw in values) for null, values in nulls.items()}
    return Check(name, title, statistic, rule, measured, draws, p_values, verdict, reason, dict(details or {}))


def undecided(name: str, title: str, statistic: str, rule: str, reason: str) -> Check:
    """Return a check that could not be made."""
    return Check(name, title, statistic, rule, None, {}, {}, "undecided", reason)
