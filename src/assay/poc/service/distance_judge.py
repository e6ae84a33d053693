"""Verdicts on received values: the published rules, and the residual test of a round."""

import math
import time
from collections.abc import Sequence

import numpy as np
import sqlalchemy as sa

from assay.errors import CalibrationError
from assay.files.jsonl import JsonObject, dumps, loads
from assay.files.sqlite import Database
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pins import Build
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.records import is_valid
from assay.poc.protocol.round import Round
from assay.poc.service.outbox import Outbox
from assay.poc.service.request_bodies import GenerateRequest, StatTest, ValidateRequest
from assay.poc.service.rounds import StoredRound
from assay.poc.service.service_settings import ServiceSettings
from assay.poc.verdict.build_noise import BuildNoise
from assay.poc.verdict.calibration_file import Calibration, account_alpha, find_build_noise
from assay.poc.verdict.entries import Account, LedgerUpdate, round_identity
from assay.poc.verdict.honest_noise import Noise, bundled_noise, missing_law
from assay.poc.verdict.ledger import Ledger
from assay.poc.verdict.proof_judge import judge_residuals
from assay.poc.verdict.residuals import count_mismatches, published_rule
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.chord import FloatArray

# Threshold of chains where a request names none, as the network has it.
CHAIN_MARGIN = 0.025


class HonestNoise:
    """Finds the noise between nodes and this service: as given, or as the network pinned it."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._given = settings.calibration
        pins = settings.pins
        self._pinned: dict[str, tuple[tuple[Build, ...], list[Calibration]]] = {}
        if self._given is None and pins is not None:
            for model in pins.models:
                measured = [Calibration.load(path) for path in pins.calibrations(model)]
                self._pinned[model.digest] = model.builds, measured

    def of(
        self, pipeline: Pipeline, validator: Fingerprint, digest: str, round: Round
    ) -> Noise | None:
        """Return the noise of a preset; None where it is unknown."""
        dtype = validator.dtype
        builds: Sequence[Build | None] = [None]
        if self._given is not None:
            own = _builds_of([self._given], digest, pipeline.name)
            is_measured = bool(own)
            measured = [
                Calibration(builds=(build,))
                for build in own
                if not build.engines or dtype in {engine.dtype for engine in build.engines}
            ]
        else:
            pinned, measured = self._pinned.get(digest, ((), []))
            is_measured = bool(measured)
            builds = [build for build in pinned if dtype in build.dtype]
        if not is_measured:
            return bundled_noise(digest, pipeline.noise, dtype, dtype)
        laws = (
            find_build_noise(
                measured,
                build,
                digest=digest,
                preset=pipeline.name,
                round=round,
                formats=(dtype, dtype),
                validator=validator,
            )
            for build in builds
        )
        # The law of the first build that was measured.
        return next((noise for noise in laws if noise is not None), None)

    def effective_dimension(self, digest: str, preset: str) -> float | None:
        """Return the effective dimension of a model's states, from a calibration of distances."""
        measured = (
            [self._given] if self._given is not None else self._pinned.get(digest, ((), []))[1]
        )
        sizes = (b.effective_dimension for b in _builds_of(measured, digest, preset))
        return next(filter(None, sizes), None)


def _builds_of(calibrations: Sequence[Calibration], digest: str, preset: str) -> list[BuildNoise]:
    """Return what was measured of a checkpoint and a preset."""
    every = (build for calibration in calibrations for build in calibration.builds)
    return [build for build in every if (build.digest, build.preset) == (digest, preset)]


def check_calibration(calibration: Calibration | None, deployment: Deployment) -> None:
    """Refuse a calibration of another model than the deployed one."""
    if calibration is None:
        return
    digests = [build.digest for build in calibration.builds]
    if deployment.digest not in digests:
        measured = ", ".join(digest[:12] for digest in digests if digest) or "that it does not name"
        raise CalibrationError(
            f"a calibration of a checkpoint {measured}",
            wanted=f"one of {deployment.reference} ({deployment.digest[:12]})",
            do="measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out",
        )


class Judge:
    """Judges validation requests and keeps what it found.

    The residual test runs over all nonces of one key that were checked in a round, each counted
    once, so that many small requests decide like one large one and asking twice proves nothing. As
    in a proof, those at faulty places of the batch are set aside. With a ledger, the same residuals
    enter the life of the node as well, of which replies say nothing.
    """

    def __init__(
        self, database: Database, outbox: Outbox, settings: ServiceSettings, noise: HonestNoise
    ) -> None:
        self._db = database
        self._outbox = outbox
        self._settings = settings
        self._noise = noise
        self._alpha = account_alpha(settings.pins, settings.alpha)
        self._ledger = (
            None
            if settings.ledger is None
            else Ledger(settings.ledger, alpha=self._alpha, beta=settings.beta)
        )
        self._checks = database["checks"]
        self._verdicts = database["verdicts"]

    def judge(
        self,
        stored: StoredRound,
        validator: Fingerprint,
        request: ValidateRequest,
        computed: Sequence[float],
    ) -> JsonObject:
        """Judge received against computed distances [N], store verdict and callback, return the
        reply.

        A received value that is not finite is a mismatch.
        """
        public_key = request.public_key
        nonces = request.nonces
        received = request.dist
        count = published_rule(received, computed, stored.r_target)
        checked = self._checked(stored.id, public_key)
        new = [i for i, nonce in enumerate(nonces) if nonce not in checked]
        checked |= {nonces[i]: received[i] - computed[i] for i in new}
        noise = self._noise.of(get_pipeline(stored.preset), validator, stored.digest, stored.round)
        residual: JsonObject = _residual(
            noise,
            np.fromiter(checked.values(), np.float64),
            _places(list(checked), stored.round.node_count),
            {"alpha": self._alpha, "beta": self._settings.beta},
            missing_law(stored.reference, stored.digest, stored.round),
        )
        result: JsonObject = {
            "fraud_detected": count.n > 0 and count.p_value < stored.fraud_threshold,
            "computed_distances": list(computed),
            "valid": [is_valid(value, stored.r_target) for value in computed],
            "n_invalid": count.mismatches,
            "probability_honest": count.p_value if count.n else -1.0,
            "residual_test": residual,
        }
        who = {"public_key": public_key, "block_hash": stored.block_hash}
        summary = {
            "time": time.time(),
            **who,
            "n": count.n,
            **{
                name: result[name] for name in ("n_invalid", "probability_honest", "fraud_detected")
            },
            **{name: value for name, value in residual.items() if name in ("verdict", "fault")},
        }
        body = {
            "nonces": list(nonces),
            "received_distances": [_finite(value) for value in received],
            **who,
            "block_height": stored.block_height,
            **result,
        }
        checks = [
            {"nonce": nonces[i], "received": _finite(received[i]), "computed": computed[i]}
            for i in new
        ]
        # First: the ledger knows what it has counted, so a request that is repeated after a crash
        # adds nothing.
        self._record(stored, validator, request, computed, noise)
        if nonces:
            self._save(stored.id, public_key, checks, summary, body)
        return result

    def close(self) -> None:
        """Close the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _record(
        self,
        stored: StoredRound,
        validator: Fingerprint,
        request: ValidateRequest,
        computed: Sequence[float],
        noise: Noise | None,
    ) -> None:
        """Write the residuals of a request to the ledger, if there is one and the honest noise is
        known.
        """
        if self._ledger is None or noise is None or not request.nonces:
            return
        # A request does not say what the node computes with; the number format is the one that the
        # network agreed on.
        update = LedgerUpdate(
            account=Account(
                public_key=request.public_key,
                digest=stored.digest,
                preset=stored.preset,
                build=validator.dtype,
            ),
            round=round_identity(stored.round),
            block_hash=stored.block_hash,
            noise=noise,
            nonces=request.nonces,
            residuals=[a - b for a, b in zip(request.dist, computed, strict=True)],
            positions=_places(request.nonces, stored.round.node_count),
        )
        self._ledger.append([update])

    def last(self, limit: int = 10) -> list[JsonObject]:
        """Return summaries of the last verdicts, the newest first."""
        newest = sa.select(self._verdicts.c.summary).order_by(self._verdicts.c.id.desc())
        return [loads(text, "verdict") for (text,) in self._db.rows(newest.limit(limit))]

    def _checked(self, round_id: int, public_key: str) -> dict[int, float]:
        """Return the residuals of a key in a round by nonce, in the order of their checks."""
        c = self._checks.c
        of_key = (c.round_id == round_id) & (c.public_key == public_key)
        query = sa.select(c.nonce, c.received, c.computed).where(of_key).order_by(c.id)
        return {
            row.nonce: math.nan if row.received is None else row.received - row.computed
            for row in self._db.rows(query)
        }

    def _save(
        self,
        round_id: int,
        public_key: str,
        checks: Sequence[JsonObject],
        summary: JsonObject,
        body: JsonObject,
    ) -> None:
        rounds = self._db["rounds"]
        shared = {"round_id": round_id, "public_key": public_key}
        row = shared | {"created_at": summary["time"], "summary": dumps(summary)}
        with self._db.write() as connection:
            if checks:
                connection.execute(self._checks.insert(), [shared | check for check in checks])
            connection.execute(self._verdicts.insert().values(row))
            url = connection.execute(
                sa.select(rounds.c.callback_url).where(rounds.c.id == round_id)
            ).scalar_one()
            if url:
                self._outbox.add(connection, round_id, "validated", url, body, None)


def judge_vectors(
    request: GenerateRequest,
    errors: FloatArray,
    counted: FloatArray,
    noise: Noise | None,
    settings: ServiceSettings,
    *,
    missing: str,
) -> JsonObject:
    """Return the verdict on the residuals [N] of an artifact job, by law and published count.

    ``artifact`` has the published count and the published reply, and ``chain-decode`` the residual
    test beside it. The other presets are judged by the residual test, which their reply holds
    beside the count.
    """
    pipeline = get_pipeline(request.params.preset)
    points = pipeline.output == "points"
    rule = request.stat_test or (StatTest(dist_threshold=CHAIN_MARGIN) if points else StatTest())
    level, field = rule.level
    count = count_mismatches(
        counted, threshold=rule.dist_threshold, p_mismatch=rule.p_mismatch, alpha=level
    )
    nonces = request.nonces
    reply = {
        "n_total": count.n,
        "n_mismatch": count.mismatches,
        "mismatch_nonces": [
            n for n, size in zip(nonces, counted, strict=True) if not size <= rule.dist_threshold
        ],
        "p_value": count.p_value,
        "fraud_detected": count.fraud,
    }
    if request.stat_test is not None:
        reply |= {"level": level, "level_field": field}
    if pipeline.texts == "published" and not points:
        return reply
    rates = {"alpha": account_alpha(settings.pins, settings.alpha), "beta": settings.beta}
    # The chain's client may name a nonce twice, and it proves no more than once.
    first_places = np.sort(np.unique(nonces, return_index=True)[1])
    positions = _places([nonces[i] for i in first_places], request.node_count)
    residual = _residual(noise, errors[first_places], positions, rates, missing)
    if points:
        return reply | {"residual_test": residual}
    return reply | {"fraud_detected": residual["verdict"] == "fraud", "residual_test": residual}


def _residual(
    noise: Noise | None,
    errors: FloatArray,
    positions: Sequence[int],
    rates: dict[str, float],
    missing: str,
) -> JsonObject:
    """Return the verdict on residuals [N] in checked order, with the places that are faulty."""
    if noise is None:
        return {"verdict": "undecided", "reason": missing}
    verdict, result, places = judge_residuals(
        errors, noise, test=sequential_test(noise, **rates), positions=positions
    )
    return {
        "verdict": verdict,
        "checked": result.n,
        "log_e_value": result.log_e_max,
        "log_evidence_honest": result.log_evidence_honest,
        "gross": result.gross,
        "alpha": result.alpha,
        **({"fault": places.pattern} if places.faulty else {}),
    }


def _places(nonces: Sequence[int], stride: int) -> list[int]:
    """Return the index of each nonce in the sequence of its machine, at a stride."""
    return [nonce // stride for nonce in nonces]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
