"""The experiment: published sets of nonce vectors, their faults, and every rule with one machine
left out.

Cheats are other builds that were passed off as this one, and simulated ones a little noisier than
honest machines.

Legend of shapes: N nonces, R audits, C checked nonces, A numbers of nonces at which the verdict is
asked for.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special

from assay import stats
from assay.files.jsonl import JsonObject
from assay.files.reading import read_whole
from assay.pages.report import Cell
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.verdict.build_noise import MachineNoise
from assay.poc.verdict.honest_noise import Noise, fit_noise, law_as_dict
from assay.poc.verdict.machine_fit import fit_machines, leave_out
from assay.poc.verdict.proof_judge import judge_residuals
from assay.poc.verdict.sample_plan import sequential_test
from assay.settings import Flag
from assay_research.clusters.builds import Build, FloatArray, Pair, builds_of, sound_builds
from assay_research.runs.report import Column, Curves, Section, Table, or_never, table_of
from assay_research.runs.runs import Measurement, Plan, RunRecords
from assay_research.runs.spread import first_reached
from assay_research.vector_sets import VectorSet, read_vector_sets

RATIO = 1.4
"""Median of a simulated cheat over the honest one: of that pair, or the usual one of that validator
if it is larger.
"""

MULTIPLES = (2.0, 3.3, 6.0)  # of the own noise, for a share of the nonces
TAIL_DOF = 4.0
FARTHEST = 2.0  # of two unit vectors
_STEPS = 40
ALPHA = 1e-3
BETA = 1e-2
OURS = "ours"
ORACLE = "oracle"
COUNTS = ((0.41, 0.10, 0.05), (0.75, 0.10, 0.05), (0.02, 0.001, 0.01))
"""Published count tests: distance that is a mismatch, share of mismatches that is granted, and
level.
"""
ASKED = (64, 300)
"""Numbers of nonces at which it is asked whether a node would be called honest."""
_BINS = 16  # of the oracle's laws
HONEST = "honest"
REAL = "real"
SIMULATED = "simulated"
"""Kinds of an audit: of an honest machine, of a real cheat, of a simulated one."""
CHECKED = 300
"""Nonces of an audit."""
GRID = (*range(1, 65), 70, 80, 90, 100, 120, 150, 200, 250, 300)
"""Numbers of nonces at which the share of accused audits is kept."""
LEAST_AUDITS = 4200  # honest audits of a build: one accusation in a thousand must show
INSIDE_AUDITS = 200  # of every pair inside a fold, which give its effect
CHEAT_AUDITS = 30  # of every pair and cheat
FEWEST_MACHINES = 3
SAMPLES = 20  # audits of every faulty pair, and place tests of half as many sound ones
_LARGEST = 2**28
SOON = 60  # nonces within which a cheat should be caught
HONEST_COLUMNS: dict[str, Column] = {
    "build": "build",
    "rule": "rule",
    "accused": "{accused:.2%}",
    "95 %": "{low:.2%} to {high:.2%}",
    "worst pair": "{worst:.1%}",
    "called honest": lambda row: f"{row['honest']['300']:.0%}",
}
CHEAT_COLUMNS: dict[str, Column] = {
    "build": "build",
    "cheat": "cheat",
    "rule": "rule",
    "median": or_never("median"),
    "99 % by": or_never("most"),
    f"by {SOON}": "{soon:.1%}",
    "by 300": "{accused:.1%}",
    "called honest, 64 / 300": lambda row: (
        f"{row['honest']['64']:.1%} / {row['honest']['300']:.1%}"
    ),
}


def drawn(rng: np.random.Generator, pool_N: FloatArray, count: int, checked: int) -> FloatArray:
    """Return audits of a pool, [R, C]: in each, nonces without replacement."""
    return np.stack([rng.permutation(pool_N)[:checked] for _ in range(count)])


def simulated(
    honest_N: FloatArray, usual: float, others: Mapping[str, FloatArray], rng: np.random.Generator
) -> Iterator[tuple[str, FloatArray]]:
    """Yield names and distances [N] of cheats whose median distance is `RATIO` times that of honest
    ones.

    A pair of machines may be far closer than others. Who is as far off as honest machines usually
    are is no cheat that a rule could know, so the ratio is that over the usual median where it is
    larger.

    Args:
        honest_N: Honest distances of a pair.
        usual: Median over machines of their median distance from this validator.
        others: Distances of other builds by name; those are mixed in that are large enough.
        rng: Source of what is drawn.
    """
    median = float(np.median(honest_N))
    wanted = RATIO * max(median, usual)
    yield f"all nonces × {RATIO:g}", _clipped(wanted / median * honest_N)
    for multiple in MULTIPLES:
        yield (
            f"a share × {multiple:g}",
            _mixed(honest_N, multiple * max(usual / median, 1.0) * honest_N, wanted, rng),
        )
    for name, other_N in others.items():
        if np.median(other_N) > wanted:
            yield (
                f"a share as {name}",
                _mixed(honest_N, rng.choice(other_N, honest_N.size), wanted, rng),
            )
    logs_N = np.log(np.maximum(honest_N, 1e-4))
    spread = (
        float(np.subtract(*np.quantile(logs_N, (0.75, 0.25)))) / 1.349
    )  # as a normal with these quartiles has it
    shapes = {
        "log-normal": rng.normal(size=honest_N.size),
        "log-t, 4": rng.standard_t(TAIL_DOF, honest_N.size),
    }
    for name, z_N in shapes.items():
        values_N = np.exp(spread * z_N)
        yield f"{name}, × {RATIO:g}", _clipped(values_N * (wanted / float(np.median(values_N))))


def _mixed(
    honest_N: FloatArray, larger_N: FloatArray, wanted: float, rng: np.random.Generator
) -> FloatArray:
    """Return honest distances of which the share is exchanged that makes the median what is
    wanted.
    """
    order_N = rng.random(honest_N.size)
    low = 0.0
    high = 1.0
    for _ in range(_STEPS):
        share = (low + high) / 2
        mixed_N = np.where(order_N < share, larger_N, honest_N)
        low, high = (share, high) if np.median(mixed_N) < wanted else (low, share)
    return _clipped(np.where(order_N < high, larger_N, honest_N))


def _clipped(values_N: FloatArray) -> FloatArray:
    return np.minimum(values_N, FARTHEST)


# The rules that are held against each other, all with one question: accused after how many nonces?


BoolArray = npt.NDArray[np.bool_]


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

    def simulated(
        self, values_RC: npt.ArrayLike, *, at: Sequence[int] = ()
    ) -> tuple[BoolArray, BoolArray]:
        """Return whether the test of so many nonces accuses; it says honest wherever it does
        not.
        """
        missed_RC = np.cumsum(np.asarray(values_RC) > self.threshold, axis=1)
        checked_C = np.arange(1, missed_RC.shape[1] + 1)
        p_RC = np.where(missed_RC > 0, special.bdtrc(missed_RC - 1.0, checked_C, self.granted), 1.0)
        accused_RC = p_RC < self.level
        return accused_RC, ~accused_RC[:, np.asarray(at, dtype=int) - 1]


@dataclass(frozen=True)
class Oracle:
    """The likelihood ratio of a cheat's law over the honest one of that very pair, both known.

    The laws are histograms over common bins, which bound what a single nonce can say: of a cheat
    that is far off, a rule with tails may need a nonce less.

    Args:
        honest: Honest distances [N] of the pair.
        cheat: Distances [N] of the cheat.
    """

    honest: FloatArray
    cheat: FloatArray

    def simulated(
        self, values_RC: npt.ArrayLike, *, at: Sequence[int] = ()
    ) -> tuple[BoolArray, BoolArray]:
        """Return whether the ratio reached 1/alpha, and whether it is below beta."""
        edges = np.quantile(
            np.concatenate([self.honest, self.cheat]), np.linspace(0, 1, _BINS + 1)[1:-1]
        )
        honest, cheat = (self._shares(edges, shares) for shares in (self.honest, self.cheat))
        path_RC = np.log(cheat / honest)[np.searchsorted(edges, np.asarray(values_RC))].cumsum(
            axis=1
        )
        accused_RC = np.maximum.accumulate(path_RC, axis=1) >= -math.log(ALPHA)
        places = np.asarray(at, dtype=int) - 1
        return accused_RC, (path_RC[:, places] <= math.log(BETA)) & ~accused_RC[:, places]

    @staticmethod
    def _shares(edges: FloatArray, values_N: FloatArray) -> FloatArray:
        counts = np.bincount(np.searchsorted(edges, values_N), minlength=_BINS) + 0.5
        return np.asarray(counts / counts.sum(), dtype=np.float64)


@dataclass(frozen=True)
class Ours:
    """The residual test, on audits that each start from nothing."""

    test: stats.SequentialTest

    def simulated(
        self, values_RC: npt.ArrayLike, *, at: Sequence[int] = ()
    ) -> tuple[BoolArray, BoolArray]:
        """Return whether it accuses after each nonce, [R, C], and whether it says honest after
        some, [R, A].
        """
        values_RC = np.asarray(values_RC)
        honest = [
            [copy(self.test).update(row_C[:count]).verdict == "honest" for count in at]
            for row_C in values_RC
        ]
        return self.test.accusations(values_RC), np.array(honest, dtype=np.bool_).reshape(
            len(values_RC), len(at)
        )


Rule = CountRule | Oracle | Ours
"""A rule for the distances of one audit."""


def fit(distances_N: FloatArray) -> tuple[stats.NoiseLaw, float]:
    """Fit the law of published vectors."""
    return fit_noise(get_pipeline("artifact"), distances_N)


def rules_for(noise: MachineNoise, effect: float | None, kind: str, judge: int) -> dict[str, Rule]:
    """Return the rules that do not know the truth, for a machine of a kind against a validator's.

    Args:
        noise: Noise between the machines that are known.
        effect: Effect from the power on these machines.
        kind: Kind of the machine that is judged.
        judge: Validator's machine.
    """
    spread_noise = Noise(
        noise.predict_law(kind, judge), OURS, noise.spread, effect, noise.scores, noise.widest
    )
    ours: dict[str, Rule] = {OURS: Ours(sequential_test(spread_noise, alpha=ALPHA, beta=BETA))}
    return ours | {rule.name: rule for rule in (CountRule(*constants) for constants in COUNTS)}


# One machine left out: what every rule says of its honest audits, and of cheats in its place.


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
        build = self.build
        machine = self.machine
        remaining = {
            rows: errors_N for rows, errors_N in build.distances.items() if machine not in rows
        }
        mine = {
            rows: errors_N
            for rows, errors_N in build.distances.items()
            if machine in rows and errors_N.any()
        }
        noise = fit_machines(remaining, build.kinds, fit)
        effect, left_out = leave_out(remaining, build.kinds, fit, audits=INSIDE_AUDITS)
        tallies: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
        rng = np.random.default_rng([self.seed, machine])

        def audit(
            sort: str, cheat: str, rules: Mapping[str, Rule], pool_N: FloatArray, audits: int
        ) -> None:
            values_RC = drawn(rng, pool_N, audits, min(CHECKED, pool_N.size))
            for name, rule in rules.items():
                tallies[sort, cheat, name].add(rule, values_RC)

        distances_of_cheats = {model: self._distances(sets) for model, sets in self.cheats.items()}
        honest_audits = max(self.audits, -(-LEAST_AUDITS // (2 * len(build.pairs))))
        for rows, honest_N in mine.items():
            judge = rows[0] if rows[1] == machine else rows[1]
            rules = rules_for(noise, effect, build.kinds[machine], judge)
            alternative_N = next(
                iter(distances_of_cheats.values()), np.minimum(RATIO * honest_N, FARTHEST)
            )
            audit(
                HONEST,
                "",
                rules | {ORACLE: Oracle(honest_N, alternative_N)},
                honest_N,
                honest_audits,
            )
            medians = [
                np.median(errors_N) for rows, errors_N in build.distances.items() if judge in rows
            ]
            for cheat, pool_N in simulated(
                honest_N, float(np.median(medians)), {**self.others, **distances_of_cheats}, rng
            ):
                audit(
                    SIMULATED,
                    cheat,
                    rules | {ORACLE: Oracle(honest_N, pool_N)},
                    pool_N,
                    CHEAT_AUDITS,
                )
        for judge in sorted({i for rows in remaining for i in rows}):
            for model, kind, truth in self._real(judge):
                rules = rules_for(noise, effect, kind, judge)
                audit(REAL, model, rules | {ORACLE: truth}, truth.cheat, CHEAT_AUDITS)
        return {
            "build": build.name,
            "machine": self.name,
            "kind": build.kinds[machine],
            "machines": len(build.sets) - 1,
            "law": law_as_dict(noise.law),
            "spread": noise.spread.sd,
            "effect": effect,
            "inside": None if left_out is None else left_out.accused,
            "sizes": {
                build.sets[i if j == machine else j].name: float(np.median(x))
                for (i, j), x in mine.items()
            },
            "tallies": [[*key, tally.as_dict()] for key, tally in tallies.items()],
        }

    def _real(self, judge: int) -> Iterator[tuple[str, str, Oracle]]:
        """Yield what one validator sees of every cheat: model, kind, and both truths."""
        validator = self.build.sets[judge]
        honest_N = np.concatenate(
            [errors_N for rows, errors_N in self.build.distances.items() if judge in rows]
        )
        for model, sets in self.cheats.items():
            for cheat in sets:
                values_N = cheat.distances(validator)
                if values_N.size >= min(ASKED):
                    yield model, cheat.kind, Oracle(honest_N, values_N)

    def _distances(self, sets: Sequence[VectorSet]) -> FloatArray:
        """Return distances of cheats from the machines that are known."""
        fitted_sets = [
            vector_set for i, vector_set in enumerate(self.build.sets) if i != self.machine
        ]
        measured = [cheat.distances(vector_set) for cheat in sets for vector_set in fitted_sets]
        return np.concatenate(measured) if measured else np.zeros(0)


def folds_of(
    builds: Sequence[Build], groups: Sequence[Build], audits: int, seed: int
) -> list[Fold]:
    """Return a fold for every machine of a build of three or more without which a pair of others is
    left.

    Args:
        builds: Sound sets by build.
        groups: All sets by model and round, the faulty ones included: a faulty cheat is a cheat.
        audits: Least number of audits of every honest pair.
        seed: Seed of everything that is drawn.
    """
    folds = []
    for build in builds:
        if len(build.sets) < FEWEST_MACHINES:
            continue
        alike = [
            g
            for g in groups
            if g.family == build.family and g.round == build.round and g.model != build.model
        ]
        real = {group.model: group.sets for group in alike}
        others = {
            one_build.name: np.concatenate(list(one_build.distances.values()))
            for one_build in builds
            if one_build.model != build.model
            and one_build.distances
            and one_build.model not in real
        }
        folds += [
            Fold(build, machine, real, others, audits, seed)
            for machine in range(len(build.sets))
            if any(machine not in rows for rows in build.distances)
        ]
    return folds


Chosen = npt.NDArray[np.int64]  # indices among the nonces of a pair


class ClusterPlan(Plan):
    """What is measured.

    Raises:
        UsageError: A number is out of range.
    """

    data: Annotated[Path, Flag(argument=True)] = Field(
        description="Sets of nonce vectors: JSON Lines, or gzip of them."
    )
    audits: int = Field(
        200, ge=1, le=10**5, description="Honest audits of every pair of machines, or more if few."
    )
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn.")

    experiment = "clusters"

    @property
    def settings(self) -> JsonObject:
        """What must be the same for all cells of a run; of the data, its SHA-256."""
        return {"audits": self.audits, "seed": self.seed, "data": fingerprint(self.data)}

    def cells(self) -> Iterator[Measurement]:
        """Return the sets of every model, and every machine that is left out of a build."""
        groups = builds_of(read_vector_sets(self.data))
        builds = sound_builds(groups)
        for group in groups:
            yield f"sets of {group.name}", partial(_faults, group, builds, self.seed)
        for fold in folds_of(builds, groups, self.audits, self.seed):
            yield f"{fold.build.name} without {fold.name}", fold.measure


def fingerprint(data: Path) -> str:
    """Return the SHA-256 of a file of sets."""
    return hashlib.sha256(read_whole(data, _LARGEST)).hexdigest()


def run_name_of(data: Path) -> str:
    """Return the name of the run of a file, which no other file has."""
    stem = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_") else "-"
        for c in data.name.partition(".")[0]
    )
    return f"clusters-{stem[:32].strip('-_') or 'data'}-{fingerprint(data)[:8]}"


def _faults(group: Build, builds: Sequence[Build], seed: int) -> JsonObject:
    """Return the sets of a model and round, and which of their pairs are faulty or were called
    so.
    """
    noise = _nearest_noise(group, builds)
    rng = np.random.default_rng(seed)
    faulty = []
    sound = Counter[str]()
    for rows, pair in group.pairs.items():
        test = group.faults.get(rows)
        if test is None:
            if not group.faulty.intersection(rows):
                tests = [
                    pair.places(group.honest_size, chosen)
                    for chosen in _drawn(pair, 2 * SAMPLES, rng)
                ]
                sound.update("faulty" if test.faulty else "not faulty" for test in tests)
        else:
            faulty.append(
                {
                    "sets": pair.names,
                    "pattern": test.pattern,
                    "share": test.share,
                    "ratio": test.ratio,
                    "p_value": test.p_value,
                    "outcome": _outcome(pair, noise, np.arange(len(pair.nonces)))
                    if noise
                    else "faulty",
                    "audits": Counter(
                        _outcome(pair, noise, drawn) for drawn in _drawn(pair, SAMPLES, rng)
                    )
                    if noise
                    else {},
                }
            )
    return {
        "model": group.model,
        "sets": [
            [drawn.name, drawn.kind, drawn.batch_size, len(drawn.vectors)] for drawn in group.sets
        ],
        "copies": group.copies,
        "pairs": len(group.pairs),
        "size": group.honest_size,
        "faulty_sets": [group.sets[i].name for i in sorted(group.faulty)],
        "faulty_pairs": faulty,
        "sound_samples": dict(sound),
    }


def _nearest_noise(group: Build, builds: Sequence[Build]) -> Noise | None:
    """Return the noise of the sound machines of the same model, or of the one most alike of its
    family.
    """
    candidates = [build for build in builds if build.distances and build.family == group.family]
    if not candidates:
        return None

    def alike(build: Build) -> tuple[int, int]:
        letters = zip(build.model, group.model, strict=False)
        return sum(1 for _ in takewhile(lambda two: two[0] == two[1], letters)), len(build.sets)

    nearest = max(candidates, key=alike)
    noise = fit_machines(nearest.distances, nearest.kinds, fit)
    source = f"machines of {nearest.name}"
    return Noise(noise.predict_law(""), source, noise.spread, None, noise.scores, noise.widest)


def _outcome(pair: Pair, noise: Noise, chosen: Chosen) -> str:
    outcome, _, _ = judge_residuals(
        pair.distances[chosen],
        noise,
        test=sequential_test(noise),
        positions=pair.positions[chosen].tolist(),
        batch_size=pair.batch_size,
    )
    return outcome


def _drawn(pair: Pair, audits: int, rng: np.random.Generator) -> Iterator[Chosen]:
    """Draw the nonces of audits of a pair."""
    return (rng.permutation(len(pair.nonces))[:CHECKED] for _ in range(audits))


# The figures of a run: what each rule said of honest machines and of cheats, by build.


def summarise(cells: Iterable[JsonObject]) -> JsonObject:
    """Return the figures of every build and the faults of every model; the cells are those of a
    run.
    """
    cells = list(cells)
    folds = [cell for cell in cells if "tallies" in cell]
    names = dict.fromkeys(cell["build"] for cell in folds)
    return {
        "builds": [
            _build(name, [cell for cell in folds if cell["build"] == name]) for name in names
        ],
        "models": [
            {k: v for k, v in cell.items() if k != "key"} for cell in cells if "faulty_sets" in cell
        ],
    }


def _build(name: str, folds: Sequence[JsonObject]) -> JsonObject:
    tallies: dict[tuple[str, str, str], list[JsonObject]] = {}
    for fold in folds:
        for sort, cheat, rule, tally in fold["tallies"]:
            tallies.setdefault((sort, cheat, rule), []).append(tally)
    rows = [
        {"sort": sort, "cheat": cheat, "rule": rule, **_row(tallied, sort)}
        for (sort, cheat, rule), tallied in tallies.items()
    ]
    return {
        "build": name,
        "machines": len(folds),
        "kinds": [fold["kind"] for fold in folds],
        "effects": sorted({fold["effect"] for fold in folds if fold["effect"] is not None}),
        "spreads": [min(fold["spread"] for fold in folds), max(fold["spread"] for fold in folds)],
        "sizes": [
            [fold["machine"], other_machine, size]
            for fold in folds
            for other_machine, size in fold["sizes"].items()
        ],
        "rows": rows,
    }


def _row(tallies: Sequence[JsonObject], sort: str) -> JsonObject:
    """Return the figures of a rule for one sort of audits, over all folds."""
    audits = sum(tally["audits"] for tally in tallies)
    curve = np.sum([tally["accused"] for tally in tallies], axis=0) / audits
    honest = np.sum([tally["honest"] for tally in tallies], axis=0) / audits
    cells: JsonObject = {
        "audits": audits,
        "accused": float(curve[-1]),
        "soon": float(curve[GRID.index(SOON)]),
        "median": first_reached(GRID, curve, 0.5),
        "most": first_reached(GRID, curve, 0.99),
        "honest": dict(zip(map(str, ASKED), honest.tolist(), strict=True)),
        "curve": [round(float(value), 4) for value in curve],
    }
    if sort == HONEST:
        cells |= _interval(tallies)
    return cells


def _interval(tallies: Sequence[JsonObject]) -> JsonObject:
    """Return an interval of the share accused, and the worst pair.

    Audits of one machine are not independent, so the interval is over the machines that were left
    out, one a tally. It holds for so few machines, and is wide where hardly any audit accuses.
    """
    ends = [end for tally in tallies for end in tally["ends"]]
    machines = [index for index, tally in enumerate(tallies) for _ in tally["ends"]]
    low, high = stats.grouped_share_interval(ends, machines)
    return {"low": low, "high": high, "worst": max(ends), "pairs": len(ends)}


def fault_table(summary: JsonObject) -> Table:
    """Return the sets and pairs with a fault of the place, by model."""
    rows: list[list[Cell]] = []
    for model in summary["models"]:
        for pair in model["faulty_pairs"]:
            audits = sum(pair["audits"].values())
            faulty = [
                f"{pair['audits'].get(word, 0) / audits:.0%}" if audits else ""
                for word in ("faulty", "fraud")
            ]
            first, second = pair["sets"]
            place = f"{pair['share']:.0%}, {pair['ratio']:.1f} times"
            rows.append([f"{first} / {second}", pair["pattern"], place, pair["outcome"], *faulty])
    return ("sets", "bad places", "share, size", "verdict", "300: faulty", "300: fraud"), rows


def model_table(summary: JsonObject) -> Table:
    """Return the sets by model: copies, faulty ones and pairs, and how often sound pairs are called
    faulty.
    """

    def called(model: JsonObject) -> str:
        samples = sum(model["sound_samples"].values())
        return f"{model['sound_samples'].get('faulty', 0)} of {samples}" if samples else ""

    def faulty(model: JsonObject) -> str:
        return (
            f"{len(model['faulty_sets'])} sets, {len(model['faulty_pairs'])} of {model['pairs']} "
            f"pairs"
        )

    columns: dict[str, Column] = {
        "model": "model",
        "sets": lambda model: len(model["sets"]),
        "copies": lambda model: len(model["copies"]),
        "median distance": "{size:.3f}",
        "faulty": faulty,
        "sound audits called faulty": called,
    }
    return table_of(summary["models"], columns)


def _rows(summary: JsonObject, sort: str) -> list[JsonObject]:
    return [
        {"build": build["build"], **row}
        for build in summary["builds"]
        for row in build["rows"]
        if row["sort"] == sort
    ]


DRAWN = (OURS, CountRule(*COUNTS[0]).name, ORACLE)


def section(run: RunRecords) -> Section:
    """Return what every rule says of the machines and cheats of a run."""
    summary = summarise(run.cells)
    about = (
        "Sets of one block, key, length and model are compared. Copies of an earlier set are left "
        "out, and so are sets "
        "and pairs whose distances depend on the place in the batch. Then one machine is left "
        "out, and the law and the "
        f"effect come from the others. Audits of {CHECKED} nonces are drawn without replacement. "
        f"The interval is over "
        "machines: Gaffke's bounds for the mean of few shares, which leave room for machines "
        "unlike those measured."
    )
    tables = {
        "Sets": model_table(summary),
        f"Pairs with a fault of the place, in full and in audits of {CHECKED} nonces": fault_table(
            summary
        ),
        "Honest machines that the law does not know": table_of(
            _rows(summary, HONEST), HONEST_COLUMNS
        ),
        "Other builds passed off as this one": table_of(_rows(summary, REAL), CHEAT_COLUMNS),
        "Simulated cheats at 1.4 times the honest median": table_of(
            _rows(summary, SIMULATED), CHEAT_COLUMNS
        ),
    }
    curves = [curve for build in summary["builds"] for curve in _curves(build)]
    values = {"settings": run.settings, **summary}
    return Section("Sets of nonces that networks published", about, tables, curves, values)


def _curves(build: JsonObject) -> Iterator[Curves]:
    """Yield the share of audits accused against the nonces checked, for each cheat."""
    wanted = [row for row in build["rows"] if row["rule"] in DRAWN and row["sort"] != HONEST]
    for place in dict.fromkeys((row["sort"], row["cheat"]) for row in wanted):
        rows = [row for row in wanted if (row["sort"], row["cheat"]) == place]
        lines = {row["rule"]: (GRID, [100 * share for share in row["curve"]]) for row in rows}
        caption = f"{build['build']}, {place[1]}: share of audits that accuse."
        yield Curves(caption, "nonces checked", "audits that accuse, %", lines)
