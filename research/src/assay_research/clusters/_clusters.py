"""The experiment: published sets of nonce vectors, their faults, and every rule with one machine left out.

Legend of shapes: N nonces.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from assay.poc.verdict import Noise, fit_machines, judge_residuals, read_vector_sets, sequential_test
from assay.reports import JsonObject, read_whole
from assay.research.clusters._builds import Build, Pair, builds_of, sound_builds
from assay.research.clusters._folds import CHECKED, folds_of
from assay.research.clusters._rules import fit
from assay.research.runs import Progress, measure_missing
from assay.settings import Settings

EXPERIMENT = "clusters"
SAMPLES = 20  # audits of every faulty pair, and place tests of half as many sound ones
_LARGEST = 2**28

Chosen = npt.NDArray[np.int64]  # indices among the nonces of a pair


class ClusterPlan(Settings):
    """What is measured.

    Raises:
        UsageError: A number is out of range.
    """

    audits: int = Field(200, ge=1, le=10**5, description="Honest audits of every pair of machines, or more if few.")
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn.")


def run_clusters(plan: ClusterPlan, data: Path, folder: Path, *, progress: Progress | None = None) -> None:
    """Measure the cells that the run's folder does not have yet, and append them to ``clusters.jsonl``.

    Args:
        plan: Plan that says what is measured.
        data: File of sets.
        folder: Folder of the run.
        progress: Function that is called with (cells done, missing cells in all).

    Raises:
        DataError: The file is not one of sets.
        UsageError: The run was begun with other settings or data.
    """
    groups = builds_of(read_vector_sets(data))
    builds = sound_builds(groups)
    cells: list[tuple[str, Callable[[], Mapping[str, Any]]]] = [
        (f"sets of {group.name}", partial(_faults, group, builds, plan.seed)) for group in groups
    ]
    folds = folds_of(builds, groups, plan.audits, plan.seed)
    cells += [(f"{fold.build.name} without {fold.name}", fold.measure) for fold in folds]
    settings = {**plan.model_dump(), "data": fingerprint(data)}
    measure_missing(folder, EXPERIMENT, settings, cells, progress)


def fingerprint(data: Path) -> str:
    """Return the SHA-256 of a file of sets."""
    return hashlib.sha256(read_whole(data, _LARGEST)).hexdigest()


def run_name_of(data: Path) -> str:
    """Return the name of the run of a file, which no other file has."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in data.name.partition(".")[0])
    return f"clusters-{stem[:32].strip('-_') or 'data'}-{fingerprint(data)[:8]}"


def _faults(group: Build, builds: Sequence[Build], seed: int) -> JsonObject:
    """Return the sets of a model and round, and which of their pairs are faulty or were called so."""
    noise = _nearest_noise(group, builds)
    rng = np.random.default_rng(seed)
    faulty, sound = [], Counter[str]()
    for rows, pair in group.pairs.items():
        test = group.faults.get(rows)
        if test is None:
            if not group.faulty.intersection(rows):
                sound.update(_place_samples(pair, group.honest_size, rng))
        else:
            faulty.append({
                "sets": pair.names,
                "pattern": test.pattern,
                "share": test.share,
                "ratio": test.ratio,
                "p_value": test.p_value,
                "outcome": _outcome(pair, noise, np.arange(len(pair.nonces))) if noise else "faulty",
                "audits": dict(_audit_samples(pair, noise, rng)) if noise else {},
            })  # fmt: skip
    return {
        "model": group.model,
        "sets": [[one.name, one.kind, one.batch_size, len(one.vectors)] for one in group.sets],
        "copies": group.copies,
        "pairs": len(group.pairs),
        "size": group.honest_size,
        "faulty_sets": [group.sets[i].name for i in sorted(group.faulty)],
        "faulty_pairs": faulty,
        "sound_samples": dict(sound),
    }


def _nearest_noise(group: Build, builds: Sequence[Build]) -> Noise | None:
    """Return the noise of the sound machines of the same model, or of the one most alike of its family."""
    found = [build for build in builds if build.distances and build.family == group.family]
    if not found:
        return None

    def alike(build: Build) -> tuple[int, int]:
        letters = zip(build.model, group.model, strict=False)
        return sum(1 for _ in takewhile(lambda two: two[0] == two[1], letters)), len(build.sets)

    nearest = max(found, key=alike)
    noise = fit_machines(nearest.distances, nearest.kinds, fit)
    return Noise(noise.law_of(""), f"machines of {nearest.name}", noise.spread)


def _outcome(pair: Pair, noise: Noise, chosen: Chosen) -> str:
    outcome, _, _ = judge_residuals(
        pair.distances[chosen],
        noise,
        test=sequential_test(noise),
        positions=pair.positions[chosen].tolist(),
        batch_size=pair.batch_size,
    )
    return outcome


def _audit_samples(pair: Pair, noise: Noise, rng: np.random.Generator) -> Counter[str]:
    return Counter(_outcome(pair, noise, rng.permutation(len(pair.nonces))[:CHECKED]) for _ in range(SAMPLES))


def _place_samples(pair: Pair, honest_size: float, rng: np.random.Generator) -> Counter[str]:
    drawn = [rng.permutation(len(pair.nonces))[:CHECKED] for _ in range(2 * SAMPLES)]
    tests = [pair.places(honest_size, chosen) for chosen in drawn]
    return Counter("faulty" if test.faulty else "not faulty" for test in tests)
