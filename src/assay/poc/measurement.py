"""Measurements from proofs: the honest noise of a build, and the r_target of a wanted rate of valid nonces.

The closed form of an r_target is the quantile of the chord law, and holds over blocks. Within one block all cosines are
wider or narrower by one factor γ (:class:`assay.stats.BlockLaw`). So a quantile measured in few blocks is off by more
than the number of its nonces says. The interval adds both: the error of γ, and the order statistics of the nonces.

Legend of shapes: M blocks, N nonces, K published numbers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

from assay import stats
from assay.errors import ProofMismatch, UsageError
from assay.models.load import load_model, model_info
from assay.poc.engines.hf.engine import measure_block_factor
from assay.poc.protocol.blocks import BlockFactor
from assay.poc.protocol.proof import Proof, VectorRecord
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import block_target
from assay.poc.prover import Progress
from assay.poc.verdict.calibration import BuildNoise, Calibration, calibrate
from assay.poc.verdict.noise import FloatArray
from assay.stats.chord import RANDOM_HEAD_ROWS, BlockLaw, rate_standard_error

MIN_NONCES = 30  # of all blocks together, for quantiles
MIN_BLOCKS = 8  # whose own spread says how blocks differ
CONFIDENCE = 0.95  # of the interval of a quantile


@dataclass(frozen=True, kw_only=True)
class MeasuredTarget:
    """A measured r_target, compared with the closed form.

    Args:
        valid_rate: Wanted share of valid nonces.
        dimension: Dimension of the space in which the distance is measured.
        r_target: Closed form, by the chord law, which holds over blocks.
        measured: Quantile of the measured distances. Where the factor of a block is known, its distances are first
            brought to the width of an average block.
        low: Lower end of the interval of the quantile over blocks.
        high: Upper end of that interval.
        confidence: Confidence of the interval.
        n: Number of nonces measured.
        off_in_standard_errors: Measured minus closed form, over the standard error of the nonces and the blocks.
        blocks: Number of blocks measured.
        effective_dimension: Effective dimension of the states, from which the spread of the factors of blocks follows;
            None where they do not differ.
        effective_dimension_from: Source of it: ``given``, the ``blocks`` or the ``model``; else ``none``.
        widths: Measured standard deviation of the cosines of every block over that of the law.
        factors: Factor of every block by its head and the model; empty where that was not measured.
    """

    valid_rate: float
    dimension: int
    r_target: float
    measured: float
    low: float
    high: float
    confidence: float
    n: int
    off_in_standard_errors: float
    blocks: int = 1
    effective_dimension: float | None = None
    effective_dimension_from: str = "none"
    widths: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the closed form lies in the interval of the measured one."""
        return self.low <= self.r_target <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**vars(self), "widths": [*self.widths], "factors": [*self.factors], "agrees": self.agrees}


def measure_r_target(
    proofs: Proof | Sequence[Proof],
    valid_rate: float,
    *,
    dimension: int | None = None,
    effective_dimension: float | None = None,
    factors: Sequence[BlockFactor] = (),
) -> MeasuredTarget:
    """Measure the r_target of a valid rate from the nonces of proofs.

    The interval is that of the quantile over blocks. One block says little of others, unless ``factors`` give the width
    of its distances. With eight blocks or more, their own spread is used.

    Args:
        proofs: Proof of any preset, or several of one preset and checkpoint. A vector counts with its distance to the
            target of the block in R^K.
        valid_rate: Wanted share of valid nonces, in (0, 1).
        dimension: Dimension of the output; needed where the preset has no random head and publishes distances.
        effective_dimension: Measured effective dimension of the states, as a calibration has it.
        factors: Factor of the block of each proof in their order, by :func:`assay.poc.measure_block_factor`, or none.

    Returns:
        The measured target with its interval, and the closed form.

    Raises:
        UsageError: A rate or dimension is out of range or missing, there are fewer than 30 nonces, there is not one
            factor per proof, or fewer than eight blocks of distances have neither factors nor an effective dimension.
        ProofMismatch: The proofs are of several presets, checkpoints or lengths.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> proof = assay.poc.prove(model, round, range(64))
        >>> found = assay.poc.measure_r_target(proof, 0.5, factors=[assay.poc.measure_block_factor(model, round)])
        >>> found.n, found.dimension, round.r_target - 0.05 < found.r_target < round.r_target
        (64, 8192, True)
        >>> 20 < found.effective_dimension < 60, found.effective_dimension_from
        (True, 'model')
    """
    given = (proofs,) if isinstance(proofs, Proof) else tuple(proofs)
    _refuse_different(given, factors)
    size = _dimension(given[0], dimension)
    per_block: dict[str, list[FloatArray]] = {}
    for proof in given:
        vectors = [record.vector for record in proof.records if isinstance(record, VectorRecord)]
        values = np.array(vectors) if vectors else proof.distances
        per_block.setdefault(proof.round.block_hash, []).append(distances_to_target(values, proof.round))
    known = {proof.round.block_hash: factor for proof, factor in zip(given, factors, strict=bool(factors))}
    return compare_r_target(
        [np.concatenate(of_block) for of_block in per_block.values()],
        valid_rate,
        size,
        effective_dimension=math.inf if given[0].header.pipeline.output == "vector" else effective_dimension,
        factors=list(known.values()),
    )


def _refuse_different(proofs: Sequence[Proof], factors: Sequence[BlockFactor]) -> None:
    """Refuse no proof, proofs that cannot be taken together, and another number of factors than proofs."""
    if not proofs or (factors and len(factors) != len(proofs)):
        raise UsageError(
            f"{len(proofs)} proofs with {len(factors)} factors of blocks",
            wanted="at least one proof, and one factor for each or no factor",
            do="measure_block_factor(model, proof.round) gives one",
        )
    of_one = [(p.round.preset, p.round.seq_len, p.header.digest, p.header.weights) for p in proofs]
    if len(set(of_one)) > 1:
        raise ProofMismatch(
            "proofs of " + " and ".join(sorted({f"{preset}, {length} positions" for preset, length, *_ in of_one})),
            wanted="proofs of one preset, length and checkpoint",
            do="measure them one by one",
        )
    inputs = Counter(
        (proof.round.block_hash, proof.round.public_key, record.nonce) for proof in proofs for record in proof.records
    )
    for (block, *_), times in inputs.most_common(1):
        if times > 1:
            seen = f"a nonce of block {block} in two proofs"
            raise ProofMismatch(seen, wanted="every nonce once", do="leave one out")


def _dimension(proof: Proof, dimension: int | None) -> int:
    """Return the dimension in which the distances of a proof are measured."""
    pipeline = proof.header.pipeline
    known = pipeline.vector_size or (RANDOM_HEAD_ROWS if pipeline.head == "random" else None)
    if known is not None and dimension not in (None, known):
        seen = f"--dimension {dimension} with preset {pipeline.name}"
        raise UsageError(seen, wanted=f"its {known}", do="leave --dimension out")
    if (size := known or dimension) is None:
        raise UsageError(
            f"a proof of preset {pipeline.name}",
            wanted="the dimension of its output",
            do="pass --dimension: the vocabulary with the trained head, the hidden size without one",
        )
    return size


def compare_r_target(
    distances: Sequence[FloatArray],
    valid_rate: float,
    dimension: int,
    *,
    effective_dimension: float | None = None,
    factors: Sequence[BlockFactor] = (),
) -> MeasuredTarget:
    """Compare the quantile of the distances [N] of M blocks with the closed form.

    The interval has two parts. That of the nonces runs between the order statistics whose ranks are quantiles of the
    binomial count of N at the rate. That of the blocks runs between the quantiles of the mean factor. At each end, the
    squares of the two lengths are added (Zou and Donner 2008). The standard error of the nonces is √(p(1 − p)/N) over
    the density of the law. An infinite effective dimension means that blocks have no factor.
    """
    n = sum(map(len, distances))
    if n < MIN_NONCES or not 0.0 < valid_rate < 1.0:
        raise UsageError(
            f"{n} nonces for a valid rate of {valid_rate}",
            wanted=f"at least {MIN_NONCES} nonces and a rate in (0, 1)",
            do="prove more nonces, for instance --nonces 0:1024, and give 0.1 for 10 %",
        )
    scales = [factor.value for factor in factors]
    brought = distances
    if scales:  # to the width of an average block
        cosines = [(1 - of_block**2 / 2) / factor for of_block, factor in zip(distances, scales, strict=True)]
        brought = [np.sqrt(2 - 2 * np.clip(of_block, -1, 1)) for of_block in cosines]
    ordered_N = np.sort(np.concatenate(brought))
    tail = (1 - CONFIDENCE) / 2
    ranks = np.asarray(distributions.binom.ppf([tail, 1 - tail], n, valid_rate), dtype=int)
    low, high = (float(end) for end in ordered_N[np.clip(ranks, 1, n) - 1])
    closed, measured = stats.r_target_for(valid_rate, dimension), float(np.quantile(ordered_N, valid_rate))
    effective, source, mean = _mean_factor(distances, dimension, effective_dimension, factors)
    block_low, block_high = mean.target_interval(closed, CONFIDENCE)
    error = rate_standard_error(valid_rate, n) / float(stats.chord_pdf(closed, dimension))
    of_blocks = abs(1 - closed**2 / 2) * mean.factor_error / closed  # a cosine c is at the distance √(2 − 2c)
    return MeasuredTarget(
        valid_rate=valid_rate,
        dimension=dimension,
        r_target=closed,
        measured=measured,
        low=measured - math.hypot(measured - low, closed - block_low),
        high=measured + math.hypot(high - measured, block_high - closed),
        confidence=CONFIDENCE,
        n=n,
        off_in_standard_errors=(measured - closed) / math.hypot(error, of_blocks),
        blocks=len(distances),
        effective_dimension=effective,
        effective_dimension_from=source,
        widths=tuple(_width(of_block, dimension) for of_block in distances),
        factors=tuple(scales),
    )


def _mean_factor(
    distances: Sequence[FloatArray], dimension: int, given: float | None, factors: Sequence[BlockFactor]
) -> tuple[float | None, str, BlockLaw]:
    """Return the effective dimension ν, its source, and the law of the mean factor of the blocks.

    The mean of M factors with weights w has the variance Σ w²/(2ν). Where ν is measured from M blocks, the quantile of
    Student's t with M − 1 degrees of freedom replaces the normal one.
    """
    weights_M = np.array([len(of_block) for of_block in distances], dtype=np.float64)
    weights_M /= weights_M.sum()
    squares = float(weights_M @ weights_M)
    if given is not None and math.isinf(given):
        return None, "none", BlockLaw(dimension=dimension, freedom=math.inf)
    if factors:
        errors_M = np.array([factor.error / factor.value for factor in factors])
        freedom = _freedom(float(weights_M**2 @ errors_M**2))
        effective: float = float(np.mean([factor.effective_dimension for factor in factors]))
        return effective, "model", BlockLaw(dimension=dimension, freedom=freedom)
    if given is not None:
        return given, "given", BlockLaw(dimension=dimension, freedom=given / squares)
    if len(distances) < MIN_BLOCKS:
        raise UsageError(
            f"the distances of {len(distances)} block(s), and no effective dimension of the model's states",
            wanted=f"what says how blocks differ, or {MIN_BLOCKS} blocks",
            do="pass --model, or the --calibration that `assay poc calibrate --model M` wrote",
        )
    logs_M = np.log([_width(of_block, dimension) for of_block in distances])
    sampling = float(np.mean([1 / (2 * len(of_block)) for of_block in distances]))
    variance = max(float(logs_M.var(ddof=1)) - sampling, 0.0)
    tail = (1 - CONFIDENCE) / 2
    wider = float(distributions.t.isf(tail, len(distances) - 1) / distributions.norm.isf(tail))
    effective_dimension = _freedom(variance) if variance else None
    return effective_dimension, "blocks", BlockLaw(dimension=dimension, freedom=_freedom(variance * squares * wider**2))


def _freedom(variance: float) -> float:
    """Return ν of a factor with this relative variance, 1/(2ν)."""
    return 1 / (2 * variance) if variance > 0 else math.inf


def _width(distances_N: FloatArray, dimension: int) -> float:
    """Return the standard deviation of cosines about zero over that of the law, 1/√d."""
    return math.sqrt(float(np.mean((1 - distances_N**2 / 2) ** 2)) * dimension)


def distances_to_target(values: npt.NDArray[np.floating[Any]], round: Round) -> FloatArray:
    """Return distances [N] as they are, and of vectors [N, K] the distance of each to the round's target in R^K."""
    if values.ndim == 1:
        return values.astype(np.float64)
    unit_NK = values.astype(np.float64)
    unit_NK /= np.linalg.norm(unit_NK, axis=1, keepdims=True)
    target_K = block_target(round, values.shape[1]).numpy().astype(np.float64)
    return np.asarray(np.linalg.norm(unit_NK - target_K, axis=1))


def target_for(
    rate: float,
    paths: Sequence[Path] = (),
    *,
    dimension: int | None = None,
    calibration: Path | None = None,
    model: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the r_target of a rate of valid nonces, in closed form, and with proofs what they measure beside it.

    The closed form holds over blocks. Where 95 % of the blocks have their own rate is only said of a model whose states
    were measured: by the ``calibration`` of the preset, or now by the ``model``. The dimensions are those of
    :func:`measure_r_target`, by default that of the random head.

    Raises:
        UsageError: A value is out of range, two of them exclude each other, or nothing says how blocks differ.
        ProofMismatch: The proofs do not belong together, or are not of the model.
    """
    if model is not None and calibration is not None:
        raise UsageError("--model with --calibration", wanted="one of the two", do="leave one of them out")
    known = None if calibration is None else _effective_dimension(calibration)
    if paths:
        proofs = [Proof.load(path) for path in paths]
        factors = [] if model is None else _factors(model, device, proofs)
        return measure_r_target(proofs, rate, dimension=dimension, effective_dimension=known, factors=factors).as_dict()
    size = RANDOM_HEAD_ROWS if dimension is None else dimension
    r_target = stats.r_target_for(rate, size)
    values: dict[str, Any] = {"valid_rate": rate, "dimension": size, "r_target": r_target}
    if model is not None:
        round = Round(block_hash="calibration", public_key="calibration")
        known = measure_block_factor(load_model(model, device=device), round).effective_dimension
    if size != RANDOM_HEAD_ROWS or known is None:
        return values
    low, high = BlockLaw(dimension=size, freedom=known).rate_interval(r_target)
    return values | {"effective_dimension": known, "block_rate_low": low, "block_rate_high": high}


def _effective_dimension(path: Path) -> float:
    """Return the effective dimension that a calibration file has."""
    measured = [build.effective_dimension for build in Calibration.load(path).builds]
    known = next((one for one in measured if one is not None), None)
    if known is None:
        raise UsageError(
            f"{path}, which has no effective dimension",
            wanted="a calibration of a model's own states, for a preset with signs and a random head",
            do="write one with `assay poc calibrate --model M`",
        )
    return known


def _factors(reference: str, device: str | None, proofs: Sequence[Proof]) -> list[BlockFactor]:
    """Measure the factor of every proof's block with the model."""
    model = load_model(reference, device=device)
    other = [p.header for p in proofs if (p.header.digest, p.header.weights) != (model.digest, model.weights)]
    if other:
        raise ProofMismatch(
            f"a proof of checkpoint {other[0].digest[:12]} ({other[0].weights} weights)",
            wanted=f"proofs of {model.reference}, {model.digest[:12]} ({model.weights} weights)",
            do="pass their model with --model, or leave it out",
        )
    blocks = {proof.round.block_hash: proof.round for proof in proofs}
    measured = {block: measure_block_factor(model, round) for block, round in blocks.items()}
    return [measured[proof.round.block_hash] for proof in proofs]


def measure(paths: Sequence[Path], *, model: str | None = None, progress: Progress | None = None) -> Calibration:
    """Return the honest noise of proof files, by :func:`assay.poc.calibrate`; the model says its size."""
    info = None if model is None else model_info(model)
    return calibrate(
        *map(Proof.load, paths),
        hidden_size=None if info is None else info.hidden_size,
        progress=progress,
    )


def describe(build: BuildNoise) -> dict[str, Any]:
    """Return what a person asks of a measured build, by name."""
    engines = [fingerprint.as_dict() for fingerprint in build.engines]
    stated = {name: dict.fromkeys(str(one[name]) for one in engines) for name in (engines or [{}])[0]}
    other = [f"{name} {' / '.join(found)}" for name, found in stated.items() if len(found) > 1]
    values: dict[str, Any] = {"preset": build.preset, "checkpoint": build.digest, "output": build.output}
    values |= {"formats": ", ".join(dict.fromkeys(" / ".join(pair) for pair in build.formats)) or None}
    values |= {"machines": len(build.machines), "law": str(build.law)}
    values |= {"typical_residual": build.noise.sizes.typical, "between_machines": build.spread.sd, "n": build.n}
    values |= {"hidden_size": build.hidden_size or None, "effect": build.effect}
    values |= {"effective_dimension": build.effective_dimension}
    values["engines_differ_in"] = ", ".join(other) or "nothing"
    values |= {"control": build.control and f"{build.control.dtype} beside {build.control.of}"}
    if (left := build.left_out) is not None:
        values |= {"left_out_accused": left.accused, "left_out_interval": [left.low, left.high]}
        values |= {"left_out_worst_pair": left.worst, "left_out_audits": left.pairs * left.audits}
    return values
