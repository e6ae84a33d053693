"""The r_target of a wanted valid rate, measured from proofs beside the closed form.

Legend of shapes: N nonces, K published numbers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

from assay import stats
from assay.errors import UsageError
from assay.poc.protocol import RANDOM_HEAD_ROWS, Proof, Round, VectorRecord, block_target

MIN_NONCES = 30  # of a proof, for its quantiles
CONFIDENCE = 0.95  # of the interval of a quantile


@dataclass(frozen=True, kw_only=True)
class MeasuredTarget:
    """A measured r_target beside the closed form.

    Args:
        valid_rate: Wanted share of valid nonces.
        dimension: Dimension of the space in which the distance is measured.
        r_target: Closed form, by the chord law.
        measured: Quantile of the measured distances.
        low: Lower end of its interval, from order statistics.
        high: Upper end of its interval.
        confidence: Confidence of the interval, for which no law is assumed.
        n: Number of nonces measured.
        off_in_standard_errors: Measured minus closed form, over the standard error of the quantile under the law.
    """

    valid_rate: float
    dimension: int
    r_target: float
    measured: float
    low: float
    high: float
    confidence: float
    n: int
    off_in_standard_errors: float

    @property
    def agrees(self) -> bool:
        """Whether the closed form lies in the interval of the measured one."""
        return self.low <= self.r_target <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**self.__dict__, "agrees": self.agrees}


def measure_r_target(proof: Proof, valid_rate: float, *, dimension: int | None = None) -> MeasuredTarget:
    """Measure the r_target of a valid rate from the nonces of a proof.

    Args:
        proof: Proof of any preset; of a vector, its distance to the target of the block in R^K counts.
        valid_rate: Wanted share of valid nonces, in (0, 1).
        dimension: Dimension of the output; needed where the preset has no random head and publishes distances.

    Returns:
        The measured target with its interval, beside the closed form.

    Raises:
        UsageError: A rate or dimension is out of range or missing, or there are fewer than 30 nonces.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> found = assay.poc.measure_r_target(assay.poc.prove(model, round, range(64)), 0.5)
        >>> found.n, found.dimension, round.r_target - 0.05 < found.r_target < round.r_target
        (64, 8192, True)
    """
    pipeline = proof.header.pipeline
    known = pipeline.vector_size or (RANDOM_HEAD_ROWS if pipeline.head == "random" else None)
    vectors = [record.vector for record in proof.records if isinstance(record, VectorRecord)]
    values = np.array(vectors) if vectors else proof.distances
    if known is not None and dimension not in (None, known):
        seen = f"--dimension {dimension} with preset {pipeline.name}"
        raise UsageError(seen, wanted=f"its {known}", do="leave --dimension out")
    size = known or dimension
    if size is None:
        raise UsageError(
            f"a proof of preset {pipeline.name}",
            wanted="the dimension of its output",
            do="pass --dimension: the vocabulary with the trained head, the hidden size without one",
        )
    return r_target_from(distances_from(values, proof.round), valid_rate, size)


def r_target_from(distances_N: npt.NDArray[np.float64], valid_rate: float, dimension: int) -> MeasuredTarget:
    """Compare the quantile of distances [N] with the closed form.

    The interval runs between the order statistics whose ranks hold a binomial count of N and the rate with the stated
    confidence. The standard error of the quantile is √(p(1 − p)/N) over the density of the law there.

    Raises:
        UsageError: There are fewer than 30 distances, or the rate is not in (0, 1).
    """
    n = len(distances_N)
    if n < MIN_NONCES or not 0.0 < valid_rate < 1.0:
        raise UsageError(
            f"{n} nonces for a valid rate of {valid_rate}",
            wanted=f"at least {MIN_NONCES} nonces and a rate in (0, 1)",
            do="prove more nonces, for instance --nonces 0:1024, and give 0.1 for 10 %",
        )
    ordered_N = np.sort(distances_N)
    tail = (1 - CONFIDENCE) / 2
    ranks = np.asarray(distributions.binom.ppf([tail, 1 - tail], n, valid_rate), dtype=int)
    low, high = ordered_N[np.clip(ranks, 1, n) - 1]
    closed, measured = stats.r_target_for(valid_rate, dimension), float(np.quantile(distances_N, valid_rate))
    error = stats.rate_standard_error(valid_rate, n) / float(stats.chord_pdf(closed, dimension))
    return MeasuredTarget(
        valid_rate=valid_rate,
        dimension=dimension,
        r_target=closed,
        measured=measured,
        low=float(low),
        high=float(high),
        confidence=CONFIDENCE,
        n=n,
        off_in_standard_errors=(measured - closed) / error,
    )


def distances_from(values: npt.NDArray[np.floating[Any]], round: Round) -> npt.NDArray[np.float64]:
    """Return distances [N] as they are, and of vectors [N, K] the distance of each to the round's target in R^K."""
    if values.ndim == 1:
        return values.astype(np.float64)
    unit_NK = values.astype(np.float64)
    unit_NK /= np.linalg.norm(unit_NK, axis=1, keepdims=True)
    target_K = block_target(round, values.shape[1]).numpy().astype(np.float64)
    return np.asarray(np.linalg.norm(unit_NK - target_K, axis=1))
