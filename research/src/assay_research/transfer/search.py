"""Detectors on activations and likelihoods, fitted to own samples and asked of other origins.

Shapes: S samples, T tokens, L layers, H width of the hidden state.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from assay.stats.ranks import auroc
from assay_research.transfer.origins import Labelled

Array = npt.NDArray[np.floating]
POOLS = ("mean", "last", "late", "change", "tests")
STRENGTHS = (0.1, 1.0, 10.0)  # of a ridge, in mean eigenvalues of the Gram matrix
SHRUNK = 0.1  # weight of the mean variance in a covariance
TESTS = re.compile(r"def \w*(test|check|verif|valid)|assert|expect\(|class Test|\btest\(|print\(")
TOP = 8  # the part of the tokens that the highest are taken of


@dataclass(frozen=True)
class Kept:
    """States and log-probabilities of an origin, as :mod:`assay_research.transfer.activations`
    wrote them.
    """

    folder: Path

    @cached_property
    def samples(self) -> list[Labelled]:
        """Samples of the origin."""
        rows = json.loads((self.folder / "samples.json").read_text())
        return [Labelled(**row) for row in rows]

    @cached_property
    def labels(self) -> npt.NDArray[np.bool_]:
        """Which samples are hacks, [S]."""
        return np.array([sample.is_hack for sample in self.samples])

    @cached_property
    def groups(self) -> list[str]:
        """Group of each sample."""
        return [sample.group for sample in self.samples]

    @cached_property
    def spans(self) -> list[slice]:
        """Tokens of each sample."""
        offsets = np.load(self.folder / "offsets.npy")
        return [slice(a, b) for a, b in pairwise(offsets.tolist())]

    @cached_property
    def states(self) -> Array:
        """States of all completion tokens, [T, L, H], on disk."""
        return np.load(self.folder / "states.npy", mmap_mode="r")

    def logprobs(self, name: str = "") -> Array:
        """Log-probabilities of all tokens, after an instruction."""
        return np.load(self.folder / f"logprobs{name}.npy")

    @cached_property
    def pooled(self) -> dict[str, Array]:
        """States of each sample by pooling, [S, L, H] each."""
        path = self.folder / "pooled.npz"
        if not path.exists():
            last_SLH = np.load(self.folder / "last.npy")
            rows: dict[str, list[Array]] = {name: [] for name in POOLS}
            for sample, span, last_LH in zip(self.samples, self.spans, last_SLH, strict=True):
                states_TLH = self.states[span].astype(np.float32)
                count = len(states_TLH)
                match = TESTS.search(sample.completion)
                begin = int(count * match.start() / len(sample.completion)) if match else 0
                rows["mean"].append(states_TLH.mean(0))
                rows["last"].append(states_TLH[-1])
                rows["late"].append(states_TLH[-max(1, count // 4) :].mean(0))
                rows["change"].append(states_TLH.mean(0) - last_LH.astype(np.float32))
                rows["tests"].append(states_TLH[min(begin, count - 1) :].mean(0))
            np.savez(path, **{name: np.stack(part) for name, part in rows.items()})
        with np.load(path) as arrays:
            return dict(arrays)


def areas(origins: Mapping[str, Kept], score: Callable[[Kept], Array]) -> dict[str, float]:
    """Return the AUROC of a score on each origin."""
    areas_by_origin = {}
    for name, kept in origins.items():
        scores_S = score(kept)
        areas_by_origin[name] = float(auroc(scores_S[kept.labels], scores_S[~kept.labels]))
    return areas_by_origin


def joined(own: Sequence[Kept], pool: str, layer: int) -> tuple[Array, Array, Array]:
    """Return own states of a layer, labels of ±1 and weights that count origins alike."""
    states_SH = np.concatenate([kept.pooled[pool][:, layer] for kept in own])
    labels_S = np.concatenate([np.where(kept.labels, 1.0, -1.0) for kept in own])
    weights_S = np.concatenate([np.full(len(kept.labels), 1 / len(kept.labels)) for kept in own])
    return states_SH, labels_S, weights_S / weights_S.sum()


def directions(states_SH: Array, labels_S: Array, weights_S: Array) -> Iterator[tuple[str, Array]]:
    """Yield directions by name: difference of means, scaled, whitened by clean samples, ridge."""
    hack_S = labels_S > 0
    mean_H = np.average(states_SH[hack_S], axis=0, weights=weights_S[hack_S])
    clean_H = np.average(states_SH[~hack_S], axis=0, weights=weights_S[~hack_S])
    difference_H = mean_H - clean_H
    centred_SH = states_SH[~hack_S] - clean_H
    spread_H = centred_SH.std(0) + 1e-6
    yield "means", difference_H
    yield "scaled", difference_H / spread_H**2
    covariance_HH = centred_SH.T @ centred_SH / len(centred_SH)
    covariance_HH = (1 - SHRUNK) * covariance_HH + SHRUNK * np.diag(spread_H**2)
    yield "whitened", np.linalg.solve(covariance_HH, difference_H)
    scaled_SH = (states_SH - np.average(states_SH, axis=0, weights=weights_S)) / spread_H
    roots_S = np.sqrt(weights_S * len(weights_S))
    scaled_SH = scaled_SH * roots_S[:, None]
    values, vectors = np.linalg.eigh(scaled_SH @ scaled_SH.T)
    for strength in STRENGTHS:
        dual_S = vectors @ (
            (vectors.T @ (labels_S * roots_S)) / (values + strength * values.mean())
        )
        yield f"ridge {strength:g}", scaled_SH.T @ dual_S / spread_H


def top_tokens(kept: Kept, layer: int, direction_H: Array) -> Array:
    """Return of each sample the mean of the top eighth of its tokens along a direction."""
    scores = []
    for span in kept.spans:
        along_T = kept.states[span][:, layer].astype(np.float32) @ direction_H
        scores.append(np.sort(along_T)[-max(1, len(along_T) // TOP) :].mean())
    return np.array(scores)


def likelihoods(kept: Kept) -> dict[str, Array]:
    """Return what likelihoods say of each sample; signs are such as the idea behind each has."""
    plain_T = kept.logprobs()
    numbers = {
        "surprisal": [-plain_T[span].mean() for span in kept.spans],
        "highest surprisal": [-plain_T[span].min() for span in kept.spans],
        "top surprisal": [
            -np.sort(plain_T[span])[: max(1, (span.stop - span.start) // TOP)].mean()
            for span in kept.spans
        ],
    }
    if (kept.folder / "answers.npy").exists():
        cheat_T, honest_T, bare_T = (kept.logprobs(f"_{n}") for n in ("cheat", "honest", "bare"))
        ratio_T = cheat_T - honest_T
        numbers |= {
            "cheat less honest": [ratio_T[span].mean() for span in kept.spans],
            "sum of cheat less honest": [ratio_T[span].sum() for span in kept.spans],
            "top of cheat less honest": [
                np.sort(ratio_T[span])[-max(1, (span.stop - span.start) // TOP) :].mean()
                for span in kept.spans
            ],
            "cheat less none": [(cheat_T - plain_T)[span].mean() for span in kept.spans],
            "without less with prompt": [(bare_T - plain_T)[span].mean() for span in kept.spans],
            "asked": list(np.load(kept.folder / "answers.npy")),
        }
    return {name: np.array(values) for name, values in numbers.items()}
