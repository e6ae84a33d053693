"""One machine left out: what every rule says of its honest audits, and of cheats in its place.

Legend of shapes: N nonces, R audits, C checked nonces.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay.poc.verdict import Law, VectorSet, effect_from_power, fit_machines, law_as_dict
from assay.reports import JsonObject
from assay.research.clusters import _cheats as cheats
from assay.research.clusters._builds import Build, FloatArray
from assay.research.clusters._rules import ASKED, NAMED, ORACLE, Oracle, Rule, fit, rules_for

HONEST, REAL, SIMULATED = "honest", "real", "simulated"
"""Kinds of an audit: of an honest machine, of a real cheat, of a simulated one."""
CHECKED = 300
"""Nonces of an audit."""

GRID = (*range(1, 65), 70, 80, 90, 100, 120, 150, 200, 250, 300)
"""Numbers of nonces at which the share of accused audits is kept."""

LEAST_AUDITS = 4200  # honest audits of a build: one accusation in a thousand must show
INSIDE_AUDITS = 200  # of every pair inside a fold, which give its effect
CHEAT_AUDITS = 30  # of every pair and cheat
FEWEST_MACHINES = 3
_FARTHEST = 2.0


@dataclass
class Tally:
    """What a rule said of audits of one sort.

    Args:
        audits: Number of audits.
        accused: How many of them were accused after each number of nonces in `GRID`.
        honest: How many would have been called honest after each number in :data:`ASKED`.
        ends: Share accused at the end, by validator.
    """

    audits: int = 0
    accused: FloatArray = field(default_factory=lambda: np.zeros(len(GRID)))
    honest: FloatArray = field(default_factory=lambda: np.zeros(len(ASKED)))
    ends: list[float] = field(default_factory=list)

    def add(self, rule: Rule, values_RC: FloatArray) -> None:
        """Count audits of one pair. Shorter ones than wanted count as they stand at their end."""
        last = values_RC.shape[1]
        accused_RC, honest_RA = rule.simulated(values_RC, at=[min(count, last) for count in ASKED])
        self.audits += len(values_RC)
        self.accused += accused_RC[:, [min(count, last) - 1 for count in GRID]].sum(axis=0)
        self.honest += honest_RA.sum(axis=0)
        self.ends.append(float(accused_RC[:, -1].mean()))

    def as_dict(self) -> JsonObject:
        """Return JSON-ready counts."""
        return {
            "audits": self.audits,
            "accused": self.accused.astype(int).tolist(),
            "honest": self.honest.astype(int).tolist(),
            "ends": self.ends,
        }


@dataclass(frozen=True)
class Fold:
    """A build with one machine left out.

    Args:
        build: Sound sets of the build.
        machine: Index of the machine that is left out.
        cheats: Sets of other models of the same family and round, by model.
        others: Distances of other builds by name, which simulated cheats mix in.
        audits: Least number of audits of every honest pair.
        seed: Seed of everything that is drawn.
    """

    build: Build
    machine: int
    cheats: Mapping[str, Sequence[VectorSet]]
    others: Mapping[str, FloatArray]
    audits: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the set that is left out."""
        return self.build.sets[self.machine].name

    def measure(self) -> JsonObject:
        """Return the law of the other machines, and what every rule says under it."""
        build, machine = self.build, self.machine
        rest = {rows: errors_N for rows, errors_N in build.distances.items() if machine not in rows}
        mine = {rows: errors_N for rows, errors_N in build.distances.items() if machine in rows and errors_N.any()}
        noise = fit_machines(rest, build.kinds, fit)
        effect, left_out = effect_from_power(rest, build.kinds, fit, audits=INSIDE_AUDITS)
        first = fit(np.concatenate(list(rest.values()))).law
        tallies: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
        rng = np.random.default_rng([self.seed, machine])
        for rows, honest_N in mine.items():
            judge = rows[0] if rows[1] == machine else rows[1]
            known = self._named(judge)
            named = {model: fit(errors_N).reached for model, errors_N in known.items()}
            rules = rules_for(noise, first, effect, build.kinds[machine], judge, named)
            self._honest(tallies, rules, honest_N, known, rng)
            mixed_in = {**self.others, **known}
            for cheat in cheats.simulated(honest_N, self._usual(judge), mixed_in, rng):
                truth = {ORACLE: Oracle(honest_N, cheat.pool)}
                values_RC = cheat.audits(rng, CHEAT_AUDITS, min(CHECKED, honest_N.size))
                for name, rule in (rules | truth).items():
                    if name == NAMED:  # it knows another cheat than this
                        continue
                    tallies[SIMULATED, cheat.name, name].add(rule, values_RC)
        for judge in sorted({i for rows in rest for i in rows}):
            self._real(
                tallies, judge, lambda kind, named, j=judge: rules_for(noise, first, effect, kind, j, named), rng
            )
        return {
            "build": build.name,
            "machine": self.name,
            "kind": build.kinds[machine],
            "machines": len(build.sets) - 1,
            "law": law_as_dict(noise.law),
            "spread": noise.spread.sd,
            "effect": effect,
            "inside": None if left_out is None else left_out.accused,
            "sizes": {build.sets[i if j == machine else j].name: float(np.median(x)) for (i, j), x in mine.items()},
            "tallies": [[*key, tally.as_dict()] for key, tally in tallies.items()],
        }

    def _honest(
        self,
        tallies: dict[tuple[str, str, str], Tally],
        rules: Mapping[str, Rule],
        honest_N: FloatArray,
        known: Mapping[str, FloatArray],
        rng: np.random.Generator,
    ) -> None:
        """Audit the machine that is left out, honestly, by one validator."""
        ordered = 2 * len(self.build.pairs)
        count = max(self.audits, -(-LEAST_AUDITS // ordered))
        values_RC = cheats.drawn(rng, honest_N, count, min(CHECKED, honest_N.size))
        alternative_N = next(iter(known.values()), np.minimum(cheats.RATIO * honest_N, _FARTHEST))
        for name, rule in (dict(rules) | {ORACLE: Oracle(honest_N, alternative_N)}).items():
            tallies[HONEST, "", name].add(rule, values_RC)

    def _real(
        self, tallies: dict[tuple[str, str, str], Tally], judge: int, rules_of: Any, rng: np.random.Generator
    ) -> None:
        """Audit every cheat by one validator, with a law of other cheats where the rule knows it."""
        validator = self.build.sets[judge]
        honest_N = np.concatenate([errors_N for rows, errors_N in self.build.distances.items() if judge in rows])
        for model, sets in self.cheats.items():
            for cheat in sets:
                values_N = cheat.distances(validator)
                if values_N.size < min(ASKED):
                    continue
                others = [one for one in sets if one is not cheat] or [cheat]
                law = self._law_of(others, judge if others == [cheat] else None)
                rules = rules_of(cheat.kind, {model: law} if law else None) | {ORACLE: Oracle(honest_N, values_N)}
                values_RC = cheats.drawn(rng, values_N, CHEAT_AUDITS, min(CHECKED, values_N.size))
                for name, rule in rules.items():
                    tallies[REAL, model, name].add(rule, values_RC)

    def _usual(self, judge: int) -> float:
        """Return the median over machines of their median distance from a validator's."""
        found = [np.median(errors_N) for rows, errors_N in self.build.distances.items() if judge in rows]
        return float(np.median(found))

    def _named(self, judge: int) -> dict[str, FloatArray]:
        """Return the distances of every known cheat from the machines that are known."""
        return {model: self._distances(sets, None) for model, sets in self.cheats.items()}

    def _law_of(self, sets: Sequence[VectorSet], without: int | None) -> Law | None:
        """Return the law of cheats against the machines that are known, all but one where that is said."""
        distances_N = self._distances(sets, without)
        return fit(distances_N).reached if distances_N.size else None

    def _distances(self, sets: Sequence[VectorSet], without: int | None) -> FloatArray:
        known = [one for i, one in enumerate(self.build.sets) if i not in (self.machine, without)]
        found = [cheat.distances(one) for cheat in sets for one in known]
        return np.concatenate(found) if found else np.zeros(0)


def folds_of(builds: Sequence[Build], groups: Sequence[Build], audits: int, seed: int) -> list[Fold]:
    """Return a fold for every machine of a build of three or more without which a pair of others is left.

    Args:
        builds: Sound sets by build.
        groups: All sets by model and round, the faulty ones included: a faulty cheat is a cheat.
        audits: Least number of audits of every honest pair.
        seed: Seed of everything that is drawn.
    """
    found = []
    for build in builds:
        if len(build.sets) < FEWEST_MACHINES:
            continue
        alike = [g for g in groups if g.family == build.family and g.round == build.round and g.model != build.model]
        real = {group.model: group.sets for group in alike}
        others = {
            one.name: np.concatenate(list(one.distances.values()))
            for one in builds
            if one.model != build.model and one.distances and one.model not in real
        }
        found += [
            Fold(build, machine, real, others, audits, seed)
            for machine in range(len(build.sets))
            if any(machine not in rows for rows in build.distances)
        ]
    return found
