"""The five checks of the axes that the study uses, on the organism: whole families held out, and whole mechanisms.

python benchmarks/vhack_study_checks.py --organism ORGANISM -o benchmarks/results/vhack_study_checks
python benchmarks/vhack_study_checks.py --organism ORGANISM --whole -o benchmarks/results/vhack_study2_checks
"""

import argparse
from dataclasses import replace
from pathlib import Path

from vhack_study import SMALL, mechanism

from assay.models import load_model
from assay.reports import dumps, write_atomic
from assay.vhack import checks, weight_svd
from assay.vhack.pairs import environment_pairs


def by_mechanism(pair):
    """The pair, its group the loophole that its hack side exploits."""
    return replace(pair, group=mechanism(pair))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the reports")
    parser.add_argument("--whole", action="store_true", help="of pairs whose hack side is the whole exploit")
    given = parser.parse_args()
    model = load_model(given.organism, dtype="float32", device="cpu")
    svd = weight_svd(model)
    # All eight families: four would be too few groups for any verdict.
    designs = {
        "families": (environment_pairs(48, difficulty=(1, 2), whole=given.whole), 4),
        "mechanisms": ([by_mechanism(pair) for pair in environment_pairs(48, whole=given.whole, **SMALL)], 6),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    for name, (pairs, folds) in designs.items():
        settings = checks.CheckSettings(method="svd", n_folds=folds)
        made = checks.check(pairs, model, svd=svd, settings=settings)
        write_atomic(given.output / f"{name}.json", dumps(made.as_dict()) + "\n")
        for check in made.checks:
            print(name, check.title, check.measured, check.verdict, sep="; ")


if __name__ == "__main__":
    main()
