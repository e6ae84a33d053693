"""Audits that are drawn from measured responses, and how soon each method accuses in them.

An audit is a row of responses, drawn with replacement: all tokens of a response stay together. A rival is a number for
every token and a threshold for their mean; the threshold of every number of tokens is the one that one in a thousand
honest audits reach, drawn from the half that calibrates. It may look once, after a number of tokens that it knows in
advance. Ours is looked at after every 32 tokens and every sketch, at a threshold that holds for all looks together.

Legend of shapes: L responses, N tokens of a response, A audits, M tokens of an audit, G numbers of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay_research.responses.rivals import CHUNK

ALPHA = 1e-3
POWER = 0.99

MOST = 2048
WITHIN = (1, 2, 4, 8, 16)  # tokens of a chunk after which audits are looked at too, in the first eight chunks
GRID = tuple(sorted({*WITHIN, *(CHUNK * i + 1 for i in range(1, 9)), *range(CHUNK, MOST + 1, CHUNK)}))
"""Numbers of tokens after which audits are looked at."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def drawn_means(
    values: Mapping[str, Sequence[FloatArray]], audits: int, rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Return, by method, the mean value of audits after each number of tokens in :data:`GRID`, [A, G].

    The first response of an audit begins at a chunk that is drawn too, so that short audits differ.

    Args:
        values: By method, the values of the tokens of every response, not-a-number where nothing is published.
        audits: Number of audits.
        rng: Source of what is drawn.
    """
    sizes = [-(-len(one) // CHUNK) for one in next(iter(values.values()))]
    rows_AQ = np.stack([_chunks(sizes, MOST // CHUNK + 1, rng) for _ in range(audits)])
    return {name: _means(of_method, rows_AQ) for name, of_method in values.items()}


def _means(values: Sequence[FloatArray], rows_AQ: IntArray) -> FloatArray:
    chunks_RC = np.concatenate([_in_chunks(one) for one in values])
    known_RC = ~np.isnan(chunks_RC)
    found = []
    for parts_RC in (np.where(known_RC, chunks_RC, 0.0), known_RC.astype(np.float64)):
        # Sums over the first tokens of each chunk, none of them to all.
        begun_RC = np.concatenate([np.zeros((len(parts_RC), 1)), parts_RC.cumsum(axis=1)], axis=1)
        whole_AQ = begun_RC[rows_AQ, -1].cumsum(axis=1)
        before_AQ = np.concatenate([np.zeros((len(rows_AQ), 1)), whole_AQ], axis=1)
        found.append(
            np.stack([before_AQ[:, n // CHUNK] + begun_RC[rows_AQ[:, n // CHUNK], n % CHUNK] for n in GRID], axis=1)
        )
    sums_AG, counts_AG = found
    # Before anything is published there is no evidence.
    return np.where(counts_AG > 0, sums_AG / np.maximum(counts_AG, 1), -np.inf)


def _in_chunks(values_N: FloatArray) -> FloatArray:
    padded = np.full(-(-len(values_N) // CHUNK) * CHUNK, np.nan)
    padded[: len(values_N)] = values_N
    return padded.reshape(-1, CHUNK)


def _chunks(sizes: Sequence[int], most: int, rng: np.random.Generator) -> IntArray:
    """Return the rows of the chunks of one audit, [Q]."""
    starts = np.cumsum([0, *sizes])
    chosen = int(rng.integers(len(sizes)))
    parts = [np.arange(starts[chosen] + int(rng.integers(sizes[chosen])), starts[chosen + 1])]
    drawn = parts[0].size
    while drawn < most:
        chosen = int(rng.integers(len(sizes)))
        parts.append(np.arange(starts[chosen], starts[chosen + 1]))
        drawn += sizes[chosen]
    return np.concatenate(parts)[:most]


def threshold(means_AG: FloatArray) -> FloatArray:
    """Return the thresholds that one in a thousand honest audits exceed after each number of tokens, [G]."""
    return np.quantile(means_AG, 1 - ALPHA, axis=0, method="higher")


def caught_after(share_G: FloatArray) -> int | None:
    """Return the smallest of :data:`GRID` after which 99 % are accused; None for never."""
    reached = np.flatnonzero(share_G >= POWER)
    return GRID[int(reached[0])] if reached.size else None


@dataclass(frozen=True)
class Looks:
    """What one response adds to the sums of a test, look by look.

    Args:
        paths: Additions up to each look, [B, K]; the last one is that of the whole response.
        tokens: Number of tokens of the response before each look, [B].
        size: Number of tokens of the response.
    """

    paths: FloatArray
    tokens: IntArray
    size: int


Evidence = Callable[[FloatArray], FloatArray]
"""From sums [..., K] to the logarithm of the e-value."""


def crossings(responses: Sequence[Looks], evidence: Evidence, audits: int, rng: np.random.Generator) -> FloatArray:
    """Return the number of tokens after which audits are accused, [A]; infinite where they are not within the grid.

    Args:
        responses: Looks of every response.
        evidence: Function from sums to the logarithm of the e-value.
        audits: Number of audits.
        rng: Source of what is drawn.
    """
    found_A = np.full(audits, np.inf)
    sums_AK = np.zeros((audits, responses[0].paths.shape[1]))
    tokens_A = np.zeros(audits)
    waiting = np.arange(audits)
    while waiting.size:
        chosen = rng.integers(len(responses), size=waiting.size)
        for index in np.unique(chosen):
            looks = responses[index]
            rows = waiting[chosen == index]
            over_AB = evidence(sums_AK[rows, None] + looks.paths) >= -np.log(ALPHA)
            crossed = over_AB.any(axis=1)
            found_A[rows[crossed]] = tokens_A[rows[crossed]] + looks.tokens[over_AB[crossed].argmax(axis=1)]
            sums_AK[rows] += looks.paths[-1]
            tokens_A[rows] += looks.size
        waiting = waiting[np.isinf(found_A[waiting]) & (tokens_A[waiting] < GRID[-1])]
    return np.where(found_A <= GRID[-1], found_A, np.inf)


def share_by(crossings_A: FloatArray) -> FloatArray:
    """Return the share of audits accused after each number of tokens in :data:`GRID`, [G]."""
    return np.asarray((crossings_A[:, None] <= np.array(GRID)).mean(axis=0))
