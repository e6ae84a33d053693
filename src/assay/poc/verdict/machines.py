"""The noise of a machine that was not measured, predicted from the noise between those that were.

The size of the noise between two machines i and j of one build is s_ij, the median of their residuals. All pairs share
one shape, which is fitted to all of them together. The size predicted for a new machine and a validator's machine j is

    usual_j = median over kinds k of median over machines i of kind k of s_ij.

Machines of one kind may agree far more closely than others. So the validator's own kind is left out where another kind
was measured. If machines of the new machine's kind were measured and are noisier than usual_j, their size is taken
instead. If they were quieter, it is not: that promises nothing.

The spread is the root mean square of ln(size/predicted) over machines that were left out of the measurement and lay
above their prediction. Deviations downwards do not count, because only larger noise can accuse. A few machines say
little about the spread, so it is combined with the prior :data:`PRIOR`.

Legend of shapes: M machines, N nonces.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np

from assay import stats
from assay.poc.protocol.record import STRICT
from assay.poc.verdict.noise import FloatArray, Law, Noise, sequential_test
from assay.stats.noise import NoiseFit, Spread

Pair = tuple[int, int]
Fit = Callable[[FloatArray], NoiseFit[stats.ScaleNoise] | NoiseFit[stats.LogNoise]]
Progress = Callable[[int, int], None]

PRIOR = Spread(sd=0.03, dof=30.0)
"""Spread of ln size between machines of one build that is assumed before any was measured.

It was chosen on sets of two quantised mixtures (docs/networks.md). Machines that were left out lay above their
prediction by .02 in the root mean square for one mixture, and by up to .07 for the other.
"""

PAIR_SPREAD = 0.02
"""Spread of ln size of one pair of machines between blocks, added to the error of its measurement."""

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
        pairs: Median residual by pair (i, j) with i < j; pairs with median 0 are left out.
        kinds: Kind of every machine, such as its GPU; empty where it is unknown.
    """

    pairs: Mapping[Pair, float]
    kinds: tuple[str, ...]

    def between(self, one: int, other: int) -> float | None:
        """Return the size between two machines; None where it was not measured."""
        return self.pairs.get((min(one, other), max(one, other)))

    @property
    def typical(self) -> float:
        """Median size over all pairs."""
        return float(np.median(list(self.pairs.values())))

    def without(self, machine: int) -> "Sizes":
        """Return the sizes of the pairs that a machine is not in."""
        return Sizes({pair: size for pair, size in self.pairs.items() if machine not in pair}, self.kinds)

    def predict(self, kind: str, validator: int | None = None) -> float:
        """Return the size to expect of a new machine of a kind against a validator's machine, or against any."""
        machines = range(len(self.kinds))
        judges = [validator] if validator is not None else list(machines)
        against = {
            (i, j): size for j in judges for i in machines if i != j and (size := self.between(i, j)) is not None
        }
        if not against:  # the validator's machine was measured with none of these
            return self.typical
        foreign = {
            (i, j): size for (i, j), size in against.items() if not self.kinds[i] or self.kinds[i] != self.kinds[j]
        }
        usual = float(np.median(list(self._by_kind(foreign or against).values())))
        alike = self._by_kind(against).get(kind) if kind else None
        return usual if alike is None else max(usual, alike)

    def _by_kind(self, sizes: Mapping[Pair, float]) -> dict[str | int, float]:
        """Return the median size by kind of the first machine; a machine of unknown kind is a kind of its own."""
        found: dict[str | int, list[float]] = {}
        for (i, _), size in sizes.items():
            found.setdefault(self.kinds[i] or i, []).append(size)
        return {kind: float(np.median(values)) for kind, values in found.items()}

    def deviations(self) -> FloatArray:
        """Return ln(size / predicted) of every machine as if it were new, against every other machine."""
        found, machines = [], range(len(self.kinds))
        for i in machines:
            rest = self.without(i)
            if rest.pairs:
                measured = [(j, size) for j in machines if (size := self.between(i, j)) is not None]
                found += [math.log(size / rest.predict(self.kinds[i], j)) for j, size in measured]
        return np.array(found)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How often honest machines were accused that were left out of the measurement.

    Args:
        accused: Share of audits that accuse.
        low: Lower end of its 95 % interval over machines (:func:`assay.stats.grouped_share_interval`).
        high: Upper end of that interval. It is at least that of as many machines without an accusation, because few
            machines do not show that all others are like them.
        worst: Largest share of one pair of machines.
        pairs: Number of ordered pairs.
        audits: Number of audits of each pair.
        checked: Number of nonces of an audit.
    """

    __pydantic_config__: ClassVar = STRICT

    accused: float
    low: float
    high: float
    worst: float
    pairs: int
    audits: int
    checked: int

    @property
    def holds(self) -> bool:
        """Whether at most one audit in a thousand accuses on average, and five in a thousand in the worst pair."""
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

    def predict_law(self, kind: str, validator: int | None = None) -> Law:
        """Return the law of a new machine of a kind against a validator's machine."""
        return self.law.scaled(self.sizes.predict(kind, validator) / self.sizes.typical)


def fit_machines(
    residuals: Mapping[Pair, FloatArray], kinds: Sequence[str], fit: Fit, *, between_blocks: float = PAIR_SPREAD
) -> MachineNoise:
    """Fit the noise of a build to the residuals of pairs of machines.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine; empty where it is unknown.
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
    effects: Sequence[float] = EFFECTS,
    audits: int = AUDITS,
    between_blocks: float = PAIR_SPREAD,
    progress: Progress | None = None,
) -> tuple[float | None, LeftOut | None]:
    """Return the smallest effect at which machines left out are not accused, and how often they are accused then.

    Every machine is left out once. Its audits against every other machine draw nonces without replacement, and are
    judged by the law that the other machines give. If no effect is large enough, the last one is returned. With fewer
    than three machines both values are None.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine.
        fit: Function that fits a law to residuals.
        effects: Multiples of the noise that may count as another computation, in ascending order.
        audits: Number of audits of every ordered pair.
        between_blocks: Spread of ln size of one pair between blocks.
        progress: Function that is called with (machines done, machines in all) for every effect.
    """
    if len(kinds) < FEWEST_MACHINES:
        return None, None
    checked = min(AUDITED, *(errors_N.size for errors_N in residuals.values()))
    for effect in effects:
        rng = np.random.default_rng(0)
        shares: list[float] = []
        left: list[int] = []
        for machine in range(len(kinds)):
            rest = {pair: errors_N for pair, errors_N in residuals.items() if machine not in pair}
            mine = {pair: errors_N for pair, errors_N in residuals.items() if machine in pair and errors_N.any()}
            if rest and mine:
                noise = fit_machines(rest, kinds, fit, between_blocks=between_blocks)
            for pair, errors_N in mine.items() if rest else ():
                law = noise.predict_law(kinds[machine], pair[0] if pair[1] == machine else pair[1])
                test = sequential_test(Noise(law, "left out", noise.spread, effect))
                drawn = [rng.permutation(errors_N)[:checked] for _ in range(audits)]
                shares.append(float(test.accusations(np.stack(drawn))[:, -1].mean()))
                left.append(machine)
            if progress:
                progress(machine + 1, len(kinds))
        if not shares:
            return None, None
        low, high = stats.grouped_share_interval(shares, left)
        left_out = LeftOut(
            accused=float(np.mean(shares)),
            low=low,
            high=high,
            worst=max(shares),
            pairs=len(shares),
            audits=audits,
            checked=checked,
        )
        if left_out.holds:
            break
    return effect, left_out


def all_pairs(count: int) -> list[Pair]:
    """Return all pairs (i, j) of machines with i < j."""
    return list(combinations(range(count), 2))
