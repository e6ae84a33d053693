"""The measurement of honest noise: from proofs of several machines, or from vectors that a network published.

Legend of shapes: N nonces, M machines, K published numbers.
"""

import base64
import binascii
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

from assay import stats
from assay.errors import DataError, ProofMismatch, UsageError
from assay.files.jsonl import JsonObject, loads, read_lines, read_whole
from assay.poc.protocol.blocks import BlockFactor, block_scale
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.record import VectorRecord
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import block_target
from assay.poc.verdict.builds import MIN_NONCES, MIXTURE_DOF, BuildNoise, Machine, fit_noise, machines_of
from assay.poc.verdict.calibration import Calibration
from assay.poc.verdict.judge import residuals
from assay.poc.verdict.machines import PAIR_SPREAD, effect_from_power, fit_machines, pairs_of
from assay.poc.verdict.noise import Law, check_names
from assay.stats.blocks import EFFECTIVE_DIMENSION, BlockLaw
from assay.stats.chord import RANDOM_HEAD_ROWS, rate_standard_error

# --------------------------------------------------------------------------------------------------
# The r_target of a wanted valid rate, measured from proofs beside the closed form.
#
# The closed form holds over blocks. Within a block all distances are wider or narrower by one factor γ
# (:class:`assay.stats.BlockLaw`), so a quantile that was measured in few blocks is off by more than its nonces say. The
# interval adds both: what γ leaves open, and the order statistics of the nonces.
#
# Legend of shapes: M blocks, N nonces, K published numbers.

MIN_TARGET_NONCES = 30  # of all blocks together, for quantiles
MIN_BLOCKS = 8  # from which their own spread is taken, and no longer an assumption
CONFIDENCE = 0.95  # of the interval of a quantile

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MeasuredTarget:
    """A measured r_target beside the closed form.

    Args:
        valid_rate: Wanted share of valid nonces.
        dimension: Dimension of the space in which the distance is measured.
        r_target: Closed form, by the chord law: what holds over blocks.
        measured: Quantile of the measured distances, those of each block brought to the width of an average one where
            its factor is known.
        low: Lower end of the interval of the quantile over blocks.
        high: Upper end of that interval.
        confidence: Confidence of the interval.
        n: Number of nonces measured.
        off_in_standard_errors: Measured minus closed form, over the standard error of the nonces and the blocks.
        blocks: Number of blocks measured.
        effective_dimension: Effective dimension of the states, which says how far factors of blocks lie apart; None
            where they do not.
        effective_dimension_from: Source of it: ``assumed``, ``given``, the ``blocks`` or the ``model``; else ``none``.
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
        lists = {"widths": list(self.widths), "factors": list(self.factors)}
        return {**self.__dict__, **lists, "agrees": self.agrees}


def measure_r_target(
    proofs: Proof | Sequence[Proof],
    valid_rate: float,
    *,
    dimension: int | None = None,
    effective_dimension: float | None = None,
    factors: Sequence[BlockFactor] = (),
) -> MeasuredTarget:
    """Measure the r_target of a valid rate from the nonces of proofs.

    The interval is that of the quantile over blocks. One block says little of others, unless ``factors`` tell how wide
    its distances are; from eight blocks on, their own spread counts.

    Args:
        proofs: Proof of any preset, or several of one preset and checkpoint; of a vector, its distance to the target of
            the block in R^K counts.
        valid_rate: Wanted share of valid nonces, in (0, 1).
        dimension: Dimension of the output; needed where the preset has no random head and publishes distances.
        effective_dimension: Effective dimension of the states; 16 is assumed where neither it nor anything else says.
        factors: What :func:`assay.poc.measure_block_factor` found for the block of each proof, in their order.

    Returns:
        The measured target with its interval, beside the closed form.

    Raises:
        UsageError: A rate or dimension is out of range or missing, there are fewer than 30 nonces, or there is not one
            factor per proof.
        ProofMismatch: The proofs are of several presets, checkpoints or lengths.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> found = assay.poc.measure_r_target(assay.poc.prove(model, round, range(64)), 0.5)
        >>> found.n, found.dimension, round.r_target - 0.05 < found.r_target < round.r_target
        (64, 8192, True)
        >>> found.effective_dimension, found.effective_dimension_from
        (16.0, 'assumed')
    """
    given = (proofs,) if isinstance(proofs, Proof) else tuple(proofs)
    _check_alike(given, factors)
    size = _dimension(given[0], dimension)
    per_block: dict[str, list[FloatArray]] = {}
    for proof in given:
        vectors = [record.vector for record in proof.records if isinstance(record, VectorRecord)]
        values = np.array(vectors) if vectors else proof.distances
        per_block.setdefault(proof.round.block_hash, []).append(distances_from(values, proof.round))
    known = {proof.round.block_hash: factor for proof, factor in zip(given, factors, strict=bool(factors))}
    return r_target_from(
        [np.concatenate(of_block) for of_block in per_block.values()],
        valid_rate,
        size,
        effective_dimension=math.inf if given[0].header.pipeline.output == "vector" else effective_dimension,
        factors=list(known.values()),
    )


def _check_alike(proofs: Sequence[Proof], factors: Sequence[BlockFactor]) -> None:
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
    inputs: dict[tuple[str, str], list[npt.NDArray[np.int64]]] = {}
    for proof in proofs:
        nonces_N = np.array([record.nonce for record in proof.records], dtype=np.int64)
        inputs.setdefault((proof.round.block_hash, proof.round.public_key), []).append(nonces_N)
    for (block, _), nonces in inputs.items():
        if len(nonces) > 1 and len(np.unique(np.concatenate(nonces))) < sum(map(len, nonces)):
            raise ProofMismatch(
                f"a nonce of block {block} in two proofs", wanted="every nonce once", do="leave one out"
            )


def _dimension(proof: Proof, dimension: int | None) -> int:
    """Return the dimension in which the distances of a proof are measured."""
    pipeline = proof.header.pipeline
    known = pipeline.vector_size or (RANDOM_HEAD_ROWS if pipeline.head == "random" else None)
    if known is not None and dimension not in (None, known):
        seen = f"--dimension {dimension} with preset {pipeline.name}"
        raise UsageError(seen, wanted=f"its {known}", do="leave --dimension out")
    size = known or dimension
    if size is None:
        raise UsageError(
            f"a proof of preset {pipeline.name}",
            wanted="the dimension of its output",
            do="pass --dimension: the vocabulary with the trained head, the hidden size without one",
        )
    return size


def r_target_from(
    distances: Sequence[FloatArray],
    valid_rate: float,
    dimension: int,
    *,
    effective_dimension: float | None = None,
    factors: Sequence[BlockFactor] = (),
) -> MeasuredTarget:
    """Compare the quantile of the distances [N] of M blocks with the closed form.

    The nonces' part of the interval runs between the order statistics whose ranks hold a binomial count of N and the
    rate with the stated confidence; the blocks' part, between the quantiles of the mean factor. Their lengths are added
    by their squares, end by end (Zou and Donner 2008). The standard error of the nonces is √(p(1 − p)/N) over the
    density of the law.

    Args:
        distances: Distances of every block, M arrays [N].
        valid_rate: Wanted share of valid nonces.
        dimension: Dimension of the chord law.
        effective_dimension: Effective dimension of the states; infinity where blocks have no factor.
        factors: Factors of the blocks, in their order, or none.

    Raises:
        UsageError: There are fewer than 30 distances, or the rate is not in (0, 1).
    """
    n = sum(map(len, distances))
    if n < MIN_TARGET_NONCES or not 0.0 < valid_rate < 1.0:
        raise UsageError(
            f"{n} nonces for a valid rate of {valid_rate}",
            wanted=f"at least {MIN_NONCES} nonces and a rate in (0, 1)",
            do="prove more nonces, for instance --nonces 0:1024, and give 0.1 for 10 %",
        )
    scales = [factor.value for factor in factors]
    brought = [_narrowed(*pair) for pair in zip(distances, scales, strict=True)] if scales else distances
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
    """Return the effective dimension, its source, and the law of what the mean factor of the blocks leaves open.

    A mean of M factors with weights w has the variance Σ w²/(2ν). Where ν is the spread of M measured blocks, the
    quantile of Student's t with M − 1 degrees of freedom stands in place of the normal one.
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
    if given is not None or len(distances) < MIN_BLOCKS:
        effective, source = (EFFECTIVE_DIMENSION, "assumed") if given is None else (given, "given")
        return effective, source, BlockLaw(dimension=dimension, freedom=effective / squares)
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


def _narrowed(distances_N: FloatArray, factor: float) -> FloatArray:
    """Return the distances of a block with its factor taken out."""
    cosines_N = (1 - distances_N**2 / 2) / factor
    return np.asarray(np.sqrt(2 - 2 * np.clip(cosines_N, -1, 1)))


def _width(distances_N: FloatArray, dimension: int) -> float:
    """Return the standard deviation of cosines about zero over that of the law, 1/√d."""
    return math.sqrt(float(np.mean((1 - distances_N**2 / 2) ** 2)) * dimension)


def distances_from(values: npt.NDArray[np.floating[Any]], round: Round) -> FloatArray:
    """Return distances [N] as they are, and of vectors [N, K] the distance of each to the round's target in R^K."""
    if values.ndim == 1:
        return values.astype(np.float64)
    unit_NK = values.astype(np.float64)
    unit_NK /= np.linalg.norm(unit_NK, axis=1, keepdims=True)
    target_K = block_target(round, values.shape[1]).numpy().astype(np.float64)
    return np.asarray(np.linalg.norm(unit_NK - target_K, axis=1))


# --------------------------------------------------------------------------------------------------
# Sets of nonce vectors as networks publish them, one JSON object a line, without a proof around them.
#
# A line has ``set``, ``block_hash``, ``public_key``, ``seq_len``, ``k_dim``, ``nonces`` and ``vectors`` (base64 of
# little-endian float16, K numbers each), and may have ``config`` with ``model``, ``gpu`` and ``batch_size``. Files may be
# compressed with gzip. A file may be hostile, so every size is bounded before anything is read or made.
#
# Legend of shapes: N nonces, K published numbers.

LARGEST_FILE = 2**28  # bytes, as it is stored
LARGEST_CONTENT = 2**29  # bytes, without gzip
LONGEST_LINE = 2**26
MOST_SETS, MOST_NONCES, MOST_NUMBERS = 4096, 2**20, 4096  # in a file, in a set, in a vector
LARGEST_NONCE, LARGEST_SEQ_LEN, LARGEST_BATCH = 2**63 - 1, 2**31 - 1, 2**20
LONGEST_NAME = 256

_KIND = re.compile(r"(?:^|[^a-z0-9]|\dx)((?:gb|gh|[abhlv])\d{1,3}s?|mi\d{3}x?|gaudi ?\d)(?![a-z0-9])")
_RTX = re.compile(r"rtx[ _-]?(pro|a)?[ _-]?(\d{4})")


@dataclass(frozen=True, kw_only=True)
class VectorSet:
    """Vectors of one machine as networks publish them, without a proof around them.

    Args:
        name: Name of the set.
        kind: Kind of machine, such as its GPU; empty where it is not known.
        block_hash: Block that seeded them.
        public_key: Key of the node.
        seq_len: Number of positions of a nonce.
        vectors: Vector [K] of every nonce, in the order in which they were computed.
        model: Name of the model; empty where it is not known.
        batch_size: Number of nonces of a batch; None where it is not known.
    """

    name: str
    kind: str
    block_hash: str
    public_key: str
    seq_len: int
    vectors: Mapping[int, npt.NDArray[np.float64]] = field(repr=False)
    model: str = ""
    batch_size: int | None = None

    @property
    def round(self) -> tuple[Any, ...]:
        """What two sets must share to be compared."""
        return self.block_hash, self.public_key, self.seq_len, len(next(iter(self.vectors.values())))

    def common(self, other: "VectorSet") -> list[int]:
        """Return the nonces that both have, in ascending order."""
        return sorted(self.vectors.keys() & other.vectors.keys())

    def distances(self, other: "VectorSet") -> npt.NDArray[np.float64]:
        """Return the L2 distances [N] of the nonces that both have, in ascending order of the nonces."""
        common = self.common(other)
        mine, theirs = (np.array([one.vectors[n] for n in common]) for one in (self, other))
        return np.asarray(np.linalg.norm(mine - theirs, axis=1)) if common else np.zeros(0)

    def positions(self, nonces: list[int]) -> npt.NDArray[np.int64]:
        """Return the index of every nonce [N] in the order in which this set was computed."""
        places = {nonce: index for index, nonce in enumerate(self.vectors)}
        return np.array([places[nonce] for nonce in nonces], dtype=np.int64)


def read_vector_sets(path: str | Path) -> list[VectorSet]:
    """Read a file of sets, strictly.

    Args:
        path: JSON Lines, or gzip of them.

    Raises:
        DataError: The file cannot be read, is too large, or a line is not a set; names the line.
    """
    found: list[VectorSet] = []
    for number, line in _lines(Path(path)):
        where = f"{path}, line {number}"
        if len(found) >= MOST_SETS:
            raise _bad(where, f"more than {MOST_SETS} sets", "fewer")
        found.append(_vector_set(loads(line, where), where))
        if found[-1].name in {one.name for one in found[:-1]}:
            raise _bad(where, f"set {found[-1].name!r} twice", "every name once")
    if not found:
        raise _bad(str(path), "no set", "one set a line")
    return found


def machine_kind(gpu: str) -> str:
    """Return the kind of a machine by the name of its GPU or of its set, such as ``h200``; empty where none is known.

    Example:
        >>> [machine_kind(name) for name in ("NVIDIA H100 80GB HBM3", "4xa100_sxm4", "RTX PRO 6000 Blackwell")]
        ['h100', 'a100', 'rtxpro6000']
    """
    words = gpu.lower()
    if rtx := _RTX.search(words):
        return "rtx" + "".join(part or "" for part in rtx.groups())
    known = _KIND.search(words)
    return known[1].replace(" ", "") if known else ""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, gzip undone."""
    if path.suffix != ".gz":
        left = LARGEST_CONTENT
        for number, line in read_lines(path):
            left -= len(line)
            if left < 0:
                raise _bad(str(path), f"longer than {LARGEST_CONTENT} bytes", "a smaller file")
            yield number, line
        return
    unpacked = zlib.decompressobj(wbits=31)
    try:
        text = unpacked.decompress(read_whole(path, LARGEST_FILE), LARGEST_CONTENT + 1)
    except zlib.error as error:
        raise _bad(str(path), f"no gzip ({error})", "JSON Lines in one gzip stream") from None
    if len(text) > LARGEST_CONTENT:
        raise _bad(str(path), f"longer than {LARGEST_CONTENT} bytes when unpacked", "a smaller file")
    if not unpacked.eof or unpacked.unused_data:
        raise _bad(str(path), "gzip that is cut off, or has something after it", "JSON Lines in one gzip stream")
    for number, line in enumerate(io.BytesIO(text), 1):  # one at a time: a list of all takes many times their size
        if len(line) > LONGEST_LINE:
            raise _bad(f"{path}, line {number}", f"longer than {LONGEST_LINE} bytes", "shorter lines")
        yield number, line


def _vector_set(row: JsonObject, where: str) -> VectorSet:
    config = row.get("config") or {}
    if not isinstance(config, dict):
        raise _bad(where, "a config that is no object", "an object with model, gpu and batch_size, or nothing")
    name = _text(row, "set", where)
    batch = config.get("batch_size")
    size = _whole(row.get("k_dim"), "k_dim", 2, MOST_NUMBERS, where)
    return VectorSet(
        name=name,
        kind=machine_kind(_text(config, "gpu", where, "")) or machine_kind(name),
        block_hash=_text(row, "block_hash", where),
        public_key=_text(row, "public_key", where),
        seq_len=_whole(row.get("seq_len"), "seq_len", 1, LARGEST_SEQ_LEN, where),
        vectors=_vectors(row.get("nonces"), row.get("vectors"), size, where),
        model=_text(config, "model", where, ""),
        batch_size=None if batch is None else _whole(batch, "batch_size", 1, LARGEST_BATCH, where),
    )


def _vectors(nonces: Any, texts: Any, size: int, where: str) -> dict[int, npt.NDArray[np.float64]]:
    """Return the vectors [K] by nonce."""
    if not isinstance(nonces, list) or not isinstance(texts, list) or len(nonces) != len(texts):
        raise _bad(where, "nonces and vectors that are not two lists of one length", "one vector per nonce")
    if not 1 <= len(nonces) <= MOST_NONCES:
        raise _bad(where, f"{len(nonces)} nonces", f"1 to {MOST_NONCES}")
    for nonce in nonces:
        _whole(nonce, "nonce", 0, LARGEST_NONCE, where)
    if len(set(nonces)) < len(nonces):
        raise _bad(where, "a nonce twice", "every nonce once")
    length = 4 * math.ceil(2 * size / 3)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or len(text) != length:
            raise _bad(where, f"vector {index} of another length", f"{length} characters, {size} float16 in base64")
    try:
        raw = b"".join(base64.b64decode(text, validate=True) for text in texts)
    except (binascii.Error, ValueError):
        raise _bad(where, "a vector that is not base64", f"base64 of {size} float16") from None
    if len(raw) != 2 * size * len(texts):
        raise _bad(where, "a vector of another length", f"base64 of {size} float16")
    values_NK = np.frombuffer(raw, "<f2").reshape(-1, size).astype(np.float64)
    odd = np.flatnonzero(~np.isfinite(values_NK).all(axis=1))
    if odd.size:
        raise _bad(where, f"a vector of nonce {nonces[odd[0]]} that is not finite", "finite numbers")
    return dict(zip(nonces, values_NK, strict=True))


def _text(row: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if (
        not isinstance(value, str)
        or len(value) > LONGEST_NAME
        or not (value.isprintable() and (value or default == ""))
    ):
        raise _bad(where, f"{name} {value!r:.60}", f"a text of at most {LONGEST_NAME} printable characters")
    return value


def _whole(value: Any, name: str, low: int, high: int, where: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _bad(where, f"{name} {value!r:.60}", f"a whole number from {low} to {high}")
    return value


def _bad(where: str, seen: str, wanted: str) -> DataError:
    return DataError(
        f"{where}: {seen}",
        wanted=wanted,
        do="pass a file of sets: set, config, block_hash, public_key, seq_len, k_dim, nonces, vectors",
    )


BLOCK_SPREAD = 0.07
"""Spread of ln size of distances between blocks, where the law does not know the block's own scale."""

SCALED_SPREAD = 0.03
"""What is left of it where the law is relative to the length of the block's folded head (block_scale.json)."""

Progress = Callable[[int, int], None]
Residuals = dict[tuple[int, int], npt.NDArray[np.float64]]


def calibrate(
    *proofs: Proof,
    hidden_size: int | None = None,
    mixture: bool | None = None,
    against: Mapping[str, Proof] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the noise of a build between the machines of honest proofs.

    Proofs of the same round are compared nonce by nonce, those of different rounds are not; every machine needs a round
    in common with another one. Two machines give the noise between these two. Three and more give a law that also
    predicts the noise of a machine that was not measured: see :mod:`assay.poc.verdict.machines`. Its effect is the
    smallest at which honest machines that were left out of the measurement are not accused.

    Args:
        proofs: Honest proofs of one checkpoint and preset, one of every machine and round.
        hidden_size: Hidden size of the model, which makes a law of distances relative to the scale of each block;
            without it the law is wider.
        mixture: Whether the model is a mixture of experts. A law of its distances has at most 2.5 degrees of freedom,
            as a block has few nonces that ask other experts, or none. Of a law of fewer than 1024 the file and every
            verdict say so.
        against: Proofs of known cheats by name, of a round that an honest proof is of, such as another quantisation.
            An honest verdict must exclude each.
        progress: Function that is called with (machines left out, machines in all).

    Returns:
        The calibration.

    Raises:
        ProofMismatch: The proofs are of other checkpoints or presets, or have fewer than 30 nonces in common.
        UsageError: The preset decodes, a cheat's proof is of another one, or a name cannot be one.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> first = assay.poc.prove(model, round, range(32), batch_size=32)
        >>> second = assay.poc.prove(model, round, range(32), batch_size=16)
        >>> build = assay.poc.calibrate(first, second).builds[0]
        >>> build.n, build.preset, [machine.fingerprint.batch_size for machine in build.machines]
        (32, 'poc-2.0', [32, 16])
    """
    check_names(list(against or {}))
    if len(proofs) < 2:
        raise ProofMismatch(
            f"{len(proofs)} proof to calibrate with", wanted="two or more", do="prove the same round on another machine"
        )
    first = proofs[0].header
    if len({(proof.header.digest, proof.header.weights, proof.round.preset) for proof in proofs}) > 1:
        raise ProofMismatch(
            "proofs of different rounds or checkpoints",
            wanted="honest proofs of one checkpoint and preset",
            do="calibrate every checkpoint and preset by itself; --merge puts them into one file",
        )
    if first.pipeline.steps:
        raise UsageError(
            f"proofs of {first.round.preset}, whose tokens part after the first that differs",
            wanted="proofs of a preset whose values are compared nonce by nonce",
            do="judge them by the default law; benchmarks/decode_noise.py measures one by replaying honest proofs",
        )
    rows, fingerprints = _rows(proofs)
    measured = _between(proofs, rows, hidden_size)
    pipeline = first.pipeline
    size = hidden_size if hidden_size and pipeline.head == "random" else 0
    between_blocks = SCALED_SPREAD if size else BLOCK_SPREAD
    build = _build(
        measured,
        machines_of(fingerprints),
        pipeline,
        between_blocks=between_blocks if pipeline.output == "distance" else PAIR_SPREAD,
        mixture=bool(mixture),
        progress=progress,
    )
    named = {name: _law_of_cheat(cheat, proofs, pipeline, hidden_size) for name, cheat in (against or {}).items()}
    return Calibration(builds=(replace(build, digest=first.digest, hidden_size=size, named=named, mixture=mixture),))


def calibrate_vectors(
    sets: Sequence[VectorSet],
    *,
    digest: str | None = None,
    against: Mapping[str, Sequence[VectorSet]] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the noise of a build from sets of vectors that honest machines published.

    Args:
        sets: Vectors of the preset ``artifact``, one set of every machine.
        digest: SHA-256 of the checkpoint, which the sets do not say; a law without one judges no proof.
        against: Sets of known cheats by name.
        progress: Function that is called with (machines left out, machines in all).

    Raises:
        ProofMismatch: Fewer than two sets are of one round, or they have fewer than 30 nonces in common.
        UsageError: The name of a cheat cannot be one.
    """
    check_names(list(against or {}))
    measured: Residuals = {
        (i, j): sets[i].distances(sets[j]) for i, j in pairs_of(len(sets)) if sets[i].round == sets[j].round
    }
    _check(measured, len(sets))
    pipeline = get_pipeline("artifact")
    machines = tuple(Machine(name=one.name, kind=one.kind) for one in sets)
    build = _build(measured, machines, pipeline, between_blocks=PAIR_SPREAD, progress=progress)
    named: dict[str, Law] = {}
    for name, cheats in (against or {}).items():
        errors = [cheat.distances(one) for cheat in cheats for one in sets if one.round == cheat.round]
        if sum(part.size for part in errors) < MIN_NONCES:
            raise ProofMismatch(
                f"vectors of the cheat {name} of another round", wanted="the round of an honest set", do="choose others"
            )
        named[name] = fit_noise(pipeline, np.concatenate(errors)).reached
    return Calibration(builds=(replace(build, digest=digest, named=named),))


def _rows(proofs: Sequence[Proof]) -> tuple[list[int], list[Any]]:
    """Return the machine of every proof, and the fingerprints of the machines.

    A machine is an engine. Two proofs of one round are of two machines, even if their engines are described alike.
    """
    fingerprints: list[Any] = []
    rows: list[int] = []
    taken: set[tuple[int, Any]] = set()
    for proof in proofs:
        alike = [i for i, known in enumerate(fingerprints) if known == proof.header.fingerprint]
        free = [i for i in alike if (i, proof.round) not in taken]
        if not free:
            fingerprints.append(proof.header.fingerprint)
            free = [len(fingerprints) - 1]
        rows.append(free[0])
        taken.add((free[0], proof.round))
    return rows, fingerprints


def _between(proofs: Sequence[Proof], rows: Sequence[int], hidden_size: int | None) -> Residuals:
    """Return the residuals of pairs of machines over all rounds that they share, over the scale of each block."""
    found: dict[tuple[int, int], list[npt.NDArray[np.float64]]] = {}
    for a, b in pairs_of(len(proofs)):
        one, other = proofs[a], proofs[b]
        if one.round == other.round:
            first, second = (a, b) if rows[a] < rows[b] else (b, a)
            errors = _residuals(proofs[first], proofs[second], hidden_size)
            found.setdefault((rows[first], rows[second]), []).append(errors)
    measured = {pair: np.concatenate(parts) for pair, parts in found.items()}
    _check(measured, max(rows) + 1)
    return measured


def _residuals(one: Proof, other: Proof, hidden_size: int | None) -> npt.NDArray[np.float64]:
    theirs = {record.nonce: record for record in other.records}
    common = [record for record in one.records if record.nonce in theirs]
    errors = residuals(common, [theirs[record.nonce] for record in common])
    return errors / block_scale(one.round, hidden_size) if hidden_size else errors


def _check(measured: Residuals, machines: int) -> None:
    """Refuse machines that share too few nonces with any other one."""
    fewest = min((errors.size for errors in measured.values()), default=0)
    compared = {i for pair in measured for i in pair}
    if fewest < MIN_NONCES or len(compared) < machines:
        raise ProofMismatch(
            f"proofs with {fewest} nonces in common" if measured else "proofs of different rounds or checkpoints",
            wanted=f"proofs of one round and checkpoint, with at least {MIN_NONCES} nonces in common",
            do="prove the same round on all engines, for instance --nonces 0:256",
        )


def _build(
    measured: Residuals,
    machines: tuple[Machine, ...],
    pipeline: Pipeline,
    *,
    between_blocks: float,
    progress: Progress | None,
    mixture: bool = False,
) -> BuildNoise:
    n = min(errors.size for errors in measured.values())
    fit = partial(fit_noise, pipeline, most_dof=MIXTURE_DOF if mixture else math.inf)
    kinds = [machine.kind for machine in machines]
    effect, left_out = effect_from_power(measured, kinds, fit, between_blocks=between_blocks, progress=progress)
    return BuildNoise(
        output=pipeline.noise,
        preset=pipeline.name,
        digest=None,
        machines=machines,
        noise=fit_machines(measured, kinds, fit, between_blocks=between_blocks),
        n=n,
        effect=effect,
        left_out=left_out,
    )


def _law_of_cheat(cheat: Proof, proofs: Sequence[Proof], pipeline: Pipeline, hidden_size: int | None) -> Law:
    """Return the law of a cheat's residuals against the honest proofs of its round."""
    if cheat.round.preset != pipeline.name:
        raise UsageError(
            f"a cheat's proof of {cheat.round.preset}", wanted=f"one of {pipeline.name}", do="prove it with --preset"
        )
    rounds = [proof for proof in proofs if proof.round.with_model("") == cheat.round.with_model("")]
    errors = [_residuals(proof, cheat, hidden_size) for proof in rounds]
    sizes = [part.size for part in errors]
    if not errors or min(sizes) < MIN_NONCES:
        raise ProofMismatch(
            f"a cheat's proof with {min(sizes, default=0)} nonces in common with the honest ones",
            wanted=f"at least {MIN_NONCES}, of the same round",
            do="prove the cheat on the round of the honest proofs",
        )
    return fit_noise(pipeline, np.concatenate(errors)).reached
