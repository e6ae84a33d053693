"""Measure the laws of honest noise of a model on one machine: between its number formats, kernels
and batch shapes.

Every engine of this machine computes the nonces of the same rounds. A pair of number formats has a
law of its own, fitted to all pairs of engines in these two formats. So a node that states float32
is not judged by the wider noise of bfloat16, and a pair of formats without a measurement has no
law.

One machine cannot show how machines differ. Its kernels stand for them: two kinds of attention,
other batches and another number of threads. A build of another processor or library has to be
measured with proofs of both (:func:`assay.poc.calibrate`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from assay.files.storage import check_new_file
from assay.models.catalogue import model_info
from assay.models.model import Model
from assay.poc.engines.hf.engine import HFEngine, check_shape, read_block_factor
from assay.poc.engines.hf.fused import worth_compiling
from assay.poc.frames import measure_frame
from assay.poc.launch import check_loadable, load
from assay.poc.protocol.blocks import block_scale, has_block_factor
from assay.poc.protocol.pins import check_extent
from assay.poc.protocol.pipelines import Pipeline, check_frame_file, get_pipeline
from assay.poc.protocol.proof import Fingerprint, Proof, Record
from assay.poc.protocol.round import Round
from assay.poc.prover import Progress, prove, recompute
from assay.poc.verdict.calibration import Calibration, Residuals, describe_machines, fit_build
from assay.poc.verdict.judge import residuals
from assay.poc.verdict.noise import Control, FloatArray

FORMATS = ("bfloat16", "float16", "float32")
BLOCKS = 16
NONCES = 64


class _Shape(NamedTuple):
    """How an engine differs from the usual one: its batch, plain attention, and half of the threads
    of a processor.
    """

    batch_size: int
    plain: bool = False
    fewer_threads: bool = False


SHAPES = (_Shape(32), _Shape(8, fewer_threads=True), _Shape(16, plain=True))


def calibrate_model(
    reference: str,
    *,
    preset: str = "poc-2.0",
    seq_len: int = 256,
    blocks: int = BLOCKS,
    nonces: int = NONCES,
    formats: Sequence[str] = FORMATS,
    device: str | None = None,
    frame: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the honest noise of a model between the engines of this machine.

    Args:
        reference: Reference of the model.
        preset: Preset of the proofs.
        seq_len: Positions of a nonce. A law holds for the length that was measured.
        blocks: Number of blocks whose nonces are computed.
        nonces: Number of nonces of a block.
        formats: Number formats of the weights.
        device: Device of the model; by default cuda where there is one.
        frame: File of the checkpoint's frame, for a preset that has one; measured and written where
            it is missing.
        progress: Function that is called with (nonces done, nonces in all) after every block of an
            engine.

    Returns:
        The calibration, with a build for every pair of number formats. A preset whose distances
        differ in width between blocks also has the effective dimension of the model's states.

    Raises:
        UsageError: There are fewer than 256 nonces, no or repeated formats, or no file for the
            frame of the preset.
        ModelError: The model cannot be loaded or run.
        BadWeights: The model gives NaN or infinity in a format.
    """
    pipeline = get_pipeline(preset)
    check_extent(blocks, nonces, formats)
    for name in formats:
        check_loadable(reference, name, device)
    info = model_info(reference)
    check_shape(
        info,
        batch_size=max(shape.batch_size for shape in SHAPES),
        seq_len=seq_len,
        steps=pipeline.steps,
    )
    check_frame_file(pipeline, frame)
    if frame is not None and not frame.exists():
        check_new_file(frame, overwrite=False)
        measure_frame(load(reference, None, device), progress=progress).save(frame)
    rounds = [
        Round(
            block_hash=f"calibration-{block}",
            public_key="calibration",
            preset=preset,
            seq_len=seq_len,
        )
        for block in range(blocks)
    ]
    size = info.hidden_size if pipeline.output == "distance" and pipeline.head == "random" else 0
    scales = [block_scale(round, size) if size else 1.0 for round in rounds]
    found: list[list[Proof]] = []
    measured: dict[tuple[int, int], FloatArray] = {}
    effective: float | None = None
    total = len(formats) * len(SHAPES) * blocks * nonces
    for model, engine in _engines(
        reference, formats, pipeline, seq_len=seq_len, device=device, frame=frame
    ):
        if effective is None and has_block_factor(pipeline):
            effective = read_block_factor(engine, rounds[0]).effective_dimension
        own: list[Proof] = []
        for round in rounds:
            own.append(prove(model, round, range(nonces), engine=engine))
            if progress:
                progress((len(found) * blocks + len(own)) * nonces, total)
        for row, theirs in enumerate(found):
            measured[row, len(found)] = np.concatenate(
                [
                    residuals(proof.records, _again(proof, mine, engine)) / scale
                    for proof, mine, scale in zip(theirs, own, scales, strict=True)
                ]
            )
        found.append(own)
    engines = [proofs[0].header.fingerprint for proofs in found]
    digest = found[0][0].header.digest
    return _fit(measured, engines, pipeline, digest, size, effective)


def _again(proof: Proof, mine: Proof, engine: HFEngine) -> Sequence[Record]:
    """Return what an engine computes of a proof; tokens part after the first that differs, so they
    are replayed.
    """
    if not proof.header.pipeline.steps:
        return mine.records
    return [record for batch in recompute(proof.header, engine, proof.records) for record in batch]


def _fit(
    measured: Residuals,
    engines: Sequence[Fingerprint],
    pipeline: Pipeline,
    digest: str,
    hidden_size: int,
    effective: float | None,
) -> Calibration:
    """Fit a law to every pair of number formats: to the residuals of all pairs of engines in these
    two.
    """
    formats = list(dict.fromkeys(engine.dtype for engine in engines))
    builds = []
    # Engines of a format that mostly agree to the bit are one: a law that leaves another out would
    # know no noise.
    again = {
        j
        for (i, j), e in measured.items()
        if engines[i].dtype == engines[j].dtype and not np.median(np.abs(e))
    }
    for pair in combinations_with_replacement(formats, 2):
        every = [row for row, engine in enumerate(engines) if engine.dtype in pair]
        rows = every if len(set(every) - again) < 2 else [row for row in every if row not in again]
        place = {row: index for index, row in enumerate(rows)}
        chosen = {
            (i, j): errors_N
            for (i, j), errors_N in measured.items()
            if {i, j} <= place.keys()
            and sorted((engines[i].dtype, engines[j].dtype)) == sorted(pair)
        }
        of_pair = {(place[i], place[j]): errors_N for (i, j), errors_N in chosen.items()}
        if not of_pair:  # one engine in a format says nothing of that format beside itself
            continue
        known: dict[str, Any] = {
            "digest": digest,
            "hidden_size": hidden_size,
            "effective_dimension": effective,
        }
        machines = describe_machines([engines[row] for row in rows])
        found = [fit_build(of_pair, machines, pipeline, **known)]
        scored = None if pipeline.steps else _scores(measured, engines, chosen, pair)
        if scored is not None:
            scores = dict(zip(of_pair, scored[1], strict=True))
            found.append(fit_build(scores, machines, pipeline, control=scored[0], **known))
        # Kernels of one machine do not show how machines differ: the smallest cheat is the usual
        # one.
        builds += [replace(build, effect=None) for build in found]
    return Calibration(builds=tuple(builds))


def _scores(
    measured: Residuals, engines: Sequence[Fingerprint], chosen: Residuals, pair: tuple[str, str]
) -> tuple[Control, list[FloatArray]] | None:
    """Return the control of a pair of number formats and the scores of ``chosen``; None where a
    control is no gain.

    The validator has the second format of the pair, and computes every nonce again in the first two
    formats that neither has, on the usual engine.
    """
    formats = [engine.dtype for engine in engines]
    dtypes = list(dict.fromkeys(name for name in formats if name not in pair))[:2]
    if not dtypes:
        return None
    both: list[tuple[FloatArray, FloatArray]] = []
    for i, j in chosen:
        node, validator = (i, j) if engines[j].dtype == pair[1] else (j, i)
        own = [validator, *map(formats.index, dtypes)]
        sides = [(node, row) for row in own], combinations(own, 2)
        residuals_EN, between_PN = (
            np.stack([measured[min(two), max(two)] for two in side]) for side in sides
        )
        both.append((residuals_EN, between_PN))
    control = Control.measured(both, of=pair[1], dtypes=dtypes)
    return None if control is None else (control, [control.scores(*values) for values in both])


def _engines(
    reference: str,
    formats: Sequence[str],
    pipeline: Pipeline,
    *,
    seq_len: int,
    device: str | None,
    frame: Path | None,
) -> Iterator[tuple[Model, HFEngine]]:
    """Yield every engine with its model, which is in memory alone."""
    for name in formats:
        model = load(reference, name, device).with_frame(frame if pipeline.framed else None)
        usual = str(model.module.config._attn_implementation)
        for shape in SHAPES:
            compiled = shape is SHAPES[0] and worth_compiling(model) and not pipeline.steps
            try:
                if shape.plain:
                    model.module.set_attn_implementation("eager")
                with _threads(fewer=shape.fewer_threads and model.device.type == "cpu"):
                    engine = HFEngine(
                        model, batch_size=shape.batch_size, seq_len=seq_len, compiled=compiled
                    )
                    assert engine.fingerprint  # now, while its threads and attention are set
                    yield model, engine
            finally:
                model.module.set_attn_implementation(usual)


@contextmanager
def _threads(*, fewer: bool) -> Iterator[None]:
    """Compute with half of the threads, so that a law is of no number of them; with one thread,
    where there is one.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(max(1, usual // 2) if fewer else usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
