"""The prover: nonces in, records out, in batches of one fixed shape."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.errors import ModelError, UsageError, not_finite
from assay.files.jsonl import dumps
from assay.files.storage import PartialFile
from assay.models.model import Model
from assay.poc.engines.base import Engine, check_supported
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.header import Header, runs_of
from assay.poc.protocol.pipelines import Pipeline, check_frame, get_pipeline
from assay.poc.protocol.proof import Proof, parse_record_line
from assay.poc.protocol.records import Record, published_form
from assay.poc.protocol.round import Input, Round

DEFAULT_BATCH = 32

Progress = Callable[[int, int], None]
"""Called with (records done, records in all) after every batch; by :func:`prove` also once before
the first.
"""


def prove(
    model: Model,
    round: Round,
    nonces: Iterable[int],
    *,
    batch_size: int | None = None,
    output: str | Path | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    finish: Callable[[Proof], None] | None = None,
) -> Proof:
    """Prove that a model ran on the noise of every nonce.

    Args:
        model: Model that is proved.
        round: Round of this node; its ``model`` is filled in when empty.
        nonces: Ascending nonces of this node's share, for instance ``round.nonces(0, 256)``.
        batch_size: Rows of the fixed batch shape, recorded in the proof; 32, or that of ``engine``,
            when None.
        output: Proof file, written as it grows to ``<output>.partial``. If an interrupted run of
            the same round left that file, the proof continues after its last whole line; the
            seconds of its footer are those of the last run alone, since nothing says how long the
            ones before worked.
        engine: Engine that runs the model; when None, the transformers engine, compiled on CUDA.
        progress: Function that is called with (nonces done, nonces in all): first with those that
            an interrupted run left, mostly 0, and then after every batch.
        overwrite: Whether an existing proof file may be replaced.
        finish: Function that is given the proof before its file has its final name. Where it fails,
            the same call continues there.

    Returns:
        The complete proof.

    Raises:
        UsageError: A nonce, shape or preset is out of range, ``batch_size`` is not that of
            ``engine``, the file exists and may not be replaced, or its partial file belongs to
            another proof.
        ProofFormatError: A line of the partial file was edited.
        ModelError: The model cannot be run: no decoder layers were found, or (BadWeights) it gives
            NaN or infinity.
        OutOfMemory: The device has no room for a batch.
        StorageError: The file cannot be written. What was proved so far stays in the partial file.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> proof = assay.poc.prove(model, round, round.nonces(0, 8))
        >>> [record.nonce for record in proof.records]
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> all(0 < record.distance < 2 for record in proof.records)
        True
    """
    if engine is None:
        # Decoding runs the kernels of eager torch.
        decoding = get_pipeline(round.preset).steps > 0
        engine = HFEngine(
            model,
            batch_size=DEFAULT_BATCH if batch_size is None else batch_size,
            seq_len=round.seq_len,
            compiled=worth_compiling(model) and not decoding,
        )
    elif batch_size not in (None, engine.batch_size):
        raise UsageError(
            f"batch_size {batch_size} with an engine of {engine.batch_size} rows",
            wanted="one of the two: the batch shape belongs to the engine",
            do="leave batch_size out, or make the engine with it",
        )
    chosen = round.check_nonces(nonces)
    check_length(engine, round)
    header = describe_proof(model, round, chosen, engine)
    started = time.perf_counter()
    with nullcontext() if output is None else PartialFile(output, overwrite=overwrite) as out:
        records: list[Record] = []
        if out:
            records = out.resume(
                dumps(header.as_dict()),
                len(chosen),  # below the header, so that the records begin in line 2
                lambda number, line: parse_record_line(
                    out.partial, number, line, header, chosen[number - 2]
                ),
            )
        if progress:
            progress(len(records), len(chosen))
        inputs = round.inputs(chosen[len(records) :])
        for batch in compute(engine, header.pipeline, inputs):
            records.extend(batch)
            if out:
                out.append_lines(map(header.line, batch))
            if progress:
                progress(len(records), len(chosen))
        proof = Proof.build(header, records, float(f"{time.perf_counter() - started:.3f}"))
        if finish:
            finish(proof)
        if out:
            out.append_lines([proof.footer.line()])
            out.commit()
    return proof


def describe_proof(model: Model, round: Round, nonces: Sequence[int], engine: Engine) -> Header:
    """Return the header of a proof of nonces that an engine is to make.

    Raises:
        UsageError: The engine cannot run the preset, or has no frame for it.
    """
    pipeline = get_pipeline(round.preset)
    check_supported(engine, pipeline)
    return Header(
        round=round.with_model(model.reference),
        pipeline=pipeline,
        digest=model.digest,
        weights=model.weights,
        frame=frame_name(pipeline, engine),
        fingerprint=engine.fingerprint,
        nonces=runs_of(nonces),
    )


def frame_name(pipeline: Pipeline, engine: Engine) -> str:
    """Return the SHA-256 of the frame that a header names, empty for a pipeline that needs none.

    Raises:
        UsageError: The engine has no frame, or that of a model of another shape.
    """
    if not pipeline.framed:
        return ""
    check_frame(
        pipeline, engine.frame, hidden_size=engine.hidden_size, vocab_size=engine.vocab_size
    )
    return engine.frame.sha256 if engine.frame is not None else ""


def check_length(engine: Engine, round: Round) -> None:
    """Refuse an engine for nonces of another length than those of a round.

    Raises:
        UsageError: Names both.
    """
    if engine.seq_len != round.seq_len:
        raise UsageError(
            f"an engine for {engine.seq_len} positions",
            wanted=f"seq_len {round.seq_len}",
            do="make one for this round",
        )


def compute(
    engine: Engine,
    pipeline: Pipeline,
    inputs: Sequence[Input],
    claimed: Sequence[Record] | None = None,
) -> Iterator[list[Record]]:
    """Compute the records of inputs, one list per batch of the engine.

    Args:
        engine: Engine that runs the model.
        pipeline: Preset of the inputs.
        inputs: Inputs that may share a batch, or those of one round.
        claimed: Received records of the inputs, of which tokens are replayed and not decoded again.
            Tokens that follow a wrong one are judged as what the model says after it, so one
            forward pass judges them all.

    Raises:
        BadWeights: The model gives a value that is NaN or infinite.
        ModelError: The engine gives fewer or more results than inputs.
    """
    check_supported(engine, pipeline)
    form = published_form(pipeline)
    claimed_MN = None
    if form.replayed and claimed is not None:
        claimed_MN = np.stack([getattr(record, form.replayed) for record in claimed])
    start = 0
    with closing(engine.run(inputs, pipeline, claimed_MN)) as batches:
        for values in batches:
            batch = inputs[start : start + engine.batch_size]
            _check_rows({len(rows) for rows in values.values()}, len(batch))
            if not all(_are_numbers(name, rows) for name, rows in values.items()):
                raise not_finite(
                    f"preset {pipeline.name} gives a value that is NaN or infinite in "
                    f"{engine.dtype}",
                    wanted="logits that are finite and not all zero",
                )
            records = form.records([nonce for _, nonce in batch], values)
            if claimed_MN is not None:
                pairs = zip(records, claimed_MN[start : start + len(batch)], strict=True)
                records = [replace(record, **{form.replayed: row}) for record, row in pairs]
            yield records
            start += len(batch)
    if start < len(inputs):
        _check_rows({0}, len(inputs[start : start + engine.batch_size]))


def _are_numbers(name: str, rows: npt.NDArray[Any]) -> bool:
    """Return whether all values are finite; an infinite margin is that of an id without a token."""
    return bool(np.all(~np.isnan(rows) if name == "margins" else np.isfinite(rows)))


def _check_rows(sizes: set[int], expected: int) -> None:
    """Refuse a batch in which some array has another number of rows than there are inputs."""
    if sizes != {expected} or not expected:
        raise ModelError(
            f"an engine with {max(sizes, default=0)} results for a batch of {expected} nonces",
            wanted="one result for each nonce",
            do="start the engine again; if that does not help, use --engine hf",
        )
