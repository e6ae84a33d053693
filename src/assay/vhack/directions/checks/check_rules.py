"""From a value, its interval and its nulls to a verdict, by rules that were fixed before."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, log2
from typing import Any

import numpy as np

from assay.stats.bootstrap import BootstrapInterval, group_bootstrap
from assay.vhack.directions.checks.check_report import (
    SWAPPED,
    TITLES,
    Check,
    CheckSettings,
    CheckVerdict,
    FloatArray,
)

# What the rule calls the value of each, and the bound that its interval must lie above.
_VALUES = {
    "pools": ("the AUROC", 0.5),
    "heldout": ("the share", 0.5),
    "random_null": ("the AUROC", 0.5),
    "sources": ("the difference", 0.0),
}

_TIE = 1e-12


def p_value(observed: float, draws: Sequence[float]) -> float:
    """Return the p-value of an observation, which counts as a draw (Phipson and Smyth 2010)."""
    reached = sum(draw >= observed - _TIE for draw in draws)
    return (1 + reached) / (1 + len(draws))


def bootstrap(
    statistic: Callable[..., float],
    samples: Sequence[FloatArray],
    groups: Sequence[Sequence[str]],
    settings: CheckSettings,
) -> BootstrapInterval:
    """Return a statistic with its group-bootstrap interval."""
    return group_bootstrap(
        statistic,
        samples,
        groups,
        n_resamples=settings.n_resamples,
        seed=settings.seed,
        confidence=settings.confidence,
    )


def judge(
    name: str,
    statistic: str,
    measured: BootstrapInterval,
    nulls: Mapping[str, Sequence[float]],
    settings: CheckSettings,
    smallest_p: float,
    *,
    details: Mapping[str, Any] | None = None,
) -> Check:
    """Return the check after applying the rule that checks 1 to 4 share.

    It passes if the value is reached by at most a share alpha of every null, and the lower end of
    its interval lies above the bound of the check and above the 1 − alpha quantile of every null.
    The first part alone bounds the probability that noise passes. Where only the interval is too
    wide, or the smallest p-value that the groups can give is above alpha, the verdict is
    ``undecided``.
    """
    p_values = {null: p_value(measured.value, draws) for null, draws in nulls.items()}
    if smallest_p > settings.alpha:
        more = ceil(log2(smallest_p / settings.alpha))
        verdict: CheckVerdict = "undecided"
        reason = (
            f"so few groups cannot give a p-value below {smallest_p:.3g}, and {settings.alpha:g} "
            f"is needed: add pairs "
            f"until at least {more} more group{'s are' if more > 1 else ' is'} scored"
        )
    else:
        faults = [
            f"p = {p:.3g} against {null}" for null, p in p_values.items() if p > settings.alpha
        ]
        wide = reached_levels(
            "interval", measured, {**nulls, "chance": [_VALUES[name][1]]}, settings
        )
        verdict, reason = decide(faults, *wide)
    rule = rule_of(name, nulls, settings)
    draws = {null: tuple(map(float, values)) for null, values in nulls.items()}
    return Check(
        name,
        TITLES[name],
        statistic,
        rule,
        measured,
        draws,
        p_values,
        verdict,
        reason,
        dict(details or {}),
    )


def reached_levels(
    subject: str,
    measured: BootstrapInterval,
    nulls: Mapping[str, Sequence[float]],
    settings: CheckSettings,
) -> tuple[list[str], list[str]]:
    """Return in words each null whose 1 − alpha quantile the interval does not lie above.

    First those where the value itself does not, then those where only the lower end does not.
    """
    levels = {null: float(np.quantile(draws, 1 - settings.alpha)) for null, draws in nulls.items()}
    faults = {
        null: f"the {subject} reaches down to {measured.low:.3g}, not above {level:.3g} of {null}"
        for null, level in levels.items()
        if measured.low <= level
    }
    below = [null for null in faults if measured.value <= levels[null]]
    return [faults[null] for null in below], [faults[null] for null in faults if null not in below]


def decide(
    faults: Sequence[str], below: Sequence[str], wide: Sequence[str]
) -> tuple[CheckVerdict, str]:
    """Return verdict and reason of a rule, from its faults and its :func:`reached_levels`."""
    if faults or below:
        return "fail", "; ".join([*faults, *below, *wide])
    if wide:
        return "undecided", "; ".join([*wide, "add pairs"])
    return "pass", "every part of the rule holds"


def rule_of(name: str, nulls: Iterable[str], settings: CheckSettings) -> str:
    """Return the rule of :func:`judge` in words."""
    (value_name, above), others = _VALUES[name], [null for null in nulls if null != SWAPPED]
    interval = f"the lower end of its {settings.confidence:.0%} group-bootstrap interval is above"
    quantile = f"1 − {settings.alpha:g} quantile"
    if len(others) > 1:
        return (
            f"Passes if of each null at most a share {settings.alpha:g} reaches {value_name}, and "
            f"{interval} the {quantile} "
            "of every null."
        )
    return (
        f"Passes if, with the labels of whole groups swapped at random, at most a share "
        f"{settings.alpha:g} reaches "
        f"{value_name}, and {interval} {above:g} and above the null's {quantile}."
    ) + "".join(f" So for {null} bases." for null in others)


def undecided_check(name: str, statistic: str, rule: str, reason: str) -> Check:
    """Return a check that could not be made."""
    return Check(name, TITLES[name], statistic, rule, None, {}, {}, "undecided", reason)
