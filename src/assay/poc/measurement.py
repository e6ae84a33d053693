"""Calibrations from proof files: the honest noise of a build, or the r_target of a wanted rate of valid nonces."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assay import stats
from assay.errors import ProofMismatch, UsageError
from assay.models.load import load_model, model_info
from assay.poc.engines.hf.engine import measure_block_factor
from assay.poc.protocol.blocks import BlockFactor
from assay.poc.protocol.proof import Proof
from assay.poc.prover import Progress
from assay.poc.verdict.calibrate import calibrate
from assay.poc.verdict.calibration import ENOUGH_OF_MIXTURE, BuildNoise, Calibration
from assay.poc.verdict.r_target import measure_r_target
from assay.stats.blocks import EFFECTIVE_DIMENSION
from assay.stats.chord import RANDOM_HEAD_ROWS


def target_for(
    rate: float,
    paths: Sequence[Path] = (),
    *,
    dimension: int | None = None,
    effective_dimension: float | None = None,
    model: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the r_target of a rate of valid nonces, in closed form, and with proofs what they measure beside it.

    Without proofs it is what holds over blocks and, with a random head, where 95 % of the blocks have their own rate.

    Args:
        rate: Share of valid nonces that is wanted, in (0, 1).
        paths: Proof files.
        dimension: Dimension of the output; that of the proofs, or of the random head, when None.
        effective_dimension: Effective dimension of the model's states; 16 is assumed when None, without a model.
        model: Model of the proofs, whose states say how wide the distances of their blocks are.
        device: Device of that model.

    Raises:
        UsageError: A value is out of range, or two of them exclude each other.
        ProofMismatch: The proofs do not belong together, or are not of the model.
    """
    if model is not None and effective_dimension is not None:
        raise UsageError("--model with --effective-dimension", wanted="one of the two", do="leave one of them out")
    if paths:
        proofs = [Proof.load(path) for path in paths]
        factors = [] if model is None else _factors(model, device, proofs)
        return measure_r_target(
            proofs, rate, dimension=dimension, effective_dimension=effective_dimension, factors=factors
        ).as_dict()
    size = RANDOM_HEAD_ROWS if dimension is None else dimension
    r_target = stats.r_target_for(rate, size)
    values: dict[str, Any] = {"valid_rate": rate, "dimension": size, "r_target": r_target}
    if size == RANDOM_HEAD_ROWS:
        freedom = EFFECTIVE_DIMENSION if effective_dimension is None else effective_dimension
        law = stats.BlockLaw(dimension=size, freedom=freedom)
        low, high = law.rate_interval(r_target)
        values |= {
            "effective_dimension": law.freedom,
            "effective_dimension_from": "assumed" if effective_dimension is None else "given",
            "block_rate_low": low,
            "block_rate_high": high,
        }
    return values


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


def measure(
    paths: Sequence[Path], against: Mapping[str, Path], *, model: str | None = None, progress: Progress | None = None
) -> Calibration:
    """Return the honest noise of the build of honest proofs.

    Args:
        paths: Honest proof files, two or more of every round.
        against: Proof files of known cheats by name, which an honest verdict must exclude.
        model: Model of the proofs; its hidden size makes laws relative to the scale of each block.
        progress: Function that is called with (machines left out, machines in all).

    Raises:
        ProofMismatch: The proofs do not belong together.
    """
    info = None if model is None else model_info(model)
    size, mixture = (None, None) if info is None else (info.hidden_size, info.experts > 0)
    cheats = {name: Proof.load(path) for name, path in against.items()}
    proofs = [Proof.load(path) for path in paths]
    return calibrate(*proofs, hidden_size=size, mixture=mixture, against=cheats, progress=progress)


def describe(build: BuildNoise) -> dict[str, Any]:
    """Return what a person asks of a measured build, by name."""
    engines = [fingerprint.as_dict() for fingerprint in build.engines]
    stated = {name: dict.fromkeys(str(one[name]) for one in engines) for name in (engines or [{}])[0]}
    other = [f"{name} {' / '.join(found)}" for name, found in stated.items() if len(found) > 1]
    values: dict[str, Any] = {
        "preset": build.preset,
        "checkpoint": build.digest,
        "output": build.output,
        "machines": len(build.machines),
        "law": str(build.law),
        "typical_residual": build.noise.sizes.typical,
        "between_machines": build.spread.sd,
        "n": build.n,
        "hidden_size": build.hidden_size or None,
        "effect": build.effect,
        "named": ", ".join(build.named) or "nothing",
        "engines_differ_in": ", ".join(other) or "nothing",
    }
    if caution := build.caution():
        values["warning"] = caution
    elif build.mixture is None and build.caution(mixture=True):
        values["advice"] = (
            f"for a mixture of experts, take {ENOUGH_OF_MIXTURE} nonces or more, and --model: another law may accuse it"
        )
    if (left_out := build.left_out) is not None:
        values["left_out_accused"] = left_out.accused
        values["left_out_interval"] = [left_out.low, left_out.high]
        values["left_out_worst_pair"] = left_out.worst
        values["left_out_audits"] = left_out.pairs * left_out.audits
    return values
