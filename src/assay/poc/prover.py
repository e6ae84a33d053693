"""The prover: nonces in, records out, in batches of one fixed shape."""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import UsageError, not_finite
from assay.files.jsonl import dumps
from assay.files.storage import PartialFile
from assay.models.load import Model
from assay.poc.engines.base import Engine, check_supported
from assay.poc.engines.decoding import DecodingEngine, decodes
from assay.poc.engines.hf.compiled import worth_compiling
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.proof import Proof, parse_record_line
from assay.poc.protocol.record import DistanceRecord, Header, Record, TokenRecord, VectorRecord
from assay.poc.protocol.round import MAX_COUNT, Round

DEFAULT_BATCH = 32

Progress = Callable[[int, int], None]
"""Called with (records done, records in all) after every batch; by :func:`prove` also once before the first."""


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
) -> Proof:
    """Prove that a model ran on the noise of every nonce.

    Args:
        model: Model that is proved.
        round: Round of this node; its ``model`` is filled in when empty.
        nonces: Ascending nonces of this node's share, for instance ``round.nonces(0, 256)``.
        batch_size: Rows of the fixed batch shape, recorded in the proof; 32, or that of ``engine``, when None.
        output: Proof file, written as it grows to ``<output>.partial``. If an interrupted run of the same round left
            that file, the proof continues after its last whole line; the seconds of its footer are those of the last
            run alone, since nothing says how long the ones before worked.
        engine: Engine that runs the model; when None, the transformers engine, compiled on CUDA.
        progress: Function that is called with (nonces done, nonces in all): first with those that an interrupted run
            left, mostly 0, and then after every batch.
        overwrite: Whether an existing proof file may be replaced.

    Returns:
        The complete proof.

    Raises:
        UsageError: A nonce, shape or preset is out of range, ``batch_size`` is not that of ``engine``, the file exists
            and may not be replaced, or its partial file belongs to another proof.
        ProofFormatError: A line of the partial file was edited.
        ModelError: The model cannot be run: no decoder layers were found, or (BadWeights) it gives NaN or infinity.
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
        shape = {"batch_size": DEFAULT_BATCH if batch_size is None else batch_size, "seq_len": round.seq_len}
        decoding = get_pipeline(round.preset).steps > 0  # which runs the kernels of eager torch
        engine = HFEngine(model, **shape, compiled=worth_compiling(model) and not decoding)
    elif batch_size not in (None, engine.batch_size):
        raise UsageError(
            f"batch_size {batch_size} with an engine of {engine.batch_size} rows",
            wanted="one of the two: the batch shape belongs to the engine",
            do="leave batch_size out, or make the engine with it",
        )
    header = make_header(model, round, nonces, engine)
    started = time.perf_counter()
    with nullcontext() if output is None else PartialFile(output, overwrite=overwrite) as out:
        records = _recover(out, header) if out else []
        todo = list(itertools.islice(header.all_nonces(), len(records), None))
        if progress:
            progress(len(records), header.count)
        # Hashed as they come: while a device runs the next batch, this costs no time.
        digest = hashlib.sha256(_encoded(map(header.line, records)))
        for batch in compute(header, engine, todo):
            records.extend(batch)
            lines = [header.line(record) for record in batch]
            digest.update(_encoded(lines))
            if out:
                out.append_lines(lines)
            if progress:
                progress(len(records), header.count)
        seconds = float(f"{time.perf_counter() - started:.3f}")
        proof = Proof.build(header, records, seconds, sha256=digest.hexdigest())
        if out:
            out.append(proof.footer.as_dict())
            out.commit()
    return proof


def check_length(engine: Engine, round: Round) -> None:
    """Refuse an engine for nonces of another length than those of a round.

    Raises:
        UsageError: Names both.
    """
    if engine.seq_len != round.seq_len:
        raise UsageError(
            f"an engine for {engine.seq_len} positions", wanted=f"seq_len {round.seq_len}", do="make one for this round"
        )


def make_header(model: Model, round: Round, nonces: Iterable[int], engine: Engine) -> Header:
    """Return the header of a proof of these nonces on this engine."""
    chosen = _listed(nonces)
    round.check_nonces(chosen)
    check_length(engine, round)
    pipeline = get_pipeline(round.preset)
    check_supported(engine, pipeline)
    return Header(
        round=round.with_model(model.reference),
        pipeline=pipeline,
        digest=model.digest,
        weights=model.weights,
        fingerprint=engine.fingerprint,
        nonces=tuple(_runs(chosen)),
    )


def _listed(nonces: Iterable[int]) -> Sequence[int]:
    """Return nonces of any kind, a generator or a numpy array too, as a range or list of Python numbers."""
    most = MAX_COUNT + 1  # one too many is enough to refuse, of an endless generator too
    if isinstance(nonces, range):
        chosen: Sequence[int] = nonces[:most]
    else:
        given: Iterable[Any] = itertools.islice(nonces, most) if isinstance(nonces, Iterable) else ()
        chosen = [int(nonce) if isinstance(nonce, np.integer) else nonce for nonce in given]
    if not 0 < len(chosen) < most:
        seen = f"more than {MAX_COUNT} nonces" if chosen else f"no nonces in {nonces!r:.60}"
        raise UsageError(
            seen, wanted=f"1 to {MAX_COUNT} in one proof", do="give a range, such as --nonces 0:256 or range(256)"
        )
    return chosen


def compute(header: Header, engine: Engine, nonces: Sequence[int]) -> Iterator[list[Record]]:
    """Compute the records of nonces, one list per batch."""
    round = header.round
    check_supported(engine, header.pipeline)
    if decodes(engine) and header.pipeline.steps:
        yield from _decode(header, engine, nonces)
        return
    with closing(engine.outputs(round, header.pipeline, nonces)) as outputs:
        for start, values in zip(range(0, len(nonces), engine.batch_size), outputs, strict=False):
            if not np.isfinite(values).all():
                raise not_finite(
                    f"{round.model} gives {round.preset} a value that is NaN or infinite in {engine.dtype}",
                    wanted="logits that are finite and not all zero",
                )
            wanted = nonces[start : start + engine.batch_size]
            yield [_record(nonce, value) for nonce, value in zip(wanted, values, strict=True)]


def recompute(header: Header, engine: Engine, received: Sequence[Record]) -> Iterator[list[Record]]:
    """Recompute the nonces of received records, one list per batch; tokens are replayed and not decoded again.

    Tokens that follow a wrong one are judged as what the model says after it, so one forward pass judges them all.
    """
    nonces = [record.nonce for record in received]
    check_supported(engine, header.pipeline)
    if not (decodes(engine) and header.pipeline.steps):
        yield from compute(header, engine, nonces)
        return
    tokens_MN = np.stack([record.tokens for record in received if isinstance(record, TokenRecord)])
    with closing(engine.replayed(header.round, header.pipeline, nonces, tokens_MN)) as batches:
        for start, batch in zip(range(0, len(nonces), engine.batch_size), batches, strict=False):
            rows = zip(nonces[start:], tokens_MN[start:], batch.sketches, batch.margins, strict=False)
            yield [TokenRecord(*row) for row in rows]


def _decode(header: Header, engine: DecodingEngine, nonces: Sequence[int]) -> Iterator[list[Record]]:
    with closing(engine.decoded(header.round, header.pipeline, nonces)) as batches:
        for start, batch in zip(range(0, len(nonces), engine.batch_size), batches, strict=False):
            rows = zip(nonces[start:], batch.tokens, batch.sketches, strict=False)
            yield [TokenRecord(*row) for row in rows]


def _encoded(lines: Iterable[str]) -> bytes:
    """Return lines as they stand in the file."""
    return "".join(f"{line}\n" for line in lines).encode()


def _record(nonce: int, value: np.ndarray) -> Record:
    if value.ndim:
        return VectorRecord(nonce, value)
    # The shortest decimal that reads back to the same float32.
    return DistanceRecord(nonce, float(str(np.float32(value))))


def _recover(out: PartialFile, header: Header) -> list[Record]:
    """Return the records that an interrupted run left, or start the file with the header."""
    lines = out.recover()
    if not lines:
        out.append(header.as_dict())
        return []
    if lines[0] != dumps(header.as_dict()):
        raise UsageError(
            f"{out.partial} was begun with another round, model or engine",
            wanted="the same command as the interrupted one",
            do="repeat that command, or remove the partial file to start again",
        )
    # A run that died between the footer and its final name left a line too many: it is written again.
    kept = lines[1 : header.count + 1]
    records = [
        parse_record_line(out.partial, number, f"{line}\n".encode(), header, nonce)
        for number, (line, nonce) in enumerate(zip(kept, header.all_nonces(), strict=False), start=2)
    ]
    if len(lines) > header.count + 1:
        out.restart()
        out.append_lines(lines[: header.count + 1])
    return records


def _runs(nonces: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Write ascending nonces as few ``(first, end, step)`` runs."""
    start = 0
    while start < len(nonces):
        step = nonces[start + 1] - nonces[start] if start + 1 < len(nonces) else 1
        end = start + 1
        while end < len(nonces) and nonces[end] - nonces[end - 1] == step:
            end += 1
        yield (nonces[start], nonces[end - 1] + step, step)
        start = end
