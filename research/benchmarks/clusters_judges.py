"""Which validator sees another build of the checkpoint soonest? Audits of it, by the machine that recomputes.

One machine is left out at a time, as in `assay research clusters`, and the real cheats of the build are audited under
the law of the others, by every validator among these.

    python benchmarks/clusters_judges.py DATA -o benchmarks/results/clusters_judges.json
"""

from pathlib import Path

import numpy as np
from _clusters import left_out
from _common import parser, publish

BY, CHECKED = 10, 12


def main():
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="file of sets of nonces")
    arguments.add_argument("--audits", type=int, default=300, help="audits of every cheat by every validator")
    arguments.add_argument("--seed", type=int, default=5)
    options = arguments.parse_args()
    found = {}
    for without in left_out(options.data, options.audits, options.seed):
        build = without.fold.build
        for judge, model, kind, values_N, values_RC in without.real_cheats(options.audits, CHECKED):
            honest = np.median([np.median(errors_N) for rows, errors_N in without.rest.items() if judge in rows])
            accused_RC = without.test(kind, judge).accusations(values_RC)
            key = (build.name, model, build.sets[judge].name, build.kinds[judge])
            found.setdefault(key, []).append((accused_RC[:, BY - 1].mean(), honest, np.median(values_N)))
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
