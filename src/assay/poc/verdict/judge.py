"""The judge: residuals of received and recomputed values, and the verdict that they give."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.proof import (
    DistanceRecord,
    Header,
    Proof,
    Record,
    TokenRecord,
    VectorRecord,
)
from assay.poc.verdict.noise import Control, Noise, missing_law, sequential_test
from assay.stats.e_values import Decision

P_FLIP = 5e-4  # honest mismatch rate of distances that the published rule assumes
COUNT_ALPHA = 0.01  # level of the published count test
DIST_THRESHOLD = 0.02  # distance of two vectors above which the published rule counts a mismatch
P_MISMATCH = 0.001  # honest mismatch rate of vectors that the published rule assumes
LARGEST_MARGIN = (
    4.0  # largest margin that a token counts with: the largest squared distance of two unit vectors
)
Outcome = (
    Decision | Literal["faulty"]
)  # where residuals depend on the place, and are honest elsewhere
YOUR_MODEL = "MODEL"  # in advice to a reader whose own flags are not known
EXIT_CODES: dict[Outcome, int] = {"honest": 0, "fraud": 1, "undecided": 2, "faulty": 2}
"""What a command exits with, by verdict."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a verification.

    Args:
        verdict: Outcome of the sequential test, or faulty.
        reason: Numbers that decided, in one sentence.
        checked: Number of recomputed nonces.
        proved: Number of nonces in the proof.
        sequential: Sequential test on the residuals (distances) or on their logarithms (vectors),
            those at bad places left out; None without a law of honest noise.
        places: Test of whether residuals depend on the place in the prover's batches; None without
            a law.
        count: Published rule: flips across r_target, or vectors further off than the threshold. It
            decides nothing.
        noise: Measured honest noise, and where it comes from; None where none was measured, so that
            the verdict is undecided.
        power: Chance with which the sample accuses a node that computes a tenth of its nonces at
            five times the honest noise; None without a law.
        residuals: Received minus recomputed distance, or L2 distance of the vectors, per checked
            nonce; where the law has a control, they are scores.
        nonces: Nonces that were checked.
        sample_seed: Number that draws the same sample again.
        header: Header of the proof, whose values agree with the pins.
        pins: Values that the validator gave.
    """

    verdict: Outcome
    reason: str
    checked: int
    proved: int
    sequential: stats.SequentialResult | None
    places: stats.PlaceTest | None
    count: stats.CountTest
    noise: Noise | None
    power: float | None
    residuals: tuple[float, ...]
    nonces: tuple[int, ...]
    sample_seed: int
    header: Header
    pins: Pins

    @property
    def honest(self) -> bool:
        """Whether the verdict is honest."""
        return self.verdict == "honest"

    @property
    def fraud(self) -> bool:
        """Whether the verdict is fraud."""
        return self.verdict == "fraud"

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Names of the values that are not pinned but the prover's word, as fields of
        :class:`Pins`.
        """
        return self.pins.unpinned(self.header)

    @property
    def work(self) -> float:
        """Share of the node's work that the check took."""
        return self.checked / self.proved

    @property
    def exit_code(self) -> int:
        """0 for an honest proof whose values are all pinned, 1 for fraud, 2 for anything else."""
        return 2 if self.honest and self.unpinned else EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values; a residual that is not a number is null."""
        header = self.header
        values = dict(vars(self)) | {"count": asdict(self.count), "work": self.work}
        if self.noise is not None and self.sequential is not None and self.places is not None:
            values |= {"noise": self.noise.as_dict(), "sequential": asdict(self.sequential)}
            values["places"] = {
                name: one for name, one in asdict(self.places).items() if name != "set_aside"
            }
        values["residuals"] = [value if math.isfinite(value) else None for value in self.residuals]
        del values["header"], values["pins"]
        stated = {
            name: getattr(header.round, name)
            for name in ("block_hash", "public_key", "model", "preset")
        }
        stated |= {"digest": header.digest, "dtype": header.fingerprint.dtype}
        believed = {"pinned": self.pins.given, "unpinned": self.unpinned}
        return {"schema": "assay.poc.verdict/1", **values, **stated, **believed}


def residuals(received: Sequence[Record], recomputed: Sequence[Record]) -> np.ndarray:
    """Return the residual of every nonce, [N] in float64.

    The residual of distances is received minus recomputed. That of vectors is their L2 distance.
    That of tokens is √(mean ‖u − v‖² + mean d): u and v are the two sketches of a state, and d is
    the score of the best token minus that of the claimed one, at most 4. Noise m times larger makes
    both terms m² times larger. A missing or non-finite value gives NaN, which every test counts as
    a mismatch.
    """
    return np.array([_residual(a, b) for a, b in zip(received, recomputed, strict=True)])


def compare(
    received: Sequence[Record], own: Sequence[Sequence[Record]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a node's residuals from each own computation of a validator, [E, N], and those between
    these, [P, N].
    """
    between = [residuals(one, other) for one, other in combinations(own, 2)]
    return np.stack([residuals(received, one) for one in own]), np.stack(between)


def scores(
    received: Sequence[Record],
    recomputed: Sequence[Record],
    again: Mapping[str, Sequence[Record]],
    control: Control,
) -> np.ndarray:
    """Return the score of every nonce by a control, [N] in float64; ``again`` has its records by
    number format.
    """
    return control.scores(
        *compare(received, [recomputed, *(again[name] for name in control.dtypes)])
    )


def judge(
    proof: Proof,
    received: Sequence[Record],
    recomputed: Sequence[Record],
    noise: Noise | None,
    *,
    again: Mapping[str, Sequence[Record]] | None = None,
    pins: Pins | None = None,
    test: stats.SequentialTest | None = None,
    seed: int = 0,
    power: float | None = None,
) -> Verdict:
    """Judge the records of a sample of a proof against recomputed ones of the same nonces, in the
    same order.

    Without a law of honest noise the verdict is undecided, whatever the residuals are. ``again``
    has what the validator computed again, by number format, where the law has a control. ``test``
    is a fresh one; that of the honest noise at the usual error rates when None. The header agrees
    with ``pins``. ``seed`` drew the sample, and ``power`` is what
    :func:`assay.poc.verdict.noise.plan_sample` says of it.
    """
    header = proof.header
    errors = residuals(received, recomputed)
    count = count_mismatches(errors)
    if noise is not None and noise.control is not None:
        errors = scores(received, recomputed, again or {}, noise.control)
    nonces = tuple(record.nonce for record in received)
    outcome: Outcome = "undecided"
    reason = missing_law(YOUR_MODEL, header.digest, header.round)
    result = None
    found = None
    if noise is not None:
        test = test or sequential_test(noise)
        places = header.places_of(nonces)
        stated = header.fingerprint.batch_size
        outcome, result, found = judge_residuals(
            errors, noise, test=test, positions=places, batch_size=stated
        )
        reason = _reason(outcome, result, found)
    if header.pipeline.output == "distance":
        pairs = [
            (a.distance, b.distance)
            for a, b in zip(received, recomputed, strict=True)
            if isinstance(a, DistanceRecord)
            and isinstance(b, DistanceRecord)
            and header.is_valid(a)
        ]
        count = published_rule([a for a, _ in pairs], [b for _, b in pairs], header.round.r_target)
    return Verdict(
        verdict=outcome,
        reason=reason,
        checked=len(received),
        proved=proof.footer.records,
        sequential=result,
        places=found,
        count=count,
        noise=noise,
        power=power,
        residuals=tuple(float(value) for value in errors),
        nonces=nonces,
        sample_seed=seed,
        header=header,
        pins=pins or Pins(),
    )


def _residual(a: Record, b: Record) -> float:
    if isinstance(a, DistanceRecord) and isinstance(b, DistanceRecord):
        return a.distance - b.distance
    if (
        isinstance(a, VectorRecord)
        and isinstance(b, VectorRecord)
        and a.vector.shape == b.vector.shape
    ):
        return float(np.linalg.norm(a.vector.astype(np.float64) - b.vector.astype(np.float64)))
    if not (
        isinstance(a, TokenRecord)
        and isinstance(b, TokenRecord)
        and a.sketches.shape == b.sketches.shape
    ):
        return math.nan
    if b.margins is None:  # not a replay of these tokens
        return math.nan
    apart = a.sketches.astype(np.float64) - b.sketches.astype(np.float64)
    margins = np.minimum(b.margins.astype(np.float64), LARGEST_MARGIN)
    return math.sqrt(np.square(apart).sum(axis=1).mean() + margins.mean())


def judge_residuals(
    errors_N: npt.NDArray[np.float64],
    noise: Noise,
    *,
    test: stats.SequentialTest,
    positions: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> tuple[Outcome, stats.SequentialResult, stats.PlaceTest]:
    """Judge residuals, apart from those at faulty places of the batch.

    A machine that is wrong at certain places only is faulty and not a cheat. The residuals at its
    bad places are set aside. The others are judged as always, and if they accuse, the verdict is
    fraud. If a dependence on the place is only suspected, large residuals at the suspected places
    are not yet called fraud.

    The residuals [N], NaN for a missing value, come in the order in which they were checked, and
    ``test`` is a fresh one. ``positions`` are the indices of the nonces in the prover's own
    sequence, in batches of the ``batch_size`` that it states; the places are not tested when None.
    """
    at_N = np.arange(len(errors_N)) if positions is None else np.asarray(positions)
    places = stats.place_test(errors_N, at_N, batch_size=batch_size, honest_size=noise.size)
    if positions is None or not (places.faulty or places.suspected):
        result = test.update(errors_N).result
        return result.verdict, result, places
    elsewhere = copy.deepcopy(test).update(errors_N[~places.set_aside]).result
    if places.faulty:
        return "fraud" if elsewhere.verdict == "fraud" else "faulty", elsewhere, places
    result = test.update(errors_N).result
    unsure = result.verdict == "fraud" and elsewhere.verdict != "fraud"
    return "undecided" if unsure else result.verdict, result, places


def _reason(outcome: Outcome, result: stats.SequentialResult, places: stats.PlaceTest) -> str:
    where = (
        f"{places.pattern} ({places.share:.0%} of the places), {places.ratio:.1f} times the others"
    )
    if outcome == "faulty":
        return (
            f"residuals are large at {where}, p = {places.p_value:.1g}: a faulty machine, not "
            f"another computation"
        )
    if outcome == "fraud":
        return (
            f"e-value e^{result.log_e_max:.1f} passes 1/{result.alpha:g}: honest noise does not "
            f"give such residuals"
        )
    if places.suspected and result.verdict == "fraud":
        return (
            f"large residuals may be a fault of the place, at {where}, p = {places.p_value:.1g}: "
            f"check more nonces"
        )
    if outcome == "honest":
        share = result.share_excluded
        excluded = "" if share is None else f"; it excludes {share:.0%} computed cheaply"
        return f"evidence e^{result.log_evidence_honest:.1f} against {result.weakest}{excluded}"
    few = (
        f"{result.n} nonces are too few to decide at error rates {result.alpha:g} and "
        f"{result.beta:g}"
    )
    return (
        f"{few}: least evidence, e^{result.log_evidence_honest:.1f}, against {result.weakest}; "
        f"check more"
    )


def published_rule(
    received: Sequence[float], recomputed: Sequence[float], r_target: float
) -> stats.CountTest:
    """Apply the published rule to nonces that were claimed valid: fraud if a count against 5e-4
    gives p < 0.01.

    A mismatch is a received distance at or above ``r_target``, a recomputed one above it, or one
    that is not finite.
    """
    mismatches = sum(
        not (a < r_target and b <= r_target) for a, b in zip(received, recomputed, strict=True)
    )
    return stats.count_test(mismatches, len(received), P_FLIP, COUNT_ALPHA)


def count_mismatches(
    distances: np.ndarray,
    *,
    threshold: float = DIST_THRESHOLD,
    p_mismatch: float = P_MISMATCH,
    alpha: float = COUNT_ALPHA,
) -> stats.CountTest:
    """Count vectors [N] whose L2 distance is above the threshold or not finite, and test the
    count.
    """
    mismatches = int(np.count_nonzero(~(distances <= threshold)))
    return stats.count_test(mismatches, len(distances), p_mismatch, alpha)
