"""The judge of responses: a replay against the honest noise between two engines."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from assay.poc.protocol.record import Fingerprint
from assay.poc.responses.calibration import ResponseCalibration, default_response_noise
from assay.poc.responses.pins import ReceiptPins
from assay.poc.responses.receipts import ReceiptHeader, Receipts
from assay.poc.responses.replay import Replayed
from assay.poc.verdict.judge import EXIT_CODES
from assay.poc.verdict.ledger_entries import RESPONSES, Account, Update, response_identity
from assay.poc.verdict.noise import ResponseNoise, ResponseResult, ResponseTest


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseVerdict:
    """The result of a replay.

    Args:
        result: All numbers of the test.
        reason: Numbers that decided, in one sentence.
        noise: Honest noise that was assumed, and where it comes from.
        replayed: What the replay gave, in the order in which it was judged.
        receipts: Receipts of which these are all or a sample.
        pins: Values that the validator gave, with which the receipts agree.
        sample_seed: Number that draws the same sample again; None where all were replayed.
    """

    result: ResponseResult
    reason: str
    noise: ResponseNoise
    replayed: tuple[Replayed, ...]
    receipts: Receipts
    pins: ReceiptPins
    sample_seed: int | None

    @property
    def verdict(self) -> str:
        """``honest``, ``fraud`` or ``undecided``."""
        return self.result.verdict

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Names of the values that were taken on the node's word."""
        return self.pins.unpinned(self.receipts)

    @property
    def unanswered(self) -> int:
        """Number of the requests that have no receipt, or one of an answer that was aborted or has no token."""
        return self.pins.unanswered(self.receipts)

    @property
    def exit_code(self) -> int:
        """0 for honest receipts of all requests with nothing taken on the node's word, 1 for fraud, 2 otherwise."""
        honest = self.result.verdict == "honest"
        return 2 if honest and (self.unpinned or self.unanswered) else EXIT_CODES[self.result.verdict]

    @property
    def tokens(self) -> int:
        """Number of the tokens that were compared."""
        return sum(len(one.margins) for one in self.replayed)

    @property
    def matches(self) -> int:
        """Number of these that are the verifier's own."""
        return sum(one.matches for one in self.replayed)

    def updates(self) -> list[Update]:
        """Return what a ledger records: one entry for every response, whose nonces are its blocks of 32 tokens."""
        header = self.receipts.header
        account = Account(
            public_key=header.public_key,
            digest=header.digest,
            build=self.pins.known.build_of(header.fingerprint),
            preset=RESPONSES,
        )
        return [
            Update(
                account=account,
                round=response_identity(header.seed(one.receipt).text),
                block_hash=one.receipt.block_hash,
                noise=self.noise,
                nonces=range(len(blocks)),
                residuals=blocks.distances.tolist(),
                profiles=blocks.text,
                proof=self.receipts.footer.sha256,
                sample_seed=self.sample_seed,
            )
            for one in self.replayed
            if len(blocks := one.blocks)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values, with a row for every response."""
        header = self.receipts.header
        rows = [
            {
                "request_id": one.receipt.request_id,
                "index": one.receipt.index,
                "tokens": len(one.receipt.output),
                "compared": len(one.margins),
                "matches": one.matches,
                "margins": [float(x) if math.isfinite(x) else None for x in one.margins],
                "residuals": one.residuals.tolist(),
            }
            for one in self.replayed
        ]
        return {
            "schema": "assay.poc.replay/1",
            "verdict": self.verdict,
            "reason": self.reason,
            "receipts": self.receipts.footer.receipts,
            "replayed": len(self.replayed),
            "tokens": self.tokens,
            "matches": self.matches,
            "test": asdict(self.result),
            "noise": self.noise.as_dict(),
            "responses": rows,
            "public_key": header.public_key,
            "digest": header.digest,
            "dtype": header.fingerprint.dtype,
            "sample_seed": self.sample_seed,
            "unpinned": self.unpinned,
            "unanswered": self.unanswered,
        }


def judge_responses(
    replayed: Sequence[Replayed],
    receipts: Receipts,
    noise: ResponseNoise,
    *,
    pins: ReceiptPins | None = None,
    alpha: float = 1e-3,
    sample_seed: int | None = None,
) -> ResponseVerdict:
    """Judge what a replay gave.

    Args:
        replayed: What the replay gave, in an order that does not depend on it.
        receipts: Receipts that were replayed, or of which a sample was.
        noise: Honest noise between the two engines.
        pins: Values that the validator gave, with which the receipts agree; nothing when None.
        alpha: Bound on the chance that an honest node is ever accused.
        sample_seed: Number that drew the sample; None where all were replayed.

    Raises:
        UsageError: A rate is out of range.
    """
    test = ResponseTest(noise, alpha=alpha)
    for one in replayed:
        test.update(one.blocks)
    result = test.result
    return ResponseVerdict(
        result=result,
        reason=_reason(result, alpha, noise),
        noise=noise,
        replayed=tuple(replayed),
        receipts=receipts,
        pins=pins or ReceiptPins(),
        sample_seed=sample_seed,
    )


def noise_between(
    header: ReceiptHeader, verifier: Fingerprint, calibration: ResponseCalibration | None
) -> ResponseNoise:
    """Return the honest noise between the engine of receipts and the engine of their verifier.

    Raises:
        CalibrationError: The calibration is of another model or build, or there is no default; names what differs.
    """
    if calibration is None:
        return default_response_noise(header.fingerprint.dtype, verifier.dtype)
    calibration.check(header, verifier)
    return calibration.noise


def sample_receipts(receipts: Receipts, size: int, seed: int) -> Receipts:
    """Return receipts with a sample of the responses that have tokens, in the order of the file."""
    whole = [receipt for receipt in receipts.receipts if receipt.output]
    chosen = sorted(np.random.default_rng(seed).choice(len(whole), size=size, replace=False).tolist())
    return replace(receipts, receipts=tuple(whole[index] for index in chosen))


def _reason(result: ResponseResult, alpha: float, noise: ResponseNoise) -> str:
    parts = {"tokens": result.tokens, "sketches": result.sketches}
    seen = {name: part for name, part in parts.items() if part.n}
    if result.verdict == "fraud":
        loudest = max(seen, key=lambda name: seen[name].log_e_max)
        return f"e-value e^{result.log_e_max:.1f} passes 1/{alpha:g}, most of it by the {loudest}"
    weakest = min(seen, key=lambda name: seen[name].log_evidence_honest, default="tokens")
    part = parts[weakest]
    against = f"evidence e^{part.log_evidence_honest:.1f} against {part.weakest} in the {weakest}"
    if result.verdict == "honest":
        excluded = noise.tokens.effect * noise.tokens.law.size
        return against + (f"; tokens exclude differences of logits of {excluded:.2g}" if result.tokens.n else "")
    return f"{result.n} blocks of {result.responses} responses are too few to decide: {against}; replay more"
