"""Detectors fitted to our own pairs and asked of what others wrote (research/notes/transfer.md).

Without --states it asks those that take no pass of a model, on all samples of each origin. With it,
it takes what `python -m assay_research.transfer.activations` kept of SmolLM2, on the samples there.

    python research/benchmarks/vhack_transfer.py --data DATA --origins A B C \
      -o research/results/vhack_transfer.json
"""

from pathlib import Path

from _common import note, parser, publish
from assay_research.transfer import evaluate
from assay_research.transfer.kinds import kind_pairs
from assay_research.transfer.origins import (
    OWN,
    clean_solutions,
    from_pairs,
    own_samples,
    read_origin,
)
from assay_research.transfer.stdin_kinds import stdin_pairs

from assay.vhack.detectors.all_detectors import make_detectors
from assay.vhack.detectors.evidence import SampleEvidence
from assay.vhack.detectors.facts import FACTS, collect_facts
from assay.vhack.pairs.pairs import Sample


def read_evidence(samples):
    """Texts and facts of samples, with labels."""
    facts = collect_facts([Sample(one.prompt, one.completion) for one in samples])
    texts = tuple(one.completion for one in samples)
    return evaluate.labelled(SampleEvidence(texts, facts=facts), samples)


def own_parts():
    """Own samples by origin."""
    parts = {name: own_samples(name) for name in OWN}
    return parts | {"kinds": from_pairs(kind_pairs(288)), "stdin": from_pairs(stdin_pairs(50))}


def fitted_weights(parts):
    """Weights of facts by a logistic regression in which own origins count alike."""
    import numpy as np

    features, labels, weights = [], [], []
    for part in parts.values():
        for side, is_hack in ((part.hack, True), (part.clean, False)):
            features.append(side.facts.numpy())
            labels.append(np.full(len(side), is_hack))
            weights.append(np.full(len(side), 1 / (len(part.hack) + len(part.clean))))
    solution = evaluate.logistic(*map(np.concatenate, (features, labels, weights)))
    return {name: round(float(value), 2) for name, value in zip(FACTS, solution, strict=True)}


def main():
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the files of others")
    options.add_argument("--codeforces", type=Path, help="git directory of origin D")
    options.add_argument("--origins", nargs="+", default=["A", "B", "C"])
    chosen = options.parse_args()
    parts = {name: read_evidence(samples) for name, samples in own_parts().items()}
    own = evaluate.concatenated(list(parts.values()))
    note(f"own: {len(own.hack)} pairs")
    detectors = [
        *make_detectors(("length", "ngrams", "program")),
        evaluate.FormDetector("form"),
        evaluate.FittedFactsDetector("fitted facts"),
    ]
    targets = {}
    results = {}
    for name in chosen.origins:
        samples = read_origin(name, chosen.data, chosen.codeforces)
        target = targets[name] = read_evidence(samples)
        results[name] = {
            "samples": [len(target.hack), len(target.clean)],
            "groups": len({one.group for one in samples}),
            "transferred": {one.name: evaluate.transferred(one, own, target) for one in detectors},
            "ceiling": {one.name: evaluate.ceiling(one, target) for one in detectors},
            "facts": {
                fact: [
                    round(float(side.facts[:, n].mean()), 3) for side in (target.hack, target.clean)
                ]
                for n, fact in enumerate(FACTS)
            },
            "few labels": {
                one.name: {n: evaluate.few_labels(one, own, target, n) for n in evaluate.FEW}
                for one in detectors
                if one.name == "fitted facts"
            },
        }
        note(f"{name}: {results[name]}")
    targets["solutions"] = read_evidence(clean_solutions(chosen.data))
    (program,) = make_detectors(("program",))
    publish(
        "vhack_transfer",
        {
            "own": {name: evaluate.transferred(program, own, part) for name, part in parts.items()},
            "weights": fitted_weights(parts),
            "origins": results,
            "promise": evaluate.promise(program, own, targets),
        },
        chosen.output,
    )


if __name__ == "__main__":
    main()
