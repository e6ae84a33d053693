"""Measurements from proofs: the noise law of a build, and the r_target of a valid rate.

The closed form of an r_target is the quantile of the chord law, and holds over blocks. Within one
block all cosines are wider or narrower by one factor γ (:class:`assay.stats.BlockLaw`). So a
quantile measured in few blocks is off by more than the number of its nonces says. The interval adds
both: the spread of γ, which follows from the effective dimension of the model's states, and the
order statistics of the nonces.

Legend of shapes: N nonces, K published numbers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from assay import stats
from assay.errors import ProofMismatch, UsageError
from assay.models.load import load_model
from assay.poc.engines.hf.block_factor import measure_block_factor
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import block_target
from assay.poc.verdict.build_noise import BuildNoise
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.honest_noise import Law, law_as_dict
from assay.stats.chord import RANDOM_HEAD_ROWS, BlockLaw, FloatArray

MIN_NONCES = 30  # of all blocks together, for quantiles
CONFIDENCE = 0.95  # of the interval of a quantile


@dataclass(frozen=True, kw_only=True)
class MeasuredTarget:
    """A measured r_target, compared with the closed form.

    Args:
        valid_rate: Wanted share of valid nonces.
        dimension: Dimension of the space in which the distance is measured.
        r_target: Closed form, by the chord law, which holds over blocks.
        measured: Quantile of the measured distances.
        low: Lower end of the 95 % interval of the quantile over blocks.
        high: Upper end of that interval.
        n: Number of nonces measured.
        blocks: Number of blocks measured.
        effective_dimension: Effective dimension of the states, from which the spread of blocks
            follows; None where they do not differ.
    """

    valid_rate: float
    dimension: int
    r_target: float
    measured: float
    low: float
    high: float
    n: int
    blocks: int
    effective_dimension: float | None

    @property
    def agrees(self) -> bool:
        """Whether the closed form lies in the interval of the measured one."""
        return self.low <= self.r_target <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**vars(self), "agrees": self.agrees}


def measure_r_target(
    proofs: Proof | Sequence[Proof],
    valid_rate: float,
    *,
    dimension: int | None = None,
    effective_dimension: float | None = None,
) -> MeasuredTarget:
    """Measure the r_target of a valid rate from the nonces of proofs.

    The interval is that of the quantile over blocks: one block says little of others.

    Args:
        proofs: Proof of any preset, or several of one preset and checkpoint. A vector counts with
            its distance to the target of the block in R^K.
        valid_rate: Wanted share of valid nonces, in (0, 1).
        dimension: Dimension of the output; needed where the preset has no random head and publishes
            distances.
        effective_dimension: Effective dimension of the states, as a calibration has it or
            :func:`assay.poc.measure_block_factor` measures it; needed where the preset publishes
            distances.

    Returns:
        The measured target with its interval, and the closed form.

    Raises:
        UsageError: A rate or dimension is out of range or missing, or there are fewer than 30
            nonces.
        ProofMismatch: The proofs are of several presets, checkpoints or lengths.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> proof = assay.poc.prove(model, round, range(64))
        >>> states = assay.poc.measure_block_factor(model, round)
        >>> dimension = states.effective_dimension
        >>> found = assay.poc.measure_r_target(proof, 0.5, effective_dimension=dimension)
        >>> found.n, found.dimension, round.r_target - 0.05 < found.r_target < round.r_target
        (64, 8192, True)
        >>> 20 < found.effective_dimension < 60, found.low < found.measured < found.high
        (True, True)
    """
    proof_list = (proofs,) if isinstance(proofs, Proof) else tuple(proofs)
    _refuse_different(proof_list)
    size = _dimension(proof_list[0], dimension)
    is_vector = proof_list[0].header.pipeline.output == "vector"
    if effective_dimension is None and not is_vector:
        raise UsageError(
            "distances, but no effective dimension of their model",
            wanted="the model's effective dimension",
            do="pass --model, or the --calibration that `assay poc calibrate --model M` wrote",
        )
    per_block: dict[str, list[FloatArray]] = {}
    for proof in proof_list:
        vectors = [record.vector for record in proof.records if record.vector is not None]
        values = np.array(vectors) if vectors else proof.distances
        per_block.setdefault(proof.round.block_hash, []).append(
            distances_to_target(values, proof.round)
        )
    distances = [np.concatenate(of_block) for of_block in per_block.values()]
    return compare_r_target(distances, valid_rate, size, None if is_vector else effective_dimension)


def _refuse_different(proofs: Sequence[Proof]) -> None:
    """Refuse no proof, and proofs that cannot be taken together."""
    if not proofs:
        raise UsageError("no proof", wanted="one or more", do="pass honest proofs of the model")
    of_one = [(p.round.preset, p.round.seq_len, p.header.digest, p.header.weights) for p in proofs]
    if len(set(of_one)) > 1:
        raise ProofMismatch(
            "proofs of "
            + " and ".join(
                sorted({f"{preset}, {length} positions" for preset, length, *_ in of_one})
            ),
            wanted="proofs of one preset, length and checkpoint",
            do="measure them one by one",
        )
    inputs = Counter(
        (proof.round.block_hash, proof.round.public_key, record.nonce)
        for proof in proofs
        for record in proof.records
    )
    for (block, *_), times in inputs.most_common(1):
        if times > 1:
            raise ProofMismatch(
                f"a nonce of block {block} in two proofs",
                wanted="every nonce once",
                do="leave one out",
            )


def _dimension(proof: Proof, dimension: int | None) -> int:
    """Return the dimension in which the distances of a proof are measured."""
    pipeline = proof.header.pipeline
    fixed = pipeline.vector_size or (RANDOM_HEAD_ROWS if pipeline.head == "random" else None)
    if fixed is not None and dimension not in (None, fixed):
        raise UsageError(
            f"--dimension {dimension} with preset {pipeline.name}",
            wanted=f"its {fixed}",
            do="leave --dimension out",
        )
    if (size := fixed or dimension) is None:
        raise UsageError(
            f"a proof of preset {pipeline.name}",
            wanted="the dimension of its output",
            do="pass --dimension: the vocabulary with the trained head, the hidden size without "
            "one",
        )
    return size


def compare_r_target(
    distances: Sequence[FloatArray],
    valid_rate: float,
    dimension: int,
    effective_dimension: float | None,
) -> MeasuredTarget:
    """Compare the quantile of the distances of blocks with the closed form.

    The interval has two parts. That of the nonces runs between the order statistics whose ranks are
    quantiles of the binomial count of N at the rate, the upper one plus one; before the first and
    behind the last nonce it ends at 0 and 2. That of the blocks runs between the quantiles of their
    mean factor, whose relative variance is Σ w²/(2ν) for weights w and the effective dimension ν.
    At each end, the squares of the two lengths are added (Zou and Donner 2008).
    """
    counts = np.array([len(of_block) for of_block in distances], dtype=np.float64)
    n = int(counts.sum())
    if n < MIN_NONCES or not 0.0 < valid_rate < 1.0:
        raise UsageError(
            f"{n} nonces for a valid rate of {valid_rate}",
            wanted=f"at least {MIN_NONCES} nonces and a rate in (0, 1)",
            do="prove more nonces, for instance --nonces 0:1024, and give 0.1 for 10 %",
        )
    ordered_N = np.sort(np.concatenate(distances))
    if missing := np.count_nonzero(np.isnan(ordered_N)):
        raise UsageError(
            f"{missing} of {n} nonces without a distance to the target",
            wanted="distances, or vectors that are not zero",
            do="pass honest proofs of a preset that publishes one of the two",
        )
    tail = (1 - CONFIDENCE) / 2
    ranks = np.array([0, 1]) + np.asarray(
        scipy.stats.binom.ppf([tail, 1 - tail], n, valid_rate), dtype=int
    )
    # With so many nonces below the target, the next one is the first above it.
    low, high = np.array([0.0, *ordered_N, 2.0])[ranks].tolist()
    closed = stats.r_target_for(valid_rate, dimension)
    measured = float(np.quantile(ordered_N, valid_rate))
    freedom = (
        math.inf
        if effective_dimension is None
        else effective_dimension * n**2 / float(counts @ counts)
    )
    block_low, block_high = BlockLaw(dimension=dimension, freedom=freedom).target_interval(
        closed, CONFIDENCE
    )
    return MeasuredTarget(
        valid_rate=valid_rate,
        dimension=dimension,
        r_target=closed,
        measured=measured,
        low=measured - math.hypot(measured - low, closed - block_low),
        high=measured + math.hypot(high - measured, block_high - closed),
        n=n,
        blocks=len(distances),
        effective_dimension=effective_dimension,
    )


def distances_to_target(values: npt.NDArray[np.floating[Any]], round: Round) -> FloatArray:
    """Return distances [N], or for vectors [N, K] their distances to the round's target."""
    if values.ndim == 1:
        return values.astype(np.float64)
    unit_NK = values.astype(np.float64)
    # A vector of zeros has no direction, and NaN for its distance.
    with np.errstate(invalid="ignore"):
        unit_NK /= np.linalg.norm(unit_NK, axis=1, keepdims=True)
    target_K = block_target(round, values.shape[1]).numpy().astype(np.float64)
    return np.asarray(np.linalg.norm(unit_NK - target_K, axis=1))


def target_for(
    rate: float,
    proofs: Sequence[Proof] = (),
    *,
    dimension: int | None = None,
    calibration: Path | None = None,
    model: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the r_target of a valid rate in closed form, and the measured one with proofs.

    The closed form holds over blocks. Where 95 % of the blocks have their own rate is only said of
    a model whose states were measured: by the ``calibration`` of the preset, or now by the
    ``model``. The dimensions are those of :func:`measure_r_target`, by default that of the random
    head.

    Raises:
        UsageError: A value is out of range, two of them exclude each other, or nothing says how
            blocks differ.
        ProofMismatch: The proofs do not belong together, or are not of the model.
    """
    if model is not None and calibration is not None:
        raise UsageError(
            "--model with --calibration", wanted="one of the two", do="leave one of them out"
        )
    effective = None if calibration is None else _effective_dimension(calibration, proofs)
    if model is not None:
        effective = _measured_dimension(model, device, proofs)
    if proofs:
        return measure_r_target(
            proofs, rate, dimension=dimension, effective_dimension=effective
        ).as_dict()
    size = RANDOM_HEAD_ROWS if dimension is None else dimension
    r_target = stats.r_target_for(rate, size)
    values: dict[str, Any] = {"valid_rate": rate, "dimension": size, "r_target": r_target}
    if size != RANDOM_HEAD_ROWS or effective is None:
        return values
    low, high = BlockLaw(dimension=size, freedom=effective).rate_interval(r_target)
    return values | {
        "effective_dimension": effective,
        "block_rate_low": low,
        "block_rate_high": high,
    }


def _effective_dimension(path: Path, proofs: Sequence[Proof]) -> float:
    """Return the effective dimension that a calibration file has, of the checkpoint of proofs where
    there are some.
    """
    digests = {proof.header.digest for proof in proofs}
    # Of two builds of one checkpoint the first has priority, so it comes last here.
    measured = {
        build.digest: build.effective_dimension
        for build in reversed(Calibration.load(path).builds)
        if build.effective_dimension is not None and (not digests or build.digest in digests)
    }
    if len(measured) != 1:
        of_proofs = " of these proofs" * bool(proofs)
        raise UsageError(
            f"{path}, which has the effective dimension of {len(measured)} checkpoints{of_proofs}",
            wanted="that of one, from a calibration of a model's own states, for a preset with "
            "signs and a random head",
            do="write one with `assay poc calibrate --model M`",
        )
    return measured.popitem()[1]


def _measured_dimension(reference: str, device: str | None, proofs: Sequence[Proof]) -> float:
    """Measure the effective dimension of a model's states, for the round of the proofs where there
    are some.
    """
    model = load_model(reference, device=device)
    foreign = [
        p.header
        for p in proofs
        if (p.header.digest, p.header.weights) != (model.digest, model.weights)
    ]
    if foreign:
        raise ProofMismatch(
            f"a proof of checkpoint {foreign[0].digest[:12]} ({foreign[0].weights} weights)",
            wanted=f"proofs of {model.reference}, {model.digest[:12]} ({model.weights} weights)",
            do="pass their model with --model, or leave it out",
        )
    round = proofs[0].round if proofs else Round(block_hash="calibration", public_key="calibration")
    return measure_block_factor(model, round).effective_dimension


def _in_words(law: Law) -> str:
    """Return the parameters of a law, each with three digits."""
    values = law_as_dict(law)
    numbers = [f"{name} {value:.3g}" for name, value in values.items() if name != "kind"]
    return f"{values['kind']} noise: {', '.join(numbers)}"


def describe(build: BuildNoise) -> dict[str, Any]:
    """Return what a person asks of a measured build, by name."""
    engines = [fingerprint.as_dict() for fingerprint in build.engines]
    stated = {
        name: dict.fromkeys(str(engine[name]) for engine in engines)
        for name in (engines or [{}])[0]
    }
    differences = [
        f"{name} {' / '.join(variants)}" for name, variants in stated.items() if len(variants) > 1
    ]
    exclusion = build.left_out
    left_out: dict[str, Any] = {}
    if exclusion is not None:
        left_out = {
            "left_out_accused": exclusion.accused,
            "left_out_interval": [exclusion.low, exclusion.high],
            "left_out_worst_pair": exclusion.worst,
            "left_out_audits": exclusion.pairs * exclusion.audits,
            "left_out_says": f"{exclusion.accused:.1%} of audits accused an engine that was left "
            f"out; with {len(build.machines)} engines, up to {exclusion.high:.0%} of others may be "
            "accused",
        }
    return {
        "preset": build.preset,
        "checkpoint": build.digest,
        "output": build.output,
        "formats": ", ".join(dict.fromkeys(" / ".join(pair) for pair in build.formats)) or None,
        "machines": len(build.machines),
        "law": _in_words(build.law),
        "typical_residual": build.sizes.typical,
        "between_machines": build.spread.sd,
        "n": build.n,
        "hidden_size": build.hidden_size or None,
        "effect": build.effect,
        "effective_dimension": build.effective_dimension,
        "engines_differ_in": ", ".join(differences) or "nothing",
        "control": build.control
        and f"{' and '.join(build.control.dtypes)} beside {build.control.of}",
        **left_out,
        "limits": build.limits,
    }
