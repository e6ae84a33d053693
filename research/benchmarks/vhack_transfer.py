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

from assay.vhack.detectors.detector import make_detector
from assay.vhack.detectors.evidence import SampleEvidence
from assay.vhack.detectors.facts import FACTS, collect_facts
from assay.vhack.pairs.pairs import Sample


def read_evidence(samples):
    """Texts and facts of samples, with labels."""
    facts = collect_facts([Sample(sample.prompt, sample.completion) for sample in samples])
    texts = tuple(sample.completion for sample in samples)
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
    own_evidence = evaluate.concatenated(list(parts.values()))
    note(f"own: {len(own_evidence.hack)} pairs")
    detectors = [
        *map(make_detector, ("length", "ngrams", "program")),
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
            "groups": len({sample.group for sample in samples}),
            "transferred": {
                sample.name: evaluate.transferred(sample, own_evidence, target)
                for sample in detectors
            },
            "ceiling": {sample.name: evaluate.ceiling(sample, target) for sample in detectors},
            "facts": {
                fact: [
                    round(float(side.facts[:, n].mean()), 3) for side in (target.hack, target.clean)
                ]
                for n, fact in enumerate(FACTS)
            },
            "few labels": {
                sample.name: {
                    n: evaluate.few_labels(sample, own_evidence, target, n) for n in evaluate.FEW
                }
                for sample in detectors
                if sample.name == "fitted facts"
            },
        }
        note(f"{name}: {results[name]}")
    targets["solutions"] = read_evidence(clean_solutions(chosen.data))
    program = make_detector("program")
    publish(
        "vhack_transfer",
        {
            "own": {
                name: evaluate.transferred(program, own_evidence, part)
                for name, part in parts.items()
            },
            "weights": fitted_weights(parts),
            "origins": results,
            "promise": evaluate.promise(program, own_evidence, targets),
        },
        chosen.output,
    )


if __name__ == "__main__":
    main()
