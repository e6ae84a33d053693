"""Audits: check a proof or receipts against pins, recompute a sample, judge, and record it.

Both go the same way: read, compare with the pins, refuse what can be refused before a model is
loaded, load, recompute, judge, and add the verdict to the ledger of nodes' lives where there is
one.
"""

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from assay.errors import CalibrationError, CommitmentBroken, UsageError
from assay.poc.launch import Launch, check_judge, check_loadable, load, open_judge, open_prefill
from assay.poc.network_pins import find_pinned_calibration
from assay.poc.protocol.commitments import Commitment
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import Pins, of_weights
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.round import Round
from assay.poc.responses.receipts import Receipts
from assay.poc.responses.requests import Request, encode_requests, read_requests
from assay.poc.responses.response_calibration import ResponseCalibration
from assay.poc.responses.response_verdict import (
    Evidence,
    ReceiptPins,
    ResponseVerdict,
    judge_responses,
    missing_response_law,
    noise_between,
    sample_receipts,
)
from assay.poc.verdict.calibration_file import Calibration, account_alpha
from assay.poc.verdict.entries import Standing
from assay.poc.verdict.honest_noise import bundled_noise, missing_law
from assay.poc.verdict.ledger import Ledger, check_ledger
from assay.poc.verdict.proof_checks import check_proof
from assay.poc.verdict.proof_judge import ProofVerdict, breach

# What to pass where a value that nothing pins has no flag of its name.
INSTEAD = {"tokens": "--evidence sketches", "sketches": "--evidence tokens"}

V = TypeVar("V", ProofVerdict, ResponseVerdict)


@dataclass(frozen=True, kw_only=True)
class Auditor(Launch):
    """How a validator recomputes, and where it notes what it found.

    Args:
        pins: File with all that the network agreed on.
        calibration: File with the measured honest noise; one of the pins when None.
        commitments: Files of what the node committed to: all nonces of a proof, and where there
            are several, before that the first of them.
        control: Whether every nonce of a proof is computed again in the formats that the
            calibration names.
        sample: Number of nonces or responses to recompute.
        seed: Number that draws the sample; unpredictable when None.
        alpha: Bound on the chance that an honest node is ever accused; that of the pins, or .001,
            when None.
        ledger: Ledger of nodes' lives to which the audit is added.
        progress: Function that is called with (done, in all) after every batch.
    """

    pins: Path | None = None
    calibration: Path | None = None
    commitments: tuple[Path, ...] = ()
    control: bool = False
    sample: int | None = None
    seed: int | None = None
    alpha: float | None = None
    ledger: Path | None = None
    progress: Callable[[int, int], None] | None = None

    def audit_proof(
        self, path: Path, *, given: Pins | None = None, positions: tuple[int, int] | None = None
    ) -> "Audit[ProofVerdict]":
        """Recompute a sample of a proof and judge it.

        Args:
            path: Proof file.
            given: Values that are known beside those of the pins file, which must agree with it.
            positions: Positions in the share of the node that the proof must hold.

        Raises:
            UsageError: A value contradicts the pins file or is out of range.
            ProofError: The proof is malformed or contradicts what is known, or a calibration is of
                other engines.
            ModelError: The model cannot be loaded or run.
            StorageError: The ledger cannot be written.
        """
        proof = Proof.load(path)
        header = proof.header
        pins, measured = self._expected(header, given or Pins(), positions)
        _check_round(pins, header)
        # Before a model is loaded.
        check_proof(proof, expect=pins, sample=self.sample, calibration=measured)
        try:
            self._check_commitments(proof)
        except CommitmentBroken as error:
            return Audit(
                breach(
                    proof, f"{error.seen}, where the node committed to {error.wanted}", pins=pins
                ),
                None,
            )
        again = self._controls(header, measured) if self.control else ()
        auditor = self
        if header.pipeline.framed and self.frame is None and self._network is not None:
            auditor = replace(self, frame=self._network.frame(header.digest))
        self._check_ledger(pins.unpinned(header))
        formats = header.fingerprint.dtype, self.dtype or of_weights(header.fingerprint.dtype)
        law = measured or bundled_noise(header.digest, header.pipeline.noise, *formats)
        advice = missing_law(
            self.model, header.digest, header.round, dtype=self.dtype, frame=auditor.frame
        )
        self._check_law(law, advice)
        auditor.read_frame(header.pipeline)
        check_judge(auditor, header, measured)
        for name in again:
            check_loadable(self.model, name, self.device)
        from assay.poc.verifier import judging_setup, verify

        with open_judge(auditor, header, measured) as (loaded, engine_of_machine):
            engine, _ = judging_setup(
                header, loaded, engine=engine_of_machine, calibration=measured
            )
            with self._ledger() as ledger:
                verdict = verify(
                    proof,
                    loaded,
                    engine=engine,
                    expect=pins,
                    calibration=measured,
                    sample=self.sample,
                    seed=self.seed,
                    alpha=self._account_alpha,
                    controls=[load(self.model, name, self.device) for name in again],
                    progress=self.progress,
                )
                if verdict.noise is None:
                    verdict = replace(verdict, reason=advice)
                standing = (
                    None if ledger is None else ledger.record(verdict, proof=proof.footer.sha256)
                )
        return Audit(verdict, standing)

    def audit_receipts(
        self,
        path: Path,
        *,
        given: Pins | None = None,
        requests: Path | None = None,
        evidence: Evidence = "both",
        lora: Path | None = None,
        batch_size: int = 16,
    ) -> "Audit[ResponseVerdict]":
        """Run the responses of receipts again and judge them.

        Args:
            path: File of receipts.
            given: Values that are known beside those of the pins file, which must agree with it.
            requests: File of the requests that were sent.
            evidence: What the receipts must have.
            lora: Directory of the LoRA adapter of receipts that name one.
            batch_size: Number of responses that are run at once, at most.

        Raises:
            AssayError: As of :meth:`audit_proof`.
        """
        read = Receipts.load(path)
        # Exact in every JSON reader.
        seed = secrets.randbits(53) if self.seed is None else self.seed
        sample = sample_receipts(read, self.sample, seed)
        ReceiptPins.of_network(
            self._network, given or Pins(), read.header, evidence=evidence
        ).check(read)
        self.check_engine()
        from assay.poc.responses.adapters import load_adapter
        from assay.poc.responses.replaying import check_adapter, check_ends, check_runnable, replay

        sent_requests = requests_of(requests, self.model)
        pins = ReceiptPins.of_network(
            self._network, given or Pins(), read.header, requests=sent_requests, evidence=evidence
        )
        pins.check(read)  # before a model is loaded
        adapter = None if lora is None else load_adapter(lora)
        check_adapter(read, adapter)
        measured = None if self.calibration is None else ResponseCalibration.load(self.calibration)
        if measured is not None:
            measured.check(read.header)
        self._check_ledger(pins.unpinned(read))
        self.check_loadable()
        with open_prefill(self, [read], batch_size=batch_size, adapter=adapter) as (loaded, engine):
            check_runnable(sample, loaded, requests=sent_requests)
            check_ends(read, loaded, sent_requests)
            noise = noise_between(read.header, engine.fingerprint, measured)
            advice = missing_response_law(read.header, self.model)
            self._check_law(noise, advice)
            with self._ledger() as ledger:
                replayed = replay(
                    sample,
                    loaded,
                    requests=sent_requests,
                    adapter=adapter,
                    engine=engine,
                    progress=self.progress,
                )
                verdict = judge_responses(
                    replayed,
                    read,
                    noise,
                    pins=pins,
                    alpha=self._account_alpha,
                    sample_seed=None if self.sample is None else seed,
                )
                if noise is None:
                    verdict = replace(verdict, reason=advice)
                standing = None if ledger is None else ledger.append(verdict.updates())[-1]
        return Audit(verdict, standing)

    def _expected(
        self, header: Header, stated: Pins, positions: tuple[int, int] | None
    ) -> tuple[Pins, Calibration | None]:
        """Return what a proof is held against, and the calibration that was measured with its
        build.

        The model that the header states must be one of the pins; the judge compares it with the one
        that is loaded.
        """
        network = self._network
        pins = stated if network is None else network.for_round(model=header.digest, also=stated)
        if positions is not None:
            nonces = Round(
                block_hash="any",
                public_key="any",
                node_id=pins.node_id or 0,
                node_count=pins.node_count or 1,
            ).nonces(*positions)
            pins = pins.joined(Pins(nonces=nonces), str(self.pins))
        if self.calibration is not None:
            return pins, Calibration.load(self.calibration)
        pins.check(header)
        return pins, None if network is None else find_pinned_calibration(network, header)

    @cached_property
    def _network(self) -> NetworkPins | None:
        return None if self.pins is None else NetworkPins.load(self.pins)

    @property
    def _account_alpha(self) -> float:
        return account_alpha(self._network, self.alpha)

    def _controls(self, header: Header, measured: Calibration | None) -> tuple[str, ...]:
        """Return the number formats in which nonces are computed again, which the model can be
        loaded in.
        """
        if measured is None:
            raise UsageError(
                "--control without a calibration",
                wanted="one that measured a control",
                do="pass --calibration, or leave --control out",
            )
        return measured.control_of(header, self.dtype or of_weights(header.fingerprint.dtype))

    def _check_commitments(self, proof: Proof) -> None:
        """Refuse a proof that is not what its node committed to before, in part or in whole."""
        loaded = sorted(map(Commitment.load, self.commitments), key=lambda early: early.top.size)
        for commitment in loaded:
            commitment.check(proof, early=commitment is not loaded[-1])

    def _check_ledger(self, believed: Sequence[str]) -> None:
        """Refuse a ledger that cannot be added to, and evidence that is taken on the prover's
        word.
        """
        if self.ledger is None:
            return
        if believed:
            flags = " and ".join(
                INSTEAD.get(name, f"--{name.replace('_', '-')}") for name in believed
            )
            raise UsageError(
                f"--ledger with {', '.join(believed)} taken on the prover's word",
                wanted="evidence about the node that is named, in a round that was asked for",
                do=f"pass {flags}",
            )
        check_ledger(self.ledger, alpha=self._account_alpha)

    def _check_law(self, law: object, missing: str) -> None:
        """Refuse a ledger where no law was measured, and say what measures one."""
        if law is None and self.ledger is not None:
            raise CalibrationError(
                missing,
                wanted="a law, without which an audit says nothing of a life",
                do="measure one, or leave --ledger out",
            )

    def _ledger(
        self,
    ) -> AbstractContextManager[Ledger | None]:  # when nothing can be refused any more
        return (
            nullcontext() if self.ledger is None else Ledger(self.ledger, alpha=self._account_alpha)
        )


def _check_round(pins: Pins, header: Header) -> None:
    """Refuse to judge a proof whose block or key is the prover's word: any proof would do then."""
    missing = [name for name in ("block_hash", "public_key") if name in pins.unpinned(header)]
    if missing:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UsageError(
            f"no {flags}",
            wanted="the block and the key of the round, which are never taken on the prover's word",
            do=f"pass {flags}, or --pins with them",
        )


@dataclass(frozen=True)
class Audit(Generic[V]):
    """The verdict on a proof or on receipts, and the standing of the node's life with a ledger."""

    verdict: V
    standing: Standing | None

    @property
    def exit_code(self) -> int:
        """0 honest, 1 fraud, 2 undecided; with a ledger, of the whole life.

        A life that is honest does not cover a proof that, taken alone, is not.
        """
        verdict = self.verdict
        standing = self.standing
        unanswered = isinstance(verdict, ResponseVerdict) and verdict.unanswered
        if standing is None:
            return verdict.exit_code or (2 if unanswered else 0)
        if standing.verdict == "fraud":
            return 1
        holds = standing.verdict == "honest" and verdict.verdict in ("honest", "undecided")
        return 0 if holds and not unanswered else 2

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON: the verdict, and with a ledger the life of the node."""
        return self.verdict.as_dict() | (
            {} if self.standing is None else {"life": self.standing.as_dict()}
        )


def requests_of(path: Path | None, model: str) -> list[Request] | None:
    """Return the requests of a file, with token ids for prompts; None without a file."""
    return None if path is None else with_token_ids(read_requests(path), model)


def with_token_ids(requests: Sequence[Request], model: str) -> list[Request]:
    """Return requests with token ids as prompts; one that does not fit is refused first."""
    from assay.models.catalogue import model_info
    from assay.models.load import load_tokenizer

    info = model_info(model)
    has_text = any(request.stop or not isinstance(request.prompt, tuple) for request in requests)
    return encode_requests(
        requests,
        load_tokenizer(model) if has_text else None,
        reference=model,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
    )
