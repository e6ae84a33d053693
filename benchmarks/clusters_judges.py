"""Which validator sees another build of the checkpoint soonest? Audits of it, by the machine that recomputes.

One machine is left out at a time, as in `assay research clusters`, and the real cheats of the build are audited under
the law of the others, by every validator among these.

    python benchmarks/clusters_judges.py DATA -o benchmarks/results/clusters_judges.json
"""

from pathlib import Path

import numpy as np
from _common import note, parser, publish

from assay.poc.verdict import Noise, effect_from_power, fit_machines, read_vector_sets, sequential_test
from assay.research.clusters._builds import builds_of, sound_builds
from assay.research.clusters._cheats import drawn
from assay.research.clusters._folds import INSIDE_AUDITS, folds_of
from assay.research.clusters._rules import ALPHA, BETA, fit

BY, CHECKED = 10, 12


def main():
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="file of sets of nonces")
    arguments.add_argument("--audits", type=int, default=300, help="audits of every cheat by every validator")
    arguments.add_argument("--seed", type=int, default=5)
    options = arguments.parse_args()
    groups = builds_of(read_vector_sets(options.data))
    found = {}
    for fold in folds_of(sound_builds(groups), groups, options.audits, options.seed):
        if not fold.cheats:
            continue
        build = fold.build
        rest = {rows: errors_N for rows, errors_N in build.distances.items() if fold.machine not in rows}
        noise = fit_machines(rest, build.kinds, fit)
        effect, _ = effect_from_power(rest, build.kinds, fit, audits=INSIDE_AUDITS)
        rng = np.random.default_rng([options.seed, fold.machine])
        for judge in sorted({i for rows in rest for i in rows}):
            honest = np.median([np.median(errors_N) for rows, errors_N in rest.items() if judge in rows])
            for model, sets in fold.cheats.items():
                for cheat in sets:
                    values_N = cheat.distances(build.sets[judge])
                    test = sequential_test(
                        Noise(noise.law_of(cheat.kind, judge), "", noise.spread, effect), alpha=ALPHA, beta=BETA
                    )
                    accused_RC = test.accusations(drawn(rng, values_N, options.audits, CHECKED))
                    key = (build.name, model, build.sets[judge].name, build.kinds[judge])
                    row = (accused_RC[:, BY - 1].mean(), honest, np.median(values_N))
                    found.setdefault(key, []).append(row)
        note(f"{build.name} without {fold.name}")
    names = ("build", "cheat", "validator", "kind")
    rows = []
    for key, each in found.items():
        caught, honest, cheat = np.mean(each, axis=0).tolist()
        figures = {
            "audits": len(each) * options.audits,
            "caught": caught,
            "honest_median": honest,
            "cheat_median": cheat,
        }
        rows.append(dict(zip(names, key, strict=True)) | figures)
    publish("clusters_judges", {"by": BY, "seed": options.seed, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
