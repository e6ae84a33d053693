"""Settings and results of the five checks, and the rules from a value to a verdict.

The rules were fixed before: a value, its interval and its nulls give the verdict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, log2
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from assay.errors import DataError, UsageError
from assay.stats.bootstrap import BootstrapInterval, group_bootstrap
from assay.vhack.detectors.comparison import Comparison
from assay.vhack.directions.basis.basis import Origin
from assay.vhack.names import CHECK, METHODS
from assay.vhack.pairs.pairs import validated

FloatArray = npt.NDArray[np.float64]

CheckVerdict = Literal["pass", "fail", "undecided"]

TITLES = {
    "pools": "cin of hack against clean samples",
    "heldout": "Held-out pairs of held-out groups",
    "random_null": "Against random bases",
    "sources": "cin by source",
    "stability": "Stability under a group bootstrap",
}
"""What each of the five checks looks at, in the order of the design."""

CHECKS = tuple(TITLES)
"""Names of the five checks."""

# Names of nulls: the exact one, axes uniform among all orthonormal ones, axes of differences
# between clean sides.
SWAPPED = "labels swapped"

HAAR = "Haar"

CLEAN_CLEAN = "clean-clean"

EXIT_CODES: dict[CheckVerdict, int] = {"pass": 0, "fail": 1, "undecided": 2}
"""What a command exits with, by verdict."""

# What the rule calls the value of each, and the bound that its interval must lie above.
_VALUES = {
    "pools": ("the AUROC", 0.5),
    "heldout": ("the share", 0.5),
    "random_null": ("the AUROC", 0.5),
    "sources": ("the difference", 0.0),
}

_TIE = 1e-12
# A share may be above 1 by rounding.
_LARGEST = 1.001


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """Amount of evidence and strictness of the rules.

    Attributes:
        k_use: Number of axes per module.
        tau_axis: Share of the first singular value below which an axis is not used.
        method: Name of the method that bases are fitted with; a given basis is checked by its own.
        n_folds: Number of parts into which the groups are divided for ``svd`` without a given
            basis.
        alpha: Largest probability with which a check passes pure noise.
        confidence: Probability that an interval covers the true value.
        n_flips: Number of random swaps of the labels, whole groups at a time.
        n_null: Number of bases drawn from each null.
        n_splits: Number of random divisions of the groups into two halves.
        n_resamples: Number of draws of the group bootstrap.
        seed: Seed of every random choice.
    """

    k_use: int = 5
    tau_axis: float = 0.0
    method: str = Origin.method
    n_folds: int = 5
    alpha: float = 0.05
    confidence: float = 0.95
    n_flips: int = 499
    n_null: int = 99
    n_splits: int = 20
    n_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.k_use, self.n_flips, self.n_null, self.n_splits, self.n_resamples)
        good = (
            min(counts) >= 1
            and self.n_folds >= 2
            and 0 < self.alpha < 1
            and 0 < self.confidence < 1
        )
        enough = (
            self.alpha > 0
            and f"at least {1 / self.alpha:.0f} flips and null bases, for a p-value below alpha"
        )
        for is_good, wanted in (
            (self.method in METHODS, f"method {' or '.join(METHODS)}"),
            (
                good and 0 <= self.tau_axis <= 1 and self.seed >= 0,
                "positive counts, 2 folds or more, shares in (0, 1)",
            ),
            ((1 + min(self.n_flips, self.n_null)) * self.alpha >= 1, str(enough)),
        ):
            if not is_good:
                raise UsageError(
                    f"method={self.method!r} in {self}",
                    wanted=wanted,
                    do="correct the one that is out of range, or leave it out",
                )


@dataclass(frozen=True, slots=True)
class Check:
    """One of the five checks."""

    name: str  # one of ``CHECKS``
    title: str  # question that it answers, in words
    statistic: str  # what the value is, in words
    rule: str  # condition to pass, fixed before the value was known
    measured: BootstrapInterval | None  # None where it could not be measured
    nulls: Mapping[str, tuple[float, ...]]  # draws of the statistic by name of the null
    p_values: Mapping[str, float]  # probability of at least this value by name of the null
    verdict: CheckVerdict
    reason: str  # part of the rule that decided
    # Numbers that are not part of the rule.
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """All five checks with the numbers that a report draws.

    Attributes:
        checks: Checks in the order of ``CHECKS``.
        hack: Held-out scores of the hack sides.
        clean: Held-out scores of the clean sides, in the same order.
        groups: Group of each pair, in that order.
        design: Description of which pairs were fitted to and which were scored.
        settings: Settings of the checks.
        origin: Model and pairs.
        detectors: All detectors side by side on these pairs, groups held out; None where they were
            not compared.
    """

    checks: tuple[Check, ...]
    __pydantic_config__: ClassVar = ConfigDict(allow_inf_nan=False)

    hack: tuple[float, ...]
    clean: tuple[float, ...]
    groups: tuple[str, ...]
    design: str
    settings: CheckSettings
    origin: Mapping[str, Any] = field(default_factory=dict)
    detectors: Comparison | None = None

    def __getitem__(self, name: str) -> Check:
        """Return the check with this name."""
        return next(check for check in self.checks if check.name == name)

    @property
    def verdict(self) -> CheckVerdict:
        """``fail`` if any check fails, else ``undecided`` if any is, else ``pass``."""
        verdicts = {check.verdict for check in self.checks}
        return "fail" if "fail" in verdicts else "undecided" if "undecided" in verdicts else "pass"

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 undecided."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object with a schema field; `from_dict` reads it back."""
        return {"schema": CHECK, "verdict": self.verdict, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "CheckReport":
        """Return the report that `as_dict` wrote.

        Raises:
            DataError: The record has another schema, or a value is missing or has another type, or
                not all five checks are there.
        """
        try:
            if record.get("schema") != CHECK:
                raise ValueError(f"schema {record.get('schema')!r}")
            report = validated(cls, record)
            if (names := tuple(check.name for check in report.checks)) != CHECKS:
                raise ValueError(f"it has the checks {names}")
            if not all(
                [
                    report.hack,
                    report.clean,
                    *(draws for check in report.checks for draws in check.nulls.values()),
                ]
            ):
                raise ValueError("it has no scores, or a null without draws")
            if max(map(abs, (*report.hack, *report.clean))) > _LARGEST:
                raise ValueError("it has scores that are no shares")
        except ValueError as error:
            raise DataError(
                f"a check report that cannot be used: {error}",
                wanted=f"what `assay vhack check --json` prints, schema {CHECK}",
                do="run the checks again",
            ) from None
        return report


def p_value(observed: float, draws: Sequence[float]) -> float:
    """Return the p-value of an observation, which counts as a draw (Phipson and Smyth 2010)."""
    return (1 + sum(draw >= observed - _TIE for draw in draws)) / (1 + len(draws))


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
        verdict, reason = decide(
            faults, "interval", measured, {**nulls, "chance": [_VALUES[name][1]]}, settings
        )
    return Check(
        name,
        TITLES[name],
        statistic,
        rule_of(name, nulls, settings),
        measured,
        {null: tuple(map(float, values)) for null, values in nulls.items()},
        p_values,
        verdict,
        reason,
        dict(details or {}),
    )


def decide(
    faults: Sequence[str],
    subject: str,
    measured: BootstrapInterval,
    nulls: Mapping[str, Sequence[float]],
    settings: CheckSettings,
) -> tuple[CheckVerdict, str]:
    """Return verdict and reason of a rule, from its faults and the interval, called ``subject``.

    A value that is not above the 1 − alpha quantile of a null is a fault too. Where only the lower
    end is not, more pairs may show it.
    """
    levels = {null: float(np.quantile(draws, 1 - settings.alpha)) for null, draws in nulls.items()}
    reached = {
        null: f"the {subject} reaches down to {measured.low:.3g}, not above {level:.3g} of {null}"
        for null, level in levels.items()
        if measured.low <= level
    }
    below = [words for null, words in reached.items() if measured.value <= levels[null]]
    wide = [words for null, words in reached.items() if measured.value > levels[null]]
    if faults or below:
        return "fail", "; ".join([*faults, *below, *wide])
    if wide:
        return "undecided", "; ".join([*wide, "add pairs"])
    return "pass", "every part of the rule holds"


def rule_of(name: str, nulls: Iterable[str], settings: CheckSettings) -> str:
    """Return the rule of :func:`judge` in words."""
    value_name, above = _VALUES[name]
    others = [null for null in nulls if null != SWAPPED]
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
