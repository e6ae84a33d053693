"""The noise of a machine that was not measured, from the noise between those that were.

Between two machines i and j of one build the residuals of many nonces have a common shape and a size s_ij, their
median. The shape is fitted to all pairs together. The size of a new machine i against a validator's machine j is
predicted by the validator's usual size: the median over kinds of machines of the median of its s_kj, without the
validator's own kind where another was measured, because machines of one kind may agree far more closely than others. If
machines of i's kind were measured and differ more from j, theirs is taken: a kind of GPU may be noisier, but that it
once was quieter is no promise. What is left is
the spread: how far the sizes of machines left out of the measurement lay above their prediction. Few machines say
little about it, so it is combined with a prior of :data:`PRIOR`, as twelve machines would say.

Only larger noise can accuse, so only deviations upwards count.

Legend of shapes: M machines, N nonces.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.poc.verdict.noise import Law, Noise, sequential_test
from assay.stats.noise import Spread

FloatArray = npt.NDArray[np.float64]
Pair = tuple[int, int]

PRIOR = Spread(sd=0.03, dof=30.0)
"""Spread of ln size between machines of one build that is assumed before any was measured.

Fixed on sets of two quantised mixtures (docs/networks.md). Where a machine was left out, it lay above its prediction by
.02 in the root mean square for one of them and by up to .07 for the other.
"""

PAIR_SPREAD = 0.02
"""Spread of ln size of one pair of machines between blocks, beside the error of its measurement."""

AUDITS = 200  # of every left-out machine against every other one
AUDITED = 300  # nonces of such an audit, or all where fewer were measured
EFFECTS = (1.25, 1.5, 2.0, 3.0, 4.0)
MOST_ACCUSED, WORST_ACCUSED = 1e-3, 5e-3  # share of honest audits of left-out machines: on average, of one pair
FEWEST_MACHINES = 3  # that show how machines differ
_WIDEST = 0.9  # spread: beyond it nothing is known


@dataclass(frozen=True)
class Sizes:
    """Sizes of the noise between machines.

    Args:
        pairs: Median residual by pair (i, j) with i < j; a pair of which half of the residuals are zero is left out.
        kinds: Kind of every machine, such as its GPU; empty where it is not known.
    """

    pairs: Mapping[Pair, float]
    kinds: tuple[str, ...]

    def of(self, one: int, other: int) -> float | None:
        """Return the size between two machines, None where it was not measured."""
        return self.pairs.get((min(one, other), max(one, other)))

    @property
    def typical(self) -> float:
        """Median size over all pairs."""
        return float(np.median(list(self.pairs.values())))

    def without(self, machine: int) -> "Sizes":
        """Return the sizes of the pairs that a machine is not in."""
        return Sizes({pair: size for pair, size in self.pairs.items() if machine not in pair}, self.kinds)

    def predicted(self, kind: str, validator: int | None = None) -> float:
        """Return the size that a new machine of a kind should have against a validator's machine, or any of them."""
        machines = range(len(self.kinds))
        judges = [validator] if validator is not None else list(machines)
        against = {(i, j): size for j in judges for i in machines if i != j and (size := self.of(i, j)) is not None}
        if not against:  # the validator's machine was measured with none of these
            return self.typical
        foreign = {
            (i, j): size for (i, j), size in against.items() if not self.kinds[i] or self.kinds[i] != self.kinds[j]
        }
        usual = float(np.median(list(self._by_kind(foreign or against).values())))
        alike = self._by_kind(against).get(kind) if kind else None
        return usual if alike is None else max(usual, alike)

    def _by_kind(self, sizes: Mapping[Pair, float]) -> dict[str | int, float]:
        """Return the median size of every kind of the first machine; one that is not known is a kind of its own."""
        found: dict[str | int, list[float]] = {}
        for (i, _), size in sizes.items():
            found.setdefault(self.kinds[i] or i, []).append(size)
        return {kind: float(np.median(values)) for kind, values in found.items()}

    def deviations(self) -> FloatArray:
        """Return ln(size / predicted) of every machine as if it were new, against every other one as the validator."""
        found, machines = [], range(len(self.kinds))
        for i in machines:
            rest = self.without(i)
            if rest.pairs:
                measured = [(j, size) for j in machines if (size := self.of(i, j)) is not None]
                found += [math.log(size / rest.predicted(self.kinds[i], j)) for j, size in measured]
        return np.array(found)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How often audits of honest machines accused that were left out of the measurement.

    Args:
        accused: Share of the audits.
        low: Lower end of its 95 % interval over machines (:func:`assay.stats.grouped_share_interval`).
        high: Upper end of it, at least that of as many machines of which none was accused: few machines do not show
            that none is unlike them.
        worst: Largest share of one pair of machines.
        pairs: Number of ordered pairs.
        audits: Number of audits of each.
        checked: Number of nonces of an audit.
    """

    accused: float
    low: float
    high: float
    worst: float
    pairs: int
    audits: int
    checked: int

    @property
    def holds(self) -> bool:
        """Whether the promised bounds hold: one audit in a thousand on average, five in the worst pair."""
        return self.accused <= MOST_ACCUSED and self.worst <= WORST_ACCUSED


@dataclass(frozen=True)
class MachineNoise:
    """Noise of one build, fitted to pairs of machines.

    Args:
        law: Law at the typical size.
        sizes: Sizes by pair.
        spread: Spread of a machine that was not measured.
        known: Spread of a pair that was measured: the error of its size.
    """

    law: Law
    sizes: Sizes
    spread: Spread
    known: Spread

    def law_of(self, kind: str, validator: int | None = None) -> Law:
        """Return the law of a new machine of a kind against a validator's machine."""
        return self.law.scaled(self.sizes.predicted(kind, validator) / self.sizes.typical)


Fit = Callable[[FloatArray], "stats.NoiseFit[stats.ScaleNoise] | stats.NoiseFit[stats.LogNoise]"]


def fit_machines(
    residuals: Mapping[Pair, FloatArray], kinds: Sequence[str], fit: Fit, *, between_blocks: float = PAIR_SPREAD
) -> MachineNoise:
    """Fit the noise of a build to the residuals of pairs of machines.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine; empty where it is not known.
        fit: Function that fits a law to residuals.
        between_blocks: Spread of ln size of one pair between blocks.
    """
    size = {pair: float(np.median(np.abs(errors_N))) for pair, errors_N in residuals.items()}
    some = {pair: value for pair, value in size.items() if value > 0}
    if not some:  # machines that agree to the bit
        law = fit(np.concatenate(list(residuals.values()))).reached
        return MachineNoise(law, Sizes(dict.fromkeys(size, law.size), tuple(kinds)), PRIOR, PRIOR)
    sizes = Sizes(some, tuple(kinds))
    pooled_N = np.concatenate([residuals[pair] * (sizes.typical / value) for pair, value in some.items()])
    found = fit(pooled_N)
    fewest = min(residuals[pair].size for pair in some)
    error = found.error * math.sqrt(pooled_N.size / fewest)  # of the size of one pair
    deviations = sizes.deviations()
    upwards = deviations[deviations > 0]
    machines = len({i for pair in some for i in pair})
    squares = (machines - 1) * float(np.mean(upwards**2)) if upwards.size else 0.0
    dof = PRIOR.dof + machines - 1
    known = min(math.hypot(error, between_blocks), _WIDEST)
    new = min(math.hypot(math.sqrt((PRIOR.dof * PRIOR.sd**2 + squares) / dof), known), _WIDEST)
    return MachineNoise(found.reached, sizes, Spread(new, dof), Spread(known, PRIOR.dof))


def leave_out(
    residuals: Mapping[Pair, FloatArray],
    kinds: Sequence[str],
    fit: Fit,
    *,
    effect: float,
    audits: int = AUDITS,
    between_blocks: float = PAIR_SPREAD,
    progress: Callable[[int, int], None] | None = None,
) -> LeftOut | None:
    """Return how often honest machines are accused that were left out of the fit; None with fewer than three.

    Every machine is left out once. Its audits against each other machine, of nonces drawn without replacement, are
    judged by the law that the others give.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine.
        fit: Function that fits a law to residuals.
        effect: Smallest multiple of the noise that counts as another computation.
        audits: Number of audits of every ordered pair.
        between_blocks: Spread of ln size of one pair between blocks.
        progress: Function that is called with (machines done, machines in all).
    """
    if len(kinds) < FEWEST_MACHINES:
        return None
    rng = np.random.default_rng(0)
    shares: list[list[float]] = []
    checked = min(AUDITED, *(errors_N.size for errors_N in residuals.values()))
    for machine in range(len(kinds)):
        rest = {pair: errors_N for pair, errors_N in residuals.items() if machine not in pair}
        mine = {pair: errors_N for pair, errors_N in residuals.items() if machine in pair and errors_N.any()}
        if rest and mine:
            noise = fit_machines(rest, kinds, fit, between_blocks=between_blocks)
            shares.append([])
            for pair, errors_N in mine.items():
                judge = pair[0] if pair[1] == machine else pair[1]
                law = noise.law_of(kinds[machine], judge)
                test = sequential_test(Noise(law, "left out", noise.spread, effect))
                drawn = [rng.permutation(errors_N)[:checked] for _ in range(audits)]
                shares[-1].append(float(test.accusations(np.stack(drawn))[:, -1].mean()))
        if progress:
            progress(machine + 1, len(kinds))
    return _summary(shares, audits, checked) if shares else None


def effect_from_power(
    residuals: Mapping[Pair, FloatArray],
    kinds: Sequence[str],
    fit: Fit,
    *,
    audits: int = AUDITS,
    between_blocks: float = PAIR_SPREAD,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float | None, LeftOut | None]:
    """Return the smallest effect at which machines left out are not accused, and how often they are then.

    Both are None with fewer than three machines. Where no effect is large enough, the largest one is returned.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine.
        fit: Function that fits a law to residuals.
        audits: Number of audits of every ordered pair.
        between_blocks: Spread of ln size of one pair between blocks.
        progress: Function that is called with (machines done, machines in all) for every effect.
    """
    for effect in EFFECTS:
        left_out = leave_out(
            residuals, kinds, fit, effect=effect, audits=audits, between_blocks=between_blocks, progress=progress
        )
        if left_out is None:
            return None, None
        if left_out.holds:
            break
    return effect, left_out


def _summary(shares: list[list[float]], audits: int, checked: int) -> LeftOut:
    values = [share for of_machine in shares for share in of_machine]
    accused = float(np.mean(values))
    machines = [i for i, of_machine in enumerate(shares) for _ in of_machine]
    low, high = stats.grouped_share_interval(values, machines)
    return LeftOut(
        accused=accused,
        low=low,
        high=high,
        worst=max(values),
        pairs=len(values),
        audits=audits,
        checked=checked,
    )


def pairs_of(count: int) -> list[Pair]:
    """Return all pairs (i, j) of machines with i < j."""
    return list(combinations(range(count), 2))
