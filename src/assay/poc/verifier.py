"""The verifier: recompute a sample of a proof, and judge the residuals."""

import secrets
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from assay.errors import CalibrationError, ProofMismatch
from assay.models.model import Model
from assay.poc.engines.base import Engine
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import HFEngine, is_compiled
from assay.poc.engines.hf.shapes import fitting_batch
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import Build, Pins
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Round
from assay.poc.prover import Progress, check_length, compute, frame_name
from assay.poc.verdict.calibration_file import Calibration, noise_for
from assay.poc.verdict.honest_noise import Noise
from assay.poc.verdict.proof_checks import check_proof, draw_records
from assay.poc.verdict.proof_judge import ProofVerdict, judge
from assay.poc.verdict.sample_plan import plan_sample, sequential_test
from assay.streams.arrays import dtype_name

# A header may claim any batch shape, and may have claimed it in a calibration; a validator follows
# it so far, for equal bits, and no further.
LARGEST_BATCH = 1024
LARGEST_SHAPE = 2**18  # positions of a batch, for the same reason


@np.errstate(under="ignore")
def verify(
    proof: Proof,
    model: Model,
    *,
    expect: Pins | Round | None = None,
    sample: int | None = None,
    seed: int | None = None,
    calibration: Calibration | None = None,
    engine: Engine | None = None,
    controls: Sequence[Model] = (),
    alpha: float = 1e-3,
    beta: float = 1e-2,
    progress: Progress | None = None,
) -> ProofVerdict:
    """Recompute a sample of a proof's nonces and judge the whole.

    The header of a proof is written by the prover. A proof that contradicts ``expect`` is refused.
    Whatever ``expect`` leaves open and is not at its published default is listed in
    :attr:`ProofVerdict.unpinned`, and the exit code of an honest verdict is then 2 instead of 0.

    Args:
        proof: Complete proof.
        model: Same checkpoint on this machine; its dtype and device may differ from the prover's.
        expect: Values that the validator knows: :class:`Pins`, or a :class:`Round` to pin all that
            it says. A round does not pin the set of nonces and the number format. The honest noise
            is that of the stated format, so a node that may choose it chooses how wide the law is;
            a calibration whose builds of this model are all of one format pins it.
        sample: Number of nonces to recompute. When None, the 32 to 128 that the law needs to accuse
            a node of a tenth of its nonces at five times the honest noise with a chance of 95 %, or
            all of a smaller proof.
        seed: Number that draws the sample; from the randomness of the system when None, so that no
            prover can guess it.
        calibration: Measured honest noise for this model, preset and pair of engines. Without one
            the verdict is undecided, but for the bundled models, whose law comes with assay.
        engine: Engine that recomputes; when None, the transformers engine with the prover's batch
            shape, of at most 1024 rows and 2**18 positions, or with the one that the calibration
            was measured with.
        controls: Same checkpoint in the number formats that a law of the calibration names. Every
            nonce is computed again with each, and the node's residuals count over how far the
            validator's own computations are apart.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat is called honest which an honest verdict excludes.
        progress: Function that is called with (nonces done, nonces in all) after every batch.

    Returns:
        The verdict, with the numbers that it follows from.

    Raises:
        ProofMismatch: The proof is of another checkpoint, contradicts ``expect``, is in another
            number format than its preset has, or has nonces whose input seeds collide.
        UsageError: The sample, the seed, an error rate or an expected value is out of range, or the
            engine is for another number of positions.
        CalibrationError: The calibration is of another model, preset or pair of engines.
        BadWeights: The model gives NaN or infinity.
        OutOfMemory: The device has no room for a batch.

    Example:
        >>> import assay
        >>> from assay.poc import Pins, Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> proof = assay.poc.prove(model, round, range(32))
        >>> verdict = assay.poc.verify(proof, model, expect=round)
        >>> verdict.verdict, verdict.unpinned, verdict.exit_code
        ('honest', (), 0)
        >>> known = Pins(block_hash="block_alpha", public_key="node_A")
        >>> verdict = assay.poc.verify(proof, model, expect=known)
        >>> verdict.verdict, verdict.unpinned, verdict.exit_code
        ('honest', ('seq_len',), 2)
    """
    header = proof.header
    pins = check_proof(proof, expect=expect, sample=sample, calibration=calibration)
    formats = [control.quantised or dtype_name(control.dtype) for control in controls]
    engine, noise = judging_setup(
        header, model, engine=engine, calibration=calibration, builds=pins.builds, controls=formats
    )
    test = None if noise is None else sequential_test(noise, alpha=alpha, beta=beta)
    seed = secrets.randbits(53) if seed is None else seed  # exact in every JSON reader
    size, power = plan_sample(noise, len(proof.records), sample, alpha, beta)
    drawn = draw_records(proof, size, seed)
    inputs = header.round.inputs([record.nonce for record in drawn])
    engines = [engine, *(_controlling(header, control, model) for control in controls)]
    recomputed: list[list[Record]] = [[] for _ in engines]
    for own_engine, records in zip(engines, recomputed, strict=True):
        for batch in compute(own_engine, header.pipeline, inputs, drawn):
            records.extend(batch)
            if progress:
                progress(sum(map(len, recomputed)), len(drawn) * len(engines))
    again, *others = recomputed
    return judge(
        proof,
        drawn,
        again,
        noise,
        controls=dict(zip(formats, others, strict=True)),
        pins=pins,
        test=test,
        seed=seed,
        power=power,
    )


def judging_setup(
    header: Header,
    model: Model,
    *,
    engine: Engine | None = None,
    calibration: Calibration | None = None,
    builds: Sequence[Build] | None = None,
    controls: Collection[str] = (),
) -> tuple[Engine, Noise | None]:
    """Return the engine that recomputes a proof, and the noise law between both engines.

    :func:`verify` calls this before it computes anything, and its arguments are those of `verify`;
    ``builds`` are the pinned ones, which say of which kind the prover's machine is, and
    ``controls`` are number formats. To call it before a ledger is begun keeps the disk free of
    ledgers for proofs that are refused.

    Raises:
        ProofMismatch: The proof is of another checkpoint.
        UsageError: The engine is for another number of positions.
        CalibrationError: The calibration is of another model, preset or pair of engines.
    """
    header.check_model(model.reference, model.digest, model.weights)
    refused = []
    for candidate in _recomputing(header, model, calibration) if engine is None else (engine,):
        check_length(candidate, header.round)
        _check_frame(header, candidate)
        try:
            return candidate, noise_for(
                header, candidate.fingerprint, calibration, builds=builds, controls=controls
            )
        except CalibrationError as error:
            refused.append(error)
    raise refused[0]


def _controlling(header: Header, control: Model, model: Model) -> HFEngine:
    """Return the engine that computes every nonce again; a ProofMismatch says that its model is
    another one.
    """
    if (control.digest, control.weights) != (model.digest, model.weights):
        raise ProofMismatch(
            f"a control with {control.reference} ({control.weights}, {control.digest[:12]})",
            wanted=f"the checkpoint of the proof, {model.digest[:12]}",
            do="load the same checkpoint in the other number format",
        )
    return HFEngine(
        control.with_frame(model.frame),
        batch_size=min(judging_batch(header), _most_rows(control, header)),
        seq_len=header.round.seq_len,
        compiled=worth_compiling(control) and not header.pipeline.steps,
    )


def _check_frame(header: Header, engine: Engine) -> None:
    """Refuse a proof in another frame than the validator's; a UsageError says that the validator
    has none.
    """
    validator_frame = frame_name(header.pipeline, engine)
    if header.frame != validator_frame:
        raise ProofMismatch(
            f"a proof in the frame {header.frame[:12]}",
            wanted=f"the frame {validator_frame[:12]}, which the network agreed on",
            do="ask the node for a proof in that frame, or pass the one of the network (--pins or "
            "--frame)",
            field="frame",
        )


def _recomputing(header: Header, model: Model, calibration: Calibration | None) -> Iterator[Engine]:
    """Yield the engines of this device that may recompute a proof, in the order in which they are
    tried.

    Equal fingerprints give equal bits, so the first has the batch and the kernels of the prover. A
    calibration may have been measured with others, for instance with those of ``prove`` on this
    device beside a node on vLLM.
    """
    fast = worth_compiling(model) and not header.pipeline.steps  # only eager kernels decode
    claimed_shape = judging_batch(header), is_compiled(header.fingerprint)
    measured = [
        (_bounded(measured_engine.batch_size, header), is_compiled(measured_engine))
        for measured_engine in _measured(header, calibration, "hf")
    ]
    most_rows = _most_rows(model, header)
    for batch_size, compiled in dict.fromkeys(
        (min(size, most_rows), compiled and fast) for size, compiled in (claimed_shape, *measured)
    ):
        yield HFEngine(
            model, batch_size=batch_size, seq_len=header.round.seq_len, compiled=compiled
        )


def _most_rows(model: Model, header: Header) -> int:
    """Return the rows that fit: no header may keep a validator from its verdict."""
    return max(1, fitting_batch(model, header.positions))


def judging_batch(
    header: Header, *, engine: str = "hf", calibration: Calibration | None = None
) -> int:
    """Return the batch size to recompute with: the header's if measured, else the first measured.

    If no engine of the validator's kind, ``hf`` or ``vllm``, that may judge the prover was measured
    with the batch of the header, that of the first one is taken.

    Raises:
        CalibrationError: The calibration is of another model, preset or build than the proof.
    """
    claimed_size = _bounded(header.fingerprint.batch_size, header)
    measured = [
        _bounded(judge_engine.batch_size, header)
        for judge_engine in _measured(header, calibration, engine)
    ]
    return claimed_size if claimed_size in measured or not measured else measured[0]


def _measured(header: Header, calibration: Calibration | None, engine: str) -> list[Fingerprint]:
    judges = (
        [] if calibration is None else calibration.find_build(header).judges(header.fingerprint)
    )
    return [judge_engine for judge_engine in judges if judge_engine.engine == engine]


def _bounded(batch_size: int, header: Header) -> int:
    return max(1, min(batch_size, LARGEST_BATCH, LARGEST_SHAPE // header.positions))
