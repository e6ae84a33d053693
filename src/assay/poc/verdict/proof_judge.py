"""The judge of proofs: residuals of received and recomputed values, and the verdict they give."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import Record
from assay.poc.verdict.honest_noise import Noise, missing_law
from assay.poc.verdict.residuals import (
    count_mismatches,
    counted_distances,
    published_rule,
    residuals,
)
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.e_values import Outcome

YOUR_MODEL = "MODEL"  # in advice to a reader whose own flags are not known
EXIT_CODES: dict[Outcome, int] = {"honest": 0, "fraud": 1, "undecided": 2, "faulty": 2}
"""Exit codes of commands, by verdict."""


@dataclass(frozen=True, kw_only=True)
class ProofVerdict:
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
        return {
            "schema": "assay.poc.verdict/1",
            **values,
            "block_hash": header.round.block_hash,
            "public_key": header.round.public_key,
            "model": header.round.model,
            "preset": header.round.preset,
            "digest": header.digest,
            "dtype": header.fingerprint.dtype,
            "pinned": self.pins.given,
            "unpinned": self.unpinned,
        }


def judge(
    proof: Proof,
    received: Sequence[Record],
    recomputed: Sequence[Record],
    noise: Noise | None,
    *,
    controls: Mapping[str, Sequence[Record]] | None = None,
    pins: Pins | None = None,
    test: stats.SequentialTest | None = None,
    seed: int = 0,
    power: float | None = None,
) -> ProofVerdict:
    """Judge sampled records of a proof against recomputed ones, in the same order.

    Without a law of honest noise the verdict is undecided, whatever the residuals are. ``controls``
    has what the validator computed again, by number format, where the law has a control. ``test``
    is a fresh one; that of the honest noise at the usual error rates when None. The header agrees
    with ``pins``. ``seed`` drew the sample, and ``power`` is what
    :func:`assay.poc.verdict.sample_plan.plan_sample` says of it.
    """
    header = proof.header
    nonces = tuple(record.nonce for record in received)
    residuals_N = residuals(received, recomputed)
    # The published count stands beside the verdict, for those who compare.
    if header.pipeline.output == "distance":
        valid = [
            (record, again)
            for record, again in zip(received, recomputed, strict=True)
            if header.is_valid(record)
        ]
        count = published_rule(
            [record.distance for record, _ in valid],
            [again.distance for _, again in valid],
            header.round.r_target,
        )
    else:
        count = count_mismatches(counted_distances(received, recomputed))
    outcome: Outcome = "undecided"
    reason = missing_law(YOUR_MODEL, header.digest, header.round)
    result = None
    place_test = None
    if noise is not None:
        residuals_N = noise.residuals(received, recomputed, controls or {})
        outcome, result, place_test = judge_residuals(
            residuals_N,
            noise,
            test=test or sequential_test(noise),
            positions=header.places_of(nonces),
            batch_size=header.fingerprint.batch_size,
        )
        reason = _reason(outcome, result, place_test)
    return ProofVerdict(
        verdict=outcome,
        reason=reason,
        checked=len(received),
        proved=proof.footer.records,
        sequential=result,
        places=place_test,
        count=count,
        noise=noise,
        power=power,
        residuals=tuple(float(value) for value in residuals_N),
        nonces=nonces,
        sample_seed=seed,
        header=header,
        pins=pins or Pins(),
    )


def breach(proof: Proof, reason: str, *, pins: Pins) -> ProofVerdict:
    """Return the verdict on a proof that is not what its node committed to: fraud, by no residual.

    A commitment leaves no room for noise, so nothing is recomputed.
    """
    return ProofVerdict(
        verdict="fraud",
        reason=reason,
        checked=0,
        proved=proof.footer.records,
        sequential=None,
        places=None,
        count=count_mismatches(np.empty(0)),
        noise=None,
        power=None,
        residuals=(),
        nonces=(),
        sample_seed=0,
        header=proof.header,
        pins=pins,
    )


def judge_residuals(
    residuals_N: npt.NDArray[np.float64],
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
    at_N = np.arange(len(residuals_N)) if positions is None else np.asarray(positions)
    places = stats.place_test(residuals_N, at_N, batch_size=batch_size, honest_size=noise.size)
    if positions is None or not (places.faulty or places.suspected):
        result = test.update(residuals_N).result
        return result.verdict, result, places
    elsewhere = copy.deepcopy(test).update(residuals_N[~places.set_aside]).result
    if places.faulty:
        return "fraud" if elsewhere.verdict == "fraud" else "faulty", elsewhere, places
    result = test.update(residuals_N).result
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
