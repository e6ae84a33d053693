"""Detectors on activations and likelihoods of SmolLM2, fitted to our own pairs and asked of what
others wrote (research/notes/transfer.md).

First keep what the model computes, of one origin after the other; then search, and score the final
origins once:

    python research/benchmarks/vhack_transfer_states.py --data DATA --states STATES --keep A B C …
    python research/benchmarks/vhack_transfer_states.py --data DATA --states STATES \
      --own authored kinds:288 --final D E -o research/results/vhack_transfer_states.json
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from assay_research.transfer import evaluate
from assay_research.transfer.activations import keep_logprobs, keep_states, load
from assay_research.transfer.kinds import kind_pairs
from assay_research.transfer.origins import from_pairs, own_samples, read_origin, subset
from assay_research.transfer.search import (
    POOLS,
    Kept,
    areas,
    directions,
    joined,
    likelihoods,
    top_tokens,
)
from assay_research.transfer.stdin_kinds import stdin_pairs

from assay.stats.ranks import auroc
from assay.vhack.detectors.detector import make_detector
from assay.vhack.detectors.evidence import SampleEvidence, spaced_layers

DEVELOPMENT = ("A", "B", "C")
PROBLEMS = 64  # of B


def read_samples(name, data, codeforces):
    """Samples of which states are kept."""
    kind, _, count = name.partition(":")
    if kind in ("kinds", "stdin"):
        return from_pairs({"kinds": kind_pairs, "stdin": stdin_pairs}[kind](int(count)))
    if name not in "ABCDE":
        return own_samples(name)
    samples = read_origin(name, data, codeforces)
    if name == "B":
        numbers = {sample.group for sample in samples}
        first = sorted(numbers, key=lambda number: hashlib.sha256(number.encode()).hexdigest())
        samples = [sample for sample in samples if sample.group in first[:PROBLEMS]]
    return subset(samples) if name in "DE" else samples


def folder_of(states, name):
    return states / name.replace(":", "_")


def labelled_of(kept):
    """Mean states at spaced layers and log-probabilities, as the registered detectors read them."""
    layers = spaced_layers(kept.pooled["mean"].shape[1])
    activations = torch.from_numpy(kept.pooled["mean"][:, layers].transpose(1, 0, 2).copy())
    logprobs = torch.tensor([float(kept.logprobs()[span].mean()) for span in kept.spans])
    texts = tuple(sample.completion for sample in kept.samples)
    return evaluate.labelled(SampleEvidence(texts, activations, logprobs), kept.samples)


def searched(own, development):
    """Every direction by its mean AUROC over the development origins, highest first."""
    rows = []
    for pool in POOLS:
        for layer in range(own[0].pooled[pool].shape[1]):
            for name, direction_H in directions(*joined(own, pool, layer)):
                found = areas(
                    development,
                    lambda kept, p=pool, n=layer, d=direction_H: kept.pooled[p][:, n] @ d,
                )
                rows.append((float(np.mean(list(found.values()))), pool, layer, name, found))
    return sorted(rows, key=lambda row: -row[0])


def rounded(found):
    return {name: round(value, 4) for name, value in found.items()}


def main():
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the files of others")
    options.add_argument("--codeforces", type=Path, help="git directory of origin D")
    options.add_argument("--states", type=Path, required=True, help="folder of kept states")
    options.add_argument("--keep", nargs="+", default=[], help="origins whose states to keep")
    options.add_argument("--instructed", action="store_true", help="likelihoods after instructions")
    options.add_argument("--own", nargs="+", default=["authored", "kinds:288"])
    options.add_argument("--final", nargs="*", default=[])
    chosen = options.parse_args()
    if chosen.keep:
        network, tokenizer = load()
        for name in chosen.keep:
            samples = read_samples(name, chosen.data, chosen.codeforces)
            kept_in = folder_of(chosen.states, name)
            keep = keep_logprobs if chosen.instructed else keep_states
            keep(network, tokenizer, samples, kept_in)
            note(f"{name}: {len(samples)} samples")
        return
    own_states = [Kept(folder_of(chosen.states, name)) for name in chosen.own]
    development = {name: Kept(folder_of(chosen.states, name)) for name in DEVELOPMENT}
    final = {name: Kept(folder_of(chosen.states, name)) for name in chosen.final}
    rows = searched(own_states, development)
    _, pool, layer, name, _ = rows[0]
    best_H = dict(directions(*joined(own_states, pool, layer)))[name]
    labelled_own = evaluate.concatenated([labelled_of(kept) for kept in own_states])
    registered = [make_detector(name) for name in ("length", "ngrams", "likelihood", "probe")]
    results = {}
    for origin, kept in (development | final).items():
        target = labelled_of(kept)
        scores_S = kept.pooled[pool][:, layer] @ best_H
        sides = scores_S[kept.labels], scores_S[~kept.labels]
        top_S = top_tokens(kept, layer, best_H)
        results[origin] = {
            "samples": [int(kept.labels.sum()), int((~kept.labels).sum())],
            "best direction": evaluate.area(sides, target),
            "its top tokens": round(float(auroc(top_S[kept.labels], top_S[~kept.labels])), 4),
            "registered": {
                detector.name: evaluate.transferred(detector, labelled_own, target)
                for detector in registered
            },
            "ceiling": {
                detector.name: evaluate.ceiling(detector, target) for detector in registered
            },
            "likelihoods": rounded(
                {
                    key: float(auroc(values[kept.labels], values[~kept.labels]))
                    for key, values in likelihoods(kept).items()
                }
            ),
        }
        note(f"{origin}: {results[origin]}")
    publish(
        "vhack_transfer_states",
        {
            "best": [pool, layer, name],
            "search": [
                [round(mean, 4), *row, rounded(row_areas)] for mean, *row, row_areas in rows[:40]
            ],
            "origins": results,
        },
        chosen.output,
    )


if __name__ == "__main__":
    main()
