"""The measurement of honest noise: from proofs of several machines, or from vectors that a network published.

Legend of shapes: N nonces, M machines, K published numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol import Pipeline, Proof, block_scale, get_pipeline
from assay.poc.verdict._build_noise import (
    MIN_NONCES,
    MIXTURE_DOF,
    BuildNoise,
    Machine,
    fit_noise,
    machines_of,
)
from assay.poc.verdict._calibration import Calibration
from assay.poc.verdict._judge import residuals
from assay.poc.verdict._machines import PAIR_SPREAD, effect_from_power, fit_machines, pairs_of
from assay.poc.verdict._noise import Law, check_names
from assay.poc.verdict._vector_sets import VectorSet

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
    predicts the noise of a machine that was not measured: see :mod:`assay.poc.verdict._machines`. Its effect is the
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
