"""How well detectors tell hacks from honest work on a real model, asked of pairs of an origin that
they have not seen.

*Inside*: each origin by itself, whole groups held out. *Across*: fitted to all pairs of other
origins; the threshold promises to lose 5 % of clean samples such as those. Origins are written by
hand, generated from templates, sampled from a model that learned to cheat, and, with --outside,
JSON Lines of others with prompt, hack, clean and a group.

    OMP_NUM_THREADS=1 python research/benchmarks/vhack_detectors.py \
      -o research/results/vhack_detectors_smollm2.json
"""

import time

import torch
from _common import note, parser, publish

from assay.files.jsonl import read_jsonl
from assay.models import load_model
from assay.stats import auroc, group_bootstrap
from assay.stats.rates import proportion_interval
from assay.vhack import weight_svd
from assay.vhack.detectors.comparison import compare_detectors, make_detectors
from assay.vhack.detectors.evidence import LabelledEvidence, collect_evidence
from assay.vhack.detectors.rollout_judge import fit_scorer
from assay.vhack.directions.delta.delta_models import user_cache
from assay.vhack.pairs.generate import find_pairs
from assay.vhack.pairs.pairs import Pair


def read_outside(path, group):
    """Pairs of another's file, with the field that says what is held out together."""
    lines = (line for _, line in read_jsonl(path))
    return [Pair(line["prompt"], line["hack"], line["clean"], str(line[group])) for line in lines]


def three(interval):
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


def inside(sides, groups):
    """Every detector on held-out groups of one origin, and the one that is offered."""
    compared = compare_detectors(LabelledEvidence(*sides, groups, groups))
    return {
        "offered": compared.best,
        "auroc": {result.name: three(result.auroc) for result in compared.results},
    }


def across(detector, fitted, asked):
    """A detector fitted to other origins, asked of one: AUROC, hacks caught, and clean samples
    lost.
    """
    (hack, clean), groups = joined(fitted)
    scorer, threshold = fit_scorer(detector, LabelledEvidence(hack, clean, groups, groups))
    scores = [scorer(side) for side in asked[0]]
    names = asked[1]
    caught, lost = (int((side > threshold.value).sum()) for side in scores)
    areas = {
        "auroc": three(group_bootstrap(auroc, scores, (names, names))),
        "caught": round(caught / len(names), 4),
    }
    return areas | {
        "lost": [round(v, 4) for v in (lost / len(names), *proportion_interval(lost, len(names)))]
    }


def joined(parts):
    """Both sides of several origins as one, and their groups."""
    sides = []
    for both in zip(*(sides for sides, _ in parts), strict=True):
        gradients = {
            name: torch.cat([side.gradients[name] for side in both]) for name in both[0].gradients
        }
        activations = torch.cat([side.activations for side in both], dim=1)
        logprobs = torch.cat([side.logprobs for side in both])
        sides.append(
            type(both[0])(sum((side.texts for side in both), ()), activations, logprobs, gradients)
        )
    return sides, [group for _, groups in parts for group in groups]


def main():
    options = parser(__doc__)
    options.add_argument("--model", default="pretrained:smollm2")
    options.add_argument("--pairs", nargs="+", default=["authored", "generated:24", "exploits:24"])
    options.add_argument("--outside", help="file of pairs that nobody here wrote")
    options.add_argument(
        "--group", default="problem_id", help="field of that file by which pairs are held out"
    )
    chosen = options.parse_args()
    origins = {name: find_pairs(name) for name in chosen.pairs}
    origins |= {"outside": read_outside(chosen.outside, chosen.group)} if chosen.outside else {}
    began = time.perf_counter()
    model = load_model(chosen.model, device="cpu", dtype="float32")
    svd = weight_svd(model, cache=user_cache(model))
    known = {}
    for name, pairs in origins.items():
        samples = [pair.samples()[side] for side in (0, 1) for pair in pairs]
        evidence = collect_evidence(samples, model, svd=svd)
        n = len(pairs)
        groups = [f"{name} {pair.group}" for pair in pairs]
        known[name] = ([evidence.take(range(n)), evidence.take(range(n, 2 * n))], groups)
        note(f"{name}: {n} pairs after {time.perf_counter() - began:.0f} s")
    results = {
        name: {"pairs": len(part[1]), "inside": inside(*part)} for name, part in known.items()
    }
    for name in results:
        others = [part for other_name, part in known.items() if other_name != name]
        results[name]["across"] = {
            detector.name: across(detector, others, known[name]) for detector in make_detectors()
        }
        note(f"{name}: {results[name]}")
    shown = {
        "model": chosen.model,
        "seconds": round(time.perf_counter() - began),
        "origins": results,
    }
    publish("vhack_detectors", shown, chosen.output)


if __name__ == "__main__":
    main()
