"""Calibrations of responses: the noise of honest receipts on a verifier's engine.

Receipts of honest provers are replayed, so what is measured is all that lies between their decoding
and this prefill. The law of tokens is fitted by maximum likelihood over mixtures of scales, that of
sketches as for vectors; responses are the clusters. The provers of one file are one build: more of
them say how far machines differ. A machine is a public key: one engine may be described in several
ways, such as for prompts of several lengths, and many in the same one.

Legend of shapes: L responses, N tokens, S sketches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, PlainValidator

from assay import stats
from assay.errors import AssayError, CalibrationError, DataError, UsageError, reason_of
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.files.storage import write_jsonl
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE
from assay.poc.protocol.strict_file import STRICT, read_as
from assay.poc.responses.receipts import ReceiptHeader, Receipts
from assay.poc.responses.token_fit import (
    FEWEST_TOKENS,
    TokenFit,
    check_number_of_tokens,
    fit_token_noise,
)
from assay.poc.verdict.honest_noise import is_bundled
from assay.poc.verdict.machine_fit import spread_of_new
from assay.poc.verdict.response_noise import EFFECTS, PartNoise, ResponseNoise
from assay.stats.chord import FloatArray
from assay.stats.noise_laws import FEWEST_RESIDUALS, fit_log_noise

if TYPE_CHECKING:
    from assay.poc.responses.replaying import ReplayedResponse

FILE_KIND = "assay.poc.responses.response_calibration"
SCHEMA = 1

# Written by research/benchmarks/responses.py --install.
BUNDLED_LAWS = Path(__file__).with_name("bundled_noise.json")

# One step of float16 numbers of this size, by which equal sketches may differ.
SKETCH_FLOOR = 2.0**-11
SKETCH_TAIL = 1.0  # heavy: a law is made wider where a bet gains on what was measured
LEAST_BETWEEN = 0.2
"""Least spread of ln distance between the sketches of responses: an odd response is in no small
sample.

Chosen after one of eight pairs of formats and models accused more honest audits than it should
(research/notes/decisions.md).
"""

WIDER = 1.15
"""Factor by which a law of sketches, or the spread of responses, is made wider at a time."""

_MOST_BETWEEN = 1.5  # of which nothing is known beyond
_MOST_STEPS = 24  # which make a law 29 times as wide
_PRICED = 512  # responses by which bets are priced, of more as many at equal distances

# Tokens from which the smallest effect is told apart from honest noise.
TOLD_APART = 256

OF_BUILD = ("engine", "device", "dtype", "attention", "torch", "library")
"""Fields of a fingerprint in which an engine must be like a measured one."""

# spread of ln scale that is assumed of one pair of engines, beside the error of its measurement
_ERROR_OF_PAIR = 0.05
_BETA = 1e-2
_MOST_PROVERS = 256


@dataclass(frozen=True, kw_only=True)
class ResponseCalibration:
    """Measured honest noise of responses between provers of one build and one verifier.

    Args:
        digest: SHA-256 of the tensors of the checkpoint.
        provers: Fingerprints of the engines that made the receipts.
        verifier: Fingerprint of the engine that replayed them.
        noise: Honest noise.
        responses: Number of responses that were measured.
        tokens: Number of their tokens that were sampled with seeds.
        matches: Number of these that were the verifier's own.
    """

    __pydantic_config__: ClassVar = STRICT

    digest: str
    provers: Annotated[tuple[Fingerprint, ...], Field(min_length=1, max_length=_MOST_PROVERS)]
    verifier: Fingerprint
    noise: Annotated[ResponseNoise, PlainValidator(ResponseNoise.from_dict)]
    responses: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]
    matches: Annotated[int, Field(ge=0)]

    def check(self, header: ReceiptHeader, verifier: Fingerprint | None = None) -> None:
        """Refuse another build than was measured; the CalibrationError names the difference."""
        if header.digest != self.digest:
            raise _other("checkpoint", self.digest[:12], header.digest[:12])
        engines = [(self.provers, header.fingerprint, "prover's")]
        if verifier is not None:
            engines.append(((self.verifier,), verifier, "verifier's"))
        for measured, engine, whose in engines:
            differing = [
                [name for name in OF_BUILD if getattr(candidate, name) != getattr(engine, name)]
                for candidate in measured
            ]
            measured_engine, odd = min(
                zip(measured, differing, strict=True), key=lambda pair: len(pair[1])
            )
            if odd:
                raise _other(
                    f"{odd[0]} than the {whose}",
                    getattr(measured_engine, odd[0]),
                    getattr(engine, odd[0]),
                )

    def save(self, path: str | Path) -> None:
        """Write the file in one piece, replacing an older one.

        Raises:
            StorageError: The file cannot be written.
        """
        values = {
            "kind": FILE_KIND,
            "schema": SCHEMA,
            "digest": self.digest,
            "provers": [prover.as_dict() for prover in self.provers],
            "verifier": self.verifier.as_dict(),
            "responses": self.responses,
            "tokens": self.tokens,
            "matches": self.matches,
            "noise": self.noise.as_dict(),
        }
        write_jsonl(path, [values])

    @classmethod
    def load(cls, path: str | Path) -> "ResponseCalibration":
        """Read a calibration of responses; a CalibrationError for any other file."""
        try:
            values = read_json(path)
            if (values.pop("kind"), values.pop("schema")) != (FILE_KIND, SCHEMA):
                raise ValueError("another kind or schema")
            return read_as(cls, dumps(values).encode())
        except (ValueError, TypeError, KeyError, AttributeError, AssayError) as error:
            raise CalibrationError(
                error.seen if isinstance(error, DataError) else f"{path}: {reason_of(error)}",
                wanted=f"a calibration of responses, schema {SCHEMA}",
                do="write one with `assay poc calibrate-responses`",
            ) from None


def calibrate_responses(
    measured: "Sequence[tuple[ReceiptHeader, Sequence[ReplayedResponse]]]", verifier: Fingerprint
) -> ResponseCalibration:
    """Measure the noise of honest receipts that were replayed.

    Args:
        measured: Header of every file of receipts, with what its replay gave.
        verifier: Fingerprint of the engine that replayed them.

    Returns:
        The calibration.

    Raises:
        UsageError: The receipts are of several checkpoints or too many engines, or there are too
            few tokens or sketches.
    """
    headers = [header for header, _ in measured]
    digest = check_one_checkpoint(headers)
    provers = tuple(dict.fromkeys(header.fingerprint for header in headers))
    by_prover = [
        [
            response
            for header, replayed in measured
            if header.public_key == key
            for response in replayed
        ]
        for key in dict.fromkeys(header.public_key for header in headers)
    ]
    everything = [response for replayed in by_prover for response in replayed]
    source = f"calibration on {len(everything)} responses of {len(by_prover)} machines"
    return ResponseCalibration(
        digest=digest,
        provers=provers,
        verifier=verifier,
        noise=fit_response_noise(by_prover, source),
        responses=len(everything),
        tokens=sum(len(response.margins) for response in everything),
        matches=sum(response.matches for response in everything),
    )


def check_one_checkpoint(headers: Sequence[ReceiptHeader]) -> str:
    """Return the digest of all receipts; a UsageError for several checkpoints or formats, or for
    more engines than a calibration holds.
    """
    formats = sorted({header.fingerprint.dtype for header in headers})
    if len(formats) > 1:
        raise UsageError(
            f"receipts in {' and '.join(formats)}",
            wanted="one number format: a law of several judges all by the coarsest",
            do="calibrate each by itself",
        )
    digests = {header.digest for header in headers}
    if len(digests) != 1:
        names = ", ".join(digest[:12] for digest in sorted(digests))
        raise UsageError(
            f"receipts of {len(digests)} checkpoints: {names}",
            wanted="honest receipts of one",
            do="calibrate each by itself",
        )
    engines = {header.fingerprint for header in headers}
    if len(engines) > _MOST_PROVERS:
        raise UsageError(
            f"receipts of {len(engines)} engines that differ",
            wanted=f"{_MOST_PROVERS} at most, as many as a calibration holds",
            do="leave some files of RECEIPTS out",
        )
    return digests.pop()


def check_enough_tokens(files: Sequence[Receipts]) -> None:
    """Refuse too few tokens or sketches for a calibration, before the replay.

    Raises:
        UsageError: Says how many can be used. Tokens that were sampled without a seed, or under a
            mask, cannot.
    """
    names = [(read.header.line(), receipt.name) for read in files for receipt in read.receipts]
    if len(set(names)) < len(names):
        raise UsageError(
            "a receipt that is given twice",
            wanted="every receipt once",
            do="leave a file of RECEIPTS out",
        )
    answers = [receipt for read in files for receipt in read.receipts if receipt.output]
    usable = [receipt for receipt in answers if receipt.seeded]
    tokens, total = (sum(len(receipt.output) for receipt in part) for part in (usable, answers))
    if tokens < min(FEWEST_TOKENS, total):
        raise UsageError(
            f"{tokens} of {total} tokens that were sampled with a seed and without a mask",
            wanted=f"at least {FEWEST_TOKENS}",
            do="replay receipts of more honest responses with seeded sampling (RECEIPTS)",
        )
    check_number_of_tokens(tokens, len(usable))
    _check_enough_sketches(sum(len(receipt.sketches) for receipt in answers), len(answers))


def _check_enough_sketches(count: int, responses: int) -> None:
    """Refuse fewer sketches than a law is fitted to."""
    if count < FEWEST_RESIDUALS:
        raise UsageError(
            f"{count} sketches of {responses} honest response{'s' * (responses != 1)}",
            wanted=f"at least {FEWEST_RESIDUALS}, of every {SKETCH_EVERY}nd token of each response",
            do="replay receipts of more honest responses, by an engine that makes sketches "
            "(RECEIPTS)",
        )


def fit_response_noise(
    by_prover: "Sequence[Sequence[ReplayedResponse]]", source: str
) -> ResponseNoise:
    """Fit the noise of honest responses to what the replay of every machine gave."""
    everything = [response for replayed in by_prover for response in replayed]
    profiles = [response.profiles for response in everything if len(response.profiles)]
    token_fit = fit_token_noise(profiles)
    of_tokens = [_scale_of_tokens(token_fit, responses) for responses in by_prover]
    tokens = PartNoise(
        law=token_fit.law,
        spread=spread_of_new(of_tokens, len(of_tokens), token_fit.error, _ERROR_OF_PAIR),
        between=token_fit.between,
        effect=_told_apart(token_fit.law, np.concatenate(profiles)),
    )
    sketches = [response.residuals for response in everything if len(response.residuals)]
    _check_enough_sketches(sum(map(len, sketches)), len(everything))
    law, error = fit_log_noise(
        np.concatenate(sketches), dimension=SKETCH_SIZE, floor=SKETCH_FLOOR, tail=SKETCH_TAIL
    )
    scales = [
        float(np.median(np.log(law.magnitudes(np.concatenate(residuals))))) - law.mu
        for residuals in ([response.residuals for response in responses] for responses in by_prover)
        if any(map(len, residuals))
    ]
    between = max(
        _between([np.log(law.magnitudes(response)) for response in sketches]), LEAST_BETWEEN
    )
    spread = spread_of_new(scales, len(scales), error, _ERROR_OF_PAIR)
    part = PartNoise(law=law, spread=spread, between=between)
    return ResponseNoise(tokens=tokens, sketches=fair_sketches(part, sketches), source=source)


def fair_sketches(part: PartNoise, sketches: Sequence[FloatArray]) -> PartNoise:
    """Return a law of sketches, wider where a bet of its test gains on honest responses.

    A fit by quantiles does not see rare states that are ten times as noisy, such as those of
    another expert. Each step widens the law or the spread of responses: whichever leaves the best
    bet less.

    Args:
        part: Law that was fitted to the responses.
        sketches: Residuals of the sketches of every response.

    Raises:
        UsageError: The residuals differ so much that no law of one engine fits them.
    """
    priced = sketches[:: math.ceil(len(sketches) / _PRICED)]
    price = _log_price(part, priced)
    for _ in range(_MOST_STEPS):
        if price <= 0:
            return part
        assert isinstance(part.law, stats.LogNoise)
        wider = [
            replace(part, law=replace(part.law, sd=WIDER * part.law.sd)),
            replace(part, between=min(WIDER * part.between, _MOST_BETWEEN)),
        ]
        price, part = min(
            ((_log_price(law, priced), law) for law in wider), key=lambda pair: pair[0]
        )
    raise UsageError(
        f"sketches of {len(sketches)} honest responses whose distances no law explains",
        wanted="distances of one number format and one kind of engine",
        do="replay receipts of one engine at a time (RECEIPTS)",
    )


def _log_price(part: PartNoise, sketches: Sequence[FloatArray]) -> float:
    test = stats.ClusterTest(part.law, spread=part.spread, between=part.between)
    return test.log_price(sketches)


def bundled_response_noise(
    digest: str, prover_dtype: str, verifier_dtype: str
) -> ResponseNoise | None:
    """Return the law of a bundled model for two dtypes; None for other models."""
    pair = "/".join(sorted((prover_dtype, verifier_dtype)))
    law = _bundled()["laws"].get(pair) if is_bundled(digest) else None
    return (
        None
        if law is None
        else replace(ResponseNoise.from_dict(law), source=f"measured on {pair}, bundled models")
    )


@cache
def _bundled() -> JsonObject:
    return read_json(BUNDLED_LAWS)


def _scale_of_tokens(fit: TokenFit, replayed: "Sequence[ReplayedResponse]") -> float:
    """Return the likeliest ln scale of the tokens of a machine over that of the law; 0 where they
    do not say.
    """
    profiles = [response.profiles for response in replayed if len(response.profiles)]
    if not profiles:
        return 0.0
    logs = np.linspace(-1, 1, 33)
    totals = fit.law.log_likelihoods(np.concatenate(profiles), logs).sum(axis=0)
    return float(logs[int(np.argmax(totals))]) if float(np.ptp(totals)) > 1 else 0.0


def _between(logs: Sequence[np.ndarray]) -> float:
    """Return the spread of the means of clusters beyond that of their values."""
    several = [values for values in logs if len(values) > 1]
    if len(several) < 2:
        return float(np.std([float(values.mean()) for values in logs]))
    within = float(np.mean([values.var(ddof=1) for values in several])) * float(
        np.mean([1 / len(values) for values in several])
    )
    of_means = float(np.var([float(values.mean()) for values in several], ddof=1))
    return min(math.sqrt(max(0.0, of_means - within)), 1.0)


def _told_apart(law: stats.TokenNoise, profiles_NG: np.ndarray) -> float:
    """Return the smallest effect that as many honest tokens tell apart from honest noise."""
    logs = np.log(np.array([1.0, *EFFECTS]))
    means = law.log_likelihoods(profiles_NG, logs).mean(axis=0)
    needed = -math.log(_BETA) / TOLD_APART
    return next(
        (
            effect
            for effect, mean in zip(EFFECTS, means[1:], strict=True)
            if means[0] - mean >= needed
        ),
        EFFECTS[-1],
    )


def _other(property_name: str, measured: Any, stated: Any) -> CalibrationError:
    return CalibrationError(
        f"a calibration of responses with another {property_name}: {measured}",
        wanted=str(stated),
        do="measure it with `assay poc calibrate-responses` on honest receipts, or leave "
        "--calibration out",
    )
