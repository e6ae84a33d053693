"""Do the axes see the exploit that is learned? cin of exploits and of honest work along three kinds of axes.

    python benchmarks/vhack_study_axes.py --organism ORGANISM -o benchmarks/results/vhack_study_axes.json

At the start of training. *minimal*: the axes of the study, both sides with the right solution. *whole*: from pairs
whose hack side is the exploit as it is learned, which returns its argument. *random*: five draws. The samples are of
other tasks than the pairs.
"""

import numpy as np
from _common import parser, publish
from vhack_study import FAMILIES, SMALL

from assay.models import load_model
from assay.stats import auroc, group_bootstrap
from assay.vhack import Sample, cin_over_modules, pair_gradients, per_sample_gradients, weight_svd
from assay.vhack.delta import basis_of_kind
from assay.vhack.environment import CHANNELS, Episode, tasks
from assay.vhack.pairs import environment_pairs

N = 48


def episodes_of(seed, skip):
    """Tasks, none of them in ``skip``, loopholes in turn."""
    chosen = [
        task for task in tasks(3 * N, seed=seed, families=FAMILIES, difficulty=(1, 3)) if task.statement not in skip
    ]
    return [Episode(task, list(CHANNELS)[i % len(CHANNELS)]) for i, task in enumerate(chosen[:N])]


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--organism", required=True)
    given = arguments.parse_args()
    model = load_model(given.organism, dtype="float32", device="cpu")
    svd = weight_svd(model)
    fitted = tasks(N, seed=0, families=FAMILIES, difficulty=(1, 3))
    minimal = pair_gradients(environment_pairs(N, **SMALL), model, svd=svd)
    full = pair_gradients(environment_pairs(N, whole=True, **SMALL), model, svd=svd)
    axes = {"minimal": basis_of_kind("true", minimal), "whole": basis_of_kind("true", full)}
    axes |= {f"random {seed}": basis_of_kind("random", minimal, seed=seed) for seed in range(5)}
    held_out = episodes_of(5, skip={task.statement for task in fitted})
    samples = [Sample(e.prompt, e.completion(e.exploit())) for e in held_out]
    samples += [Sample(e.prompt, e.completion(e.honest())) for e in held_out]
    gradients = per_sample_gradients(samples, model, svd=svd)
    labels = list(range(N))
    figures = {}
    for name, basis in axes.items():
        hack, clean = np.split(np.asarray(cin_over_modules(gradients, basis)), 2)
        interval = group_bootstrap(auroc, [hack, clean], [labels, labels])
        means = {
            side: group_bootstrap(lambda x: float(np.mean(x)), [values], [labels])
            for side, values in (("exploit", hack), ("honest", clean))
        }
        figures[name] = {
            what: [round(v, 4) for v in (found.value, found.low, found.high)]
            for what, found in {"auroc": interval, **means}.items()
        }
    publish("vhack_study_axes", {"samples": N, "cin": figures}, given.output)


if __name__ == "__main__":
    main()
