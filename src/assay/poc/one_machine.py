"""Measure the noise laws of a model on one machine, over formats, kernels and batch shapes.

Every engine of this machine computes the nonces of the same rounds. A pair of number formats has a
law of its own, fitted to all pairs of engines in these two formats. So a node that states float32
is not judged by the wider noise of bfloat16, and a pair of formats without a measurement has no
law.

One machine cannot show how machines differ. Its kernels stand for them: two kinds of attention,
other batches and another number of threads. A build of another processor or library has to be
measured with proofs of both (:func:`assay.poc.calibrate`).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, combinations, combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from assay.files.jsonl import dumps, read_json
from assay.files.reading import malformed
from assay.files.storage import check_folder, check_new_file, write_atomic
from assay.models.catalogue import model_info
from assay.models.frame import POSITIONS, SEQUENCES
from assay.models.model import Model
from assay.poc.engines.hf.block_factor import read_block_factor
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.engines.hf.shapes import check_shape
from assay.poc.frames import measure_frame
from assay.poc.launch import check_loadable, load, usual_preset
from assay.poc.protocol.blocks import block_scale, has_block_factor
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pins import check_extent
from assay.poc.protocol.pipelines import Pipeline, check_frame_file, get_pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.round import Round
from assay.poc.prover import Progress, compute, describe_proof, prove
from assay.poc.verdict.build_noise import describe_machines
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.control import Control
from assay.poc.verdict.entries import sha256
from assay.poc.verdict.machine_fit import Residuals, fit_build
from assay.poc.verdict.residuals import residuals
from assay.stats.chord import FloatArray

FORMATS = ("bfloat16", "float16", "float32")
POSITIONS_OF_FULL = 256
BLOCKS = 16
NONCES = 64
# In float32, equal engines agree far better than a cheat does.
QUICK_FORMATS = ("float32",)
QUICK_POSITIONS = 16
QUICK_BLOCKS = 4
TIMED = 512  # positions of the pass by which the whole is estimated
# Seconds from which on the estimate names the quick measurement.
LONG = 600.0
LIMITS = (
    "a quick law: it decides on {formats} engines of this processor and these libraries at "
    "{positions} positions, and tells their proofs from those of int4 weights; proofs of another "
    "format, machine or length are refused, and how machines differ was not measured"
)


# Names of the files in a partial folder, and of those that a write leaves when it is cut off.
MEASURED = ("[0-9a-f]" * 32 + ".json*", ".assay-*.tmp")


class _Shape(NamedTuple):
    """How an engine differs from the usual one: its batch, plain attention, and half of the threads
    of a processor.
    """

    batch_size: int
    plain: bool = False
    fewer_threads: bool = False


SHAPES = (_Shape(32), _Shape(8, fewer_threads=True), _Shape(16, plain=True))


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a model is measured.

    Args:
        preset: Preset of the proofs.
        seq_len: Positions of a nonce. A law holds for the length that was measured.
        blocks: Number of blocks whose nonces are computed.
        nonces: Number of nonces of a block.
        formats: Number formats of the weights.
        quick: Whether the law is marked as one of few nonces.
    """

    preset: str
    seq_len: int = POSITIONS_OF_FULL
    blocks: int = BLOCKS
    nonces: int = NONCES
    formats: Sequence[str] = FORMATS
    quick: bool = False

    @classmethod
    def of(cls, reference: str, *, quick: bool = False, **values: Any) -> "Extent":
        """Return the full or the quick extent for a model, with the values that are given."""
        usual: dict[str, Any] = {"preset": usual_preset(reference), "quick": quick}
        if quick:
            usual |= {"seq_len": QUICK_POSITIONS, "blocks": QUICK_BLOCKS, "formats": QUICK_FORMATS}
        return cls(**usual | values)

    @property
    def engines(self) -> int:
        """Number of engines that compute every nonce."""
        return len(self.formats) * len(SHAPES)

    @property
    def total(self) -> int:
        """Number of nonces that are computed, by all engines."""
        return self.engines * self.blocks * self.nonces

    @property
    def limits(self) -> str:
        """What a quick law cannot decide, in words."""
        limits = LIMITS.format(formats=" and ".join(self.formats), positions=self.seq_len)
        return limits if self.quick else ""


def calibrate_model(
    reference: str,
    *,
    quick: bool = False,
    device: str | None = None,
    frame: Path | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    **extent: Any,
) -> Calibration:
    """Measure the honest noise of a model between the engines of this machine.

    Args:
        reference: Reference of the model.
        quick: Whether to measure 256 nonces of 16 positions in float32, which takes minutes, and
            mark the law; the values of ``extent`` that are given stand.
        device: Device of the model; by default cuda where there is one.
        frame: File of the checkpoint's frame, for a preset that has one; measured and written where
            it is missing.
        partial: Folder that keeps what was measured: an interrupted call with the same folder
            continues. Without one nothing is kept.
        progress: Function that is called with (nonces done, nonces in all) after every batch.
        announce: Function that is told before the measurement how long it will take.
        extent: Fields of :class:`assay.poc.one_machine.Extent`.

    Returns:
        The calibration, with a build for every pair of number formats. A preset whose distances
        differ in width between blocks also has the effective dimension of the model's states.

    Raises:
        UsageError: There are fewer than 256 nonces, no or repeated formats, or no file for the
            frame of the preset.
        ModelError: The model cannot be loaded or run.
        BadWeights: The model gives NaN or infinity in a format.
        StorageError: The folder or the frame cannot be written.
    """
    chosen = Extent.of(reference, quick=quick, **extent)
    pipeline = get_pipeline(chosen.preset)
    check_extent(chosen.blocks, chosen.nonces, chosen.formats)
    for name in chosen.formats:
        check_loadable(reference, name, device)
    info = model_info(reference)
    check_shape(
        info,
        batch_size=max(shape.batch_size for shape in SHAPES),
        seq_len=chosen.seq_len,
        steps=pipeline.steps,
    )
    check_frame_file(pipeline, frame)
    if partial is not None:
        check_folder(partial)
    lender = _Lender(reference, device)
    # A frame file that is not there yet is measured and written.
    is_new = frame is not None and not frame.exists()
    if is_new and frame is not None:
        check_new_file(frame, overwrite=False)
    if announce and (partial is None or not partial.exists()):
        announce(_estimate(lender, chosen, with_frame=is_new))
    if is_new and frame is not None:
        measure_frame(lender.model(chosen.formats[0])).save(frame)
    store = _Store(partial)
    rounds = [
        Round(
            block_hash=f"calibration-{block}",
            public_key="calibration",
            preset=chosen.preset,
            seq_len=chosen.seq_len,
        )
        for block in range(chosen.blocks)
    ]
    size = info.hidden_size if pipeline.output == "distance" and pipeline.head == "random" else 0
    scales = [block_scale(round, size) if size else 1.0 for round in rounds]
    by_engine: list[list[Proof]] = []
    measured: dict[tuple[int, int], FloatArray] = {}
    effective: float | None = None
    for model, engine in _engines(lender, chosen, frame if pipeline.framed else None):
        if effective is None and has_block_factor(pipeline):
            effective = store.effective_dimension(engine, model, rounds[0])
        engine_proofs: list[Proof] = []
        for round in rounds:
            before = (len(by_engine) * chosen.blocks + len(engine_proofs)) * chosen.nonces
            counted = progress and _counting(progress, before, chosen.total)
            engine_proofs.append(store.prove(model, round, chosen.nonces, engine, counted))
        # Every engine is compared with those before it, so each pair is compared once.
        for row, theirs in enumerate(by_engine):
            measured[row, len(by_engine)] = np.concatenate(
                [
                    store.residuals(proof, mine, engine) / scale
                    for proof, mine, scale in zip(theirs, engine_proofs, scales, strict=True)
                ]
            )
        by_engine.append(engine_proofs)
    engines = [proofs[0].header.fingerprint for proofs in by_engine]
    law = _fit(measured, engines, pipeline, by_engine[0][0].header.digest, size, effective)
    return Calibration(builds=tuple(replace(build, limits=chosen.limits) for build in law.builds))


def _counting(progress: Progress, before: int, total: int) -> Progress:
    """Return a function that adds the nonces of earlier proofs to those of one."""
    return lambda count, _: progress(before + count, total)


class _Lender:
    """Loads a model in one number format at a time, and keeps the last one."""

    def __init__(self, reference: str, device: str | None) -> None:
        self._reference = reference
        self._device = device
        self._last: dict[str, Model] = {}

    def model(self, dtype: str) -> Model:
        """Return the model in a number format; another format leaves the memory first."""
        if dtype not in self._last:
            self._last.clear()
            self._last[dtype] = load(self._reference, dtype, self._device)
        return self._last[dtype]


def _estimate(lender: _Lender, extent: Extent, *, with_frame: bool) -> str:
    """Return how long a measurement will take, by a pass of every number format on this machine.

    A shape with half of the threads is counted at twice the time, and the rest in proportion to its
    positions.
    """
    seconds = {
        # The first format is the last one here, so that the measurement need not load it again.
        name: _seconds_per_position(lender.model(name), extent.seq_len)
        for name in reversed(extent.formats)
    }
    model = lender.model(extent.formats[0])
    steps = get_pipeline(extent.preset).steps
    length = extent.seq_len + steps
    fewer = 2 if model.device.type == "cpu" else 1
    shapes = sum(fewer if shape.fewer_threads else 1 for shape in SHAPES)
    lasts = sum(seconds.values()) * extent.blocks * extent.nonces * length * shapes
    if with_frame:
        lasts += seconds[extent.formats[0]] * SEQUENCES * POSITIONS
    estimate = (
        f"{extent.total} nonces of {extent.seq_len} positions on {extent.engines} engines, "
        f"about {say_time(lasts)} by a timing run on this machine"
    )
    if steps == 0 and worth_compiling(model):
        estimate += ", besides the compilation of kernels"
    if extent.quick or lasts < LONG:
        return estimate
    quick = QUICK_BLOCKS * NONCES * QUICK_POSITIONS * shapes + SEQUENCES * POSITIONS
    return f"{estimate}; with --quick about {say_time(min(seconds.values()) * quick)}"


def _seconds_per_position(model: Model, seq_len: int) -> float:
    """Return the seconds of a forward pass over its positions: of a second pass, which is warm."""
    positions = min(seq_len, model.max_positions)
    rows = max(1, min(SHAPES[0].batch_size, math.ceil(TIMED / positions)))
    engine = HFEngine(model, batch_size=rows, seq_len=positions)
    inputs_BTD = engine.embed_tokens(np.ones((rows, positions), np.int64))
    for _ in range(2):
        began = time.perf_counter()
        engine.states(inputs_BTD).cpu()
    return (time.perf_counter() - began) / (rows * positions)


def say_time(seconds: float) -> str:
    """Return a duration as a person says it.

    Example:
        >>> say_time(9000), say_time(125), say_time(20)
        ('2 h 30 min', '2 min', '20 s')
    """
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def remove_measured(partial: Path) -> None:
    """Remove what a measurement kept in a folder, and the folder unless it has other files."""
    with suppress(OSError):
        for pattern in MEASURED:
            for path in partial.glob(pattern):
                path.unlink()
        partial.rmdir()


class _Store:
    """Keeps what was measured in a folder, so that an interrupted measurement continues.

    A proof is named by the hash of its header, which names checkpoint, round, frame and engine, so
    files of other measurements are never taken for those of this one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def prove(
        self, model: Model, round: Round, nonces: int, engine: HFEngine, progress: Progress | None
    ) -> Proof:
        """Return the proof of an engine, of which an earlier run may have left a part."""
        options: dict[str, Any] = {"engine": engine, "progress": progress}
        if self._folder is None:
            return prove(model, round, range(nonces), **options)
        header = describe_proof(model, round, range(nonces), engine)
        path = self._folder / f"{sha256(dumps(header.as_dict()))[:32]}.jsonl"
        if not path.exists():
            prove(model, round, range(nonces), output=path, **options)
        return Proof.load(path)

    def residuals(self, proof: Proof, engine_proof: Proof, engine: HFEngine) -> FloatArray:
        """Return the residuals between a proof and the values of an engine.

        Tokens part after the first that differs, so they are replayed.
        """
        if not proof.header.pipeline.steps:
            return residuals(proof.records, engine_proof.records)

        def replayed() -> list[float]:
            inputs = proof.round.inputs([record.nonce for record in proof.records])
            batches = compute(engine, proof.header.pipeline, inputs, proof.records)
            errors_N = residuals(proof.records, [*chain.from_iterable(batches)])
            return [float(error) for error in errors_N]

        headers = [proof.header.as_dict(), engine_proof.header.as_dict()]
        return np.array(self._once(headers, len(proof.records), replayed))

    def effective_dimension(self, engine: HFEngine, model: Model, round: Round) -> float:
        """Return the effective dimension of the states of an engine."""
        header = describe_proof(model, round, range(1), engine)
        (dimension,) = self._once(
            ["states", header.as_dict()],
            1,
            lambda: [read_block_factor(engine, round).effective_dimension],
        )
        return dimension

    def _once(
        self, key: Sequence[Any], count: int, measure: Callable[[], list[float]]
    ) -> list[float]:
        """Return the ``count`` numbers that a key stands for; measure and write them where the file
        is missing.
        """
        if self._folder is None:
            return measure()
        path = self._folder / f"{sha256(dumps(key))[:32]}.json"
        if not path.exists():
            write_atomic(path, dumps({"values": measure()}))
        values = read_json(path).get("values")
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(type(value) in (int, float) for value in values)
        ):
            raise malformed(path, "not what an earlier run measured", f"{count} numbers")
        return [float(value) for value in values]


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
        # One engine in a format says nothing of that format beside itself.
        if not of_pair:
            continue
        facts: dict[str, Any] = {
            "digest": digest,
            "hidden_size": hidden_size,
            "effective_dimension": effective,
        }
        machines = describe_machines([engines[row] for row in rows])
        laws = [fit_build(of_pair, machines, pipeline, **facts)]
        scored = None if pipeline.steps else _scores(measured, engines, chosen, pair)
        if scored is not None:
            scores = dict(zip(of_pair, scored[1], strict=True))
            laws.append(fit_build(scores, machines, pipeline, control=scored[0], **facts))
        # Kernels of one machine do not show how machines differ: the smallest cheat is the usual
        # one.
        builds += [replace(build, effect=None) for build in laws]
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
    measured_pairs: list[tuple[FloatArray, FloatArray]] = []
    for i, j in chosen:
        node, validator = (i, j) if engines[j].dtype == pair[1] else (j, i)
        recomputing = [validator, *map(formats.index, dtypes)]
        sides = [(node, row) for row in recomputing], combinations(recomputing, 2)
        residuals_EN, between_PN = (
            np.stack([measured[min(two), max(two)] for two in side]) for side in sides
        )
        measured_pairs.append((residuals_EN, between_PN))
    control = Control.measured(measured_pairs, of=pair[1], dtypes=dtypes)
    return (
        None
        if control is None
        else (control, [control.scores(*values) for values in measured_pairs])
    )


def _engines(
    lender: _Lender, extent: Extent, frame: Path | None
) -> Iterator[tuple[Model, HFEngine]]:
    """Yield every engine with its model, which is in memory alone."""
    steps = get_pipeline(extent.preset).steps
    for name in extent.formats:
        model = lender.model(name).with_frame(frame)
        for shape in SHAPES:
            with engine_variant(
                model,
                batch_size=shape.batch_size,
                seq_len=extent.seq_len,
                compiled=shape is SHAPES[0] and worth_compiling(model) and not steps,
                plain=shape.plain,
                fewer_threads=shape.fewer_threads and model.device.type == "cpu",
            ) as opened:
                yield opened


@contextmanager
def engine_variant(
    model: Model, *, plain: bool = False, fewer_threads: bool = False, **shape: Any
) -> Iterator[tuple[Model, HFEngine]]:
    """Yield a model and its engine in another setting than usual, which holds inside the block.

    Args:
        model: Model, whose attention is as before when the block ends.
        plain: Whether attention is written out instead of one kernel.
        fewer_threads: Whether half of the threads compute, so that a law covers their number.
        shape: Arguments of the engine.
    """
    attention = str(model.module.config._attn_implementation)
    threads = torch.get_num_threads()
    try:
        if plain:
            model.module.set_attn_implementation("eager")
        if fewer_threads:
            torch.set_num_threads(max(1, threads // 2))
        engine = HFEngine(model, **shape)
        # The fingerprint is computed once: now, while threads and attention are set.
        assert engine.fingerprint
        yield model, engine
    finally:
        torch.set_num_threads(threads)
        model.module.set_attn_implementation(attention)
