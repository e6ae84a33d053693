"""The measurement of honest noise from proofs of several machines.

Legend of shapes: M machines, N nonces.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.record import Fingerprint
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration import (
    MIN_NONCES,
    MIXTURE_DOF,
    BuildNoise,
    Calibration,
    Machine,
    describe_machines,
)
from assay.poc.verdict.judge import residuals
from assay.poc.verdict.machines import PAIR_SPREAD, Progress, all_pairs, fit_machines, leave_out
from assay.poc.verdict.noise import FloatArray, Law, check_cheat_names, fit_noise

BLOCK_SPREAD = 0.07
"""Spread of ln size of distances between blocks, where the law does not know the block's own scale."""

SCALED_SPREAD = 0.03
"""That spread where the law is relative to the length of the block's folded head (block_scale.json)."""

Residuals = dict[tuple[int, int], FloatArray]


def calibrate(
    *proofs: Proof,
    hidden_size: int | None = None,
    mixture: bool | None = None,
    against: Mapping[str, Proof] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the noise of a build between the machines of honest proofs.

    Proofs of the same round are compared nonce by nonce. Every machine needs a round in common with another one. Two
    machines give the noise between these two. Three or more give a law that also predicts the noise of a machine that
    was not measured: see :mod:`assay.poc.verdict.machines`. Its effect is the smallest at which honest machines that
    were left out of the measurement are not accused.

    Args:
        proofs: Honest proofs of one checkpoint and preset, one of every machine and round.
        hidden_size: Hidden size of the model, which makes a law of distances relative to the scale of each block;
            without it the law is wider.
        mixture: Whether the model is a mixture of experts. A law of its distances has at most 2.5 degrees of freedom,
            because few nonces of a block ask other experts. If it rests on fewer than 1024 distances, the file and
            every verdict say so.
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
    check_cheat_names(list(against or {}))
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
            do="judge them by the default law; research/results/decode_noise.json says how it was measured",
        )
    rows, fingerprints = _find_machines(proofs)
    pipeline = first.pipeline
    size = hidden_size if hidden_size and pipeline.head == "random" else 0
    between_blocks = PAIR_SPREAD
    if pipeline.output == "distance":
        between_blocks = SCALED_SPREAD if size else BLOCK_SPREAD
    build = fit_build(
        _compare_machines(proofs, rows, hidden_size),
        describe_machines(fingerprints),
        pipeline,
        between_blocks=between_blocks,
        mixture=bool(mixture),
        progress=progress,
    )
    named = {name: _law_of_cheat(cheat, proofs, pipeline, hidden_size) for name, cheat in (against or {}).items()}
    return Calibration(builds=(replace(build, digest=first.digest, hidden_size=size, named=named, mixture=mixture),))


def _find_machines(proofs: Sequence[Proof]) -> tuple[list[int], list[Fingerprint]]:
    """Return the machine of every proof, and the fingerprints of the machines.

    A machine is an engine. Two proofs of one round are of two machines, even if their engines are described alike.
    """
    fingerprints: list[Fingerprint] = []
    rows: list[int] = []
    taken: set[tuple[int, Round]] = set()
    for proof in proofs:
        alike = (i for i, known in enumerate(fingerprints) if known == proof.header.fingerprint)
        row = next((i for i in alike if (i, proof.round) not in taken), len(fingerprints))
        if row == len(fingerprints):
            fingerprints.append(proof.header.fingerprint)
        rows.append(row)
        taken.add((row, proof.round))
    return rows, fingerprints


def _compare_machines(proofs: Sequence[Proof], rows: Sequence[int], hidden_size: int | None) -> Residuals:
    """Return the residuals of pairs of machines over all rounds that they share, over the scale of each block."""
    found: dict[tuple[int, int], list[FloatArray]] = {}
    for a, b in all_pairs(len(proofs)):
        one, other = proofs[a], proofs[b]
        if one.round == other.round:
            first, second = (a, b) if rows[a] < rows[b] else (b, a)
            errors = _residuals(proofs[first], proofs[second], hidden_size)
            found.setdefault((rows[first], rows[second]), []).append(errors)
    measured = {pair: np.concatenate(parts) for pair, parts in found.items()}
    check_compared(measured, max(rows) + 1)
    return measured


def _residuals(one: Proof, other: Proof, hidden_size: int | None) -> FloatArray:
    theirs = {record.nonce: record for record in other.records}
    common = [record for record in one.records if record.nonce in theirs]
    errors = residuals(common, [theirs[record.nonce] for record in common])
    return errors / block_scale(one.round, hidden_size) if hidden_size else errors


def check_compared(measured: Residuals, machines: int) -> None:
    """Refuse residuals by pair where a pair has fewer than 30 nonces, or one of the machines is in no pair."""
    fewest = min((errors.size for errors in measured.values()), default=0)
    compared = {i for pair in measured for i in pair}
    if fewest < MIN_NONCES or len(compared) < machines:
        raise ProofMismatch(
            f"proofs with {fewest} nonces in common" if measured else "proofs of different rounds or checkpoints",
            wanted=f"proofs of one round and checkpoint, with at least {MIN_NONCES} nonces in common",
            do="prove the same round on all engines, for instance --nonces 0:256",
        )


def fit_build(
    measured: Residuals,
    machines: tuple[Machine, ...],
    pipeline: Pipeline,
    *,
    between_blocks: float,
    progress: Progress | None,
    mixture: bool = False,
) -> BuildNoise:
    """Fit the noise of a build to the residuals of its pairs, with ``between_blocks`` as in :func:`fit_machines`."""
    fit = partial(fit_noise, pipeline, most_dof=MIXTURE_DOF if mixture else math.inf)
    kinds = [machine.kind for machine in machines]
    effect, left_out = leave_out(measured, kinds, fit, between_blocks=between_blocks, progress=progress)
    noise = fit_machines(measured, kinds, fit, between_blocks=between_blocks)
    return BuildNoise(
        output=pipeline.noise,
        preset=pipeline.name,
        digest=None,
        machines=machines,
        law=noise.law,
        sizes=noise.sizes.pairs,
        spread=noise.spread,
        known=noise.known,
        n=min(errors.size for errors in measured.values()),
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
