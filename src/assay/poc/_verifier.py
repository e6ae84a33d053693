"""The verifier: recompute a sample of a proof, and judge the residuals."""

import secrets
from dataclasses import fields

import numpy as np

from assay import streams
from assay.errors import ProofMismatch, UsageError
from assay.models import NUMBER_FORMATS, Model
from assay.poc._prover import Progress, compute
from assay.poc.engines import Engine
from assay.poc.engines.hf import HFEngine, is_compiled, worth_compiling
from assay.poc.protocol import Header, Proof, Record, Round
from assay.poc.verdict import Calibration, Verdict, judge, noise_for, sequential_test

__all__ = ["DEFAULT_SAMPLE", "verify"]

DEFAULT_SAMPLE = 64

# A header may claim any batch shape; a validator follows it so far, for equal bits, and no further.
LARGEST_BATCH = 1024

STATED_FORMATS = (*streams.DTYPES, *NUMBER_FORMATS)


def verify(
    proof: Proof,
    model: Model,
    *,
    sample: int | None = None,
    seed: int | None = None,
    expect: Round | None = None,
    prover_dtype: str | None = None,
    calibration: Calibration | None = None,
    engine: Engine | None = None,
    alpha: float = 1e-3,
    beta: float = 1e-2,
    progress: Progress | None = None,
) -> Verdict:
    """Recompute a sample of a proof's nonces and judge the whole.

    Args:
        proof: a complete proof.
        model: the same checkpoint, on this machine; its dtype and device may differ from the prover's.
        sample: how many nonces to recompute; 64, or all of a smaller proof, when None.
        seed: draws the sample; from the system's randomness when None, so that no prover can guess it.
        expect: refuse the proof if it was made for another round than this one.
        prover_dtype: refuse the proof if it says that it was made in another number format than this one. The honest
            noise is that of the format that the header states: without this, a node chooses how wide it is. None takes
            those of the preset, or any with a calibration, which is of one format.
        calibration: measured honest noise for this pair of engines; the stated default when None.
        engine: recomputes; when None, the transformers engine with the prover's batch shape, of at most 1024 rows.
        alpha: bound on the chance to ever accuse an honest node.
        beta: chance to pass a node whose residuals are :data:`EFFECT` times the honest noise.
        progress: called after every batch.

    Raises:
        ProofMismatch: the proof is for another checkpoint or round, or in another number format.
        UsageError: the sample is out of range, or there is no such number format.
        CalibrationError: the calibration is for other fingerprints.
    """
    header = proof.header
    check_match(header, model, expect)
    if prover_dtype is not None:
        check_format(header, prover_dtype)
    elif calibration is None and header.pipeline.number_formats:
        check_format(header, *header.pipeline.number_formats)
    batch_size = min(header.fingerprint.batch_size, LARGEST_BATCH)
    # The prover's kernels, where this device is of that kind: equal fingerprints give equal bits.
    compiled = is_compiled(header.fingerprint) and worth_compiling(model)
    shape = {"batch_size": batch_size, "seq_len": header.round.seq_len}
    engine = engine or HFEngine(model, **shape, compiled=compiled)
    noise = noise_for(header, engine.fingerprint, calibration)
    test = sequential_test(noise.law, alpha=alpha, beta=beta)
    seed = secrets.randbits(53) if seed is None else seed  # exact in every JSON reader
    chosen = _draw(proof, sample, seed)
    recomputed: list[Record] = []
    for batch in compute(header, engine, [record.nonce for record in chosen]):
        recomputed.extend(batch)
        if progress:
            progress(len(recomputed), len(chosen))
    return judge(proof, chosen, recomputed, noise, test=test, seed=seed)


def check_match(header: Header, model: Model, expect: Round | None = None) -> None:
    """Refuse a proof of another checkpoint, or of another round than expected.

    Raises:
        ProofMismatch: names what differs.
    """
    if (header.digest, header.weights) != (model.digest, model.weights):
        raise ProofMismatch(
            f"a proof of {header.round.model} ({header.weights}, {header.digest[:12]})",
            wanted=f"a proof of {model.reference} ({model.weights}, {model.digest[:12]})",
            do="verify with the checkpoint that the network agreed on",
        )
    if expect is None:
        return
    expect = expect.with_model(header.round.model)
    for field in fields(Round):
        ours, theirs = getattr(expect, field.name), getattr(header.round, field.name)
        if ours != theirs:
            raise ProofMismatch(
                f"a proof with {field.name} {theirs!r}",
                wanted=f"{field.name} {ours!r}",
                do="ask the node for its proof of this round",
            )


def check_format(header: Header, *wanted: str) -> None:
    """Refuse a proof that says it was made in another number format than the wanted ones.

    Raises:
        UsageError: there is no such number format.
        ProofMismatch: names both.
    """
    for unknown in set(wanted) - set(STATED_FORMATS):
        raise UsageError(f"number format {unknown!r:.40}", wanted=" or ".join(STATED_FORMATS), do="choose one of them")
    stated = header.fingerprint.dtype
    if stated not in wanted:
        raise ProofMismatch(
            f"a proof of {header.pipeline.name} made in {stated}",
            wanted=f"one made in {' or '.join(wanted)}",
            do=f"ask the node to prove in {wanted[0]}; only if the network agreed on {stated}: --prover-dtype {stated}",
        )


def _draw(proof: Proof, sample: int | None, seed: int) -> list[Record]:
    total = len(proof.records)
    size = min(DEFAULT_SAMPLE, total) if sample is None else sample
    if type(size) is not int or not 1 <= size <= total:
        raise UsageError(f"a sample of {size}", wanted=f"1 to {total}, the nonces of this proof", do="lower --sample")
    if type(seed) is not int or seed < 0:
        raise UsageError(f"seed {seed!r}", wanted="a whole number from 0 upwards", do="leave it out")
    chosen = np.random.default_rng(seed).choice(total, size=size, replace=False)
    return [proof.records[i] for i in sorted(chosen.tolist())]
