"""What the benchmarks on published sets of nonces share: one machine left out at a time, and the law of the others."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from _common import note

from assay.poc.verdict import MachineNoise, Noise, effect_from_power, fit_machines, read_vector_sets, sequential_test
from assay.research.clusters import builds_of, folds_of, sound_builds
from assay.research.clusters._cheats import drawn
from assay.research.clusters._folds import INSIDE_AUDITS, Fold
from assay.research.clusters._rules import ALPHA, BETA, fit


@dataclass
class LeftOut:
    """A build without one machine: the distances [N] between the others, their law, and a source of random numbers."""

    fold: Fold
    rest: dict[tuple[int, int], np.ndarray]
    rng: np.random.Generator

    @cached_property
    def noise(self) -> MachineNoise:
        """The noise between the others."""
        return fit_machines(self.rest, self.fold.build.kinds, fit)

    @cached_property
    def effect(self) -> float | None:
        """The effect from the power on them, which takes seconds."""
        return effect_from_power(self.rest, self.fold.build.kinds, fit, audits=INSIDE_AUDITS)[0]

    def law(self, kind, judge):
        """Return the honest law of a machine of a kind against a validator's."""
        return self.noise.law_of(kind, judge)

    def test(self, kind, judge):
        """Return the test of the product for such a machine."""
        noise = Noise(self.law(kind, judge), "", self.noise.spread, self.effect)
        return sequential_test(noise, alpha=ALPHA, beta=BETA)

    def real_cheats(self, audits, checked):
        """Yield every validator's index, the cheat's model and kind, its distances [N] and audits of them [R, C]."""
        for judge in sorted({i for rows in self.rest for i in rows}):
            for model, sets in self.fold.cheats.items():
                for cheat in sets:
                    values_N = cheat.distances(self.fold.build.sets[judge])
                    yield judge, model, cheat.kind, values_N, drawn(self.rng, values_N, audits, checked)


def left_out(data, audits, seed):
    """Yield every build of a file of sets of nonces with each of its machines left out, and say so when it is done."""
    groups = builds_of(read_vector_sets(data))
    for fold in folds_of(sound_builds(groups), groups, audits, seed):
        build = fold.build
        rest = {rows: errors_N for rows, errors_N in build.distances.items() if fold.machine not in rows}
        yield LeftOut(fold, rest, np.random.default_rng([seed, fold.machine]))
        note(f"{build.name} without {fold.name}")
