"""The fit of a build's noise to pairs of machines, and the test on machines that are left out.

The spread of a machine that was not measured is that of ln(size/predicted) over machines that were
left out of the measurement (:func:`spread_of_new`).

Legend of shapes: M machines, N nonces.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy

from assay import stats
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.verdict.build_noise import (
    FEWEST_MACHINES,
    BuildNoise,
    LeftOut,
    Machine,
    MachineNoise,
    Pair,
    Sizes,
)
from assay.poc.verdict.honest_noise import Law, Noise, fit_noise, pack_scores
from assay.poc.verdict.sample_plan import BETA, sequential_test
from assay.stats.chord import FloatArray
from assay.stats.noise_laws import Spread

# Spread of ln size between machines of one build that is assumed before any was measured. It was
# chosen on sets of two quantised mixtures (docs/networks.md): machines left out lay above their
# prediction by .02 in the root mean square for one mixture, and by up to .07 for the other.
PRIOR = Spread(sd=0.03, dof=30.0)
# quantile of residuals by which the widest pair is chosen: pairs differ in shape, not in size alone
WIDTH = 0.95
AUDITS = 200  # of every left-out machine against every other one
# Nonces of such an audit, or all where fewer were measured.
AUDITED = 300
EFFECTS = (1.25, 1.5, 2.0, 3.0, 4.0)
_WIDEST = 0.9  # spread: beyond it nothing is known
# spread of ln size of one pair of machines between blocks, added to the error of its measurement
PAIR_SPREAD = 0.02
# spread of ln size of distances between blocks, where the law does not know the block's own scale
BLOCK_SPREAD = 0.07
SCALED_SPREAD = (
    0.03  # where the law is relative to the length of the block's folded head (block_scale.json)
)
Fit = Callable[[FloatArray], tuple[Law, float]]
Progress = Callable[[int, int], None]
Residuals = Mapping[Pair, FloatArray]


def fit_build(
    measured: Residuals,
    machines: tuple[Machine, ...],
    pipeline: Pipeline,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> BuildNoise:
    """Fit a build's noise to the residuals of its pairs of machines.

    With a ``control``, ``measured`` has the scores that it gives. What is ``known`` are fields of
    :class:`BuildNoise`: ``digest``, ``hidden_size``, ``effective_dimension`` and ``control``.
    """
    of_distances = SCALED_SPREAD if fields.get("hidden_size") else BLOCK_SPREAD
    between = of_distances if pipeline.output == "distance" else PAIR_SPREAD
    fit = partial(fit_noise, pipeline)
    kinds = [machine.kind for machine in machines]
    effect, left_out = leave_out(measured, kinds, fit, between_blocks=between, progress=progress)
    return BuildNoise(
        machines=machines,
        effect=effect,
        left_out=left_out,
        output=pipeline.noise,
        preset=pipeline.name,
        n=min(map(np.size, measured.values())),
        **vars(fit_machines(measured, kinds, fit, between_blocks=between)),
        **fields,
    )


def fit_machines(
    residuals: Residuals, kinds: Sequence[str], fit: Fit, *, between_blocks: float = PAIR_SPREAD
) -> MachineNoise:
    """Fit the noise of a build to the residuals [N] of pairs (i, j) of machines with i < j.

    ``kinds`` has the kind of every machine, empty where it is unknown. ``between_blocks`` is the
    spread of ln size of one pair between blocks.
    """
    size = {pair: float(np.median(np.abs(errors_N))) for pair, errors_N in residuals.items()}
    positive = {pair: value for pair, value in size.items() if value > 0}
    # Machines that mostly agree to the bit; the rare nonces on which they do not price the bets.
    if not positive:
        every_N = np.concatenate(list(residuals.values()))
        law, _ = fit(every_N)
        # Under equal bits alone, no cap of a bet is better than another.
        if law.magnitudes(every_N).max() < law.size:
            every_N = np.full_like(every_N, law.size)
        sizes = Sizes(dict.fromkeys(size, law.size), tuple(kinds))
        return MachineNoise(
            law=law, sizes=sizes, spread=PRIOR, known=PRIOR, scores=pack_scores(every_N, law)
        )
    sizes = Sizes(positive, tuple(kinds))
    alike = [residuals[pair] * (sizes.typical / value) for pair, value in positive.items()]
    pooled_N = np.concatenate(alike)
    law, error = fit(pooled_N)
    # The error was of the pooled sample; scale it to the size of one pair.
    error *= math.sqrt(pooled_N.size / min(one_N.size for one_N in alike))
    measured_spread = min(math.hypot(error, between_blocks), _WIDEST)
    new = spread_of_new(
        sizes.deviations(), len({i for pair in positive for i in pair}), measured_spread
    )
    widest = max(alike, key=lambda errors_N: float(np.quantile(np.abs(errors_N), WIDTH)))
    return MachineNoise(
        law=law,
        sizes=sizes,
        spread=new,
        known=Spread(measured_spread, PRIOR.dof),
        scores=pack_scores(pooled_N, law),
        widest=pack_scores(widest, law),
    )


def spread_of_new(deviations: Iterable[float], machines: int, *errors: float) -> Spread:
    """Return the spread of ln size of an unmeasured machine, from machines left out.

    It is the root mean square of those above their prediction, because only larger noise can
    accuse, combined with :data:`PRIOR` and the errors of the measurement.
    """
    upwards = [deviation for deviation in deviations if deviation > 0]
    squares = (machines - 1) * float(np.mean(np.square(upwards))) if upwards else 0.0
    dof = PRIOR.dof + machines - 1
    between = math.sqrt((PRIOR.dof * PRIOR.sd**2 + squares) / dof)
    return Spread(min(math.hypot(between, *errors), _WIDEST), dof)


def leave_out(
    residuals: Residuals,
    kinds: Sequence[str],
    fit: Fit,
    *,
    audits: int = AUDITS,
    between_blocks: float = PAIR_SPREAD,
    progress: Progress | None = None,
) -> tuple[float | None, LeftOut | None]:
    """Return the smallest effect at which machines left out are not accused, and their rate.

    It is also one that the spread of machines does not explain, or no node would be called honest.
    Every machine is left out once. Its audits against every other machine draw nonces without
    replacement, and are judged by the law that the other machines give. If no effect is large
    enough, the last one is returned. With fewer than three machines both values are None.
    ``audits`` is the number of every ordered pair, and the other arguments are those of
    :func:`fit_machines`.
    """
    if len(kinds) < FEWEST_MACHINES:
        return None, None
    checked = min(AUDITED, *(errors_N.size for errors_N in residuals.values()))
    spread = fit_machines(residuals, kinds, fit, between_blocks=between_blocks).spread
    told_apart = [effect for effect in EFFECTS if _is_told_apart(effect, spread)]
    # The smallest effect at which engines that were left out are seldom accused.
    for effect in told_apart or EFFECTS[-1:]:
        # The same draws for every effect, so that nothing else differs.
        rng = np.random.default_rng(0)
        shares = list[float]()
        machines_left_out = list[int]()
        for machine in range(len(kinds)):
            others = {pair: errors_N for pair, errors_N in residuals.items() if machine not in pair}
            mine = {
                pair: errors_N
                for pair, errors_N in residuals.items()
                if machine in pair and errors_N.any()
            }
            if others and mine:
                noise = fit_machines(others, kinds, fit, between_blocks=between_blocks)
            for pair, errors_N in mine.items() if others else ():
                law = noise.predict_law(kinds[machine], pair[0] if pair[1] == machine else pair[1])
                test = sequential_test(
                    Noise(law, "left out", noise.spread, effect, noise.scores, noise.widest)
                )
                drawn = [rng.permutation(errors_N)[:checked] for _ in range(audits)]
                shares.append(float(test.accusations(np.stack(drawn))[:, -1].mean()))
                machines_left_out.append(machine)
            if progress:
                progress(machine + 1, len(kinds))
        if not shares:
            return None, None
        low, high = stats.grouped_share_interval(shares, machines_left_out)
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


def _is_told_apart(effect: float, spread: Spread) -> bool:
    """Return whether honest machines so noisy are too rare to be taken for usual ones.

    Usual noise is also that of a quiet machine whose noise is ``effect`` times larger. However many
    nonces are checked, the evidence for honesty tends to the ratio of the chances of both scales.
    """
    law = scipy.stats.t(spread.dof)
    evidence = law.logpdf(0.0) - law.logpdf(math.log(effect) / spread.sd)
    return bool(evidence >= -math.log(BETA))
