"""Calibrations from honest proofs of several machines."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import numpy as np

from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Round
from assay.poc.verdict.build_noise import MIN_NONCES, BuildNoise, Pair, describe_machines
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.control import Control
from assay.poc.verdict.machine_fit import Progress, Residuals, fit_build
from assay.poc.verdict.residuals import compare, residuals
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.chord import FloatArray

PairedProofs = Mapping[Pair, Sequence[tuple[Proof, Proof]]]
# Residuals between the node and each computation, and between the computations.
Sides = tuple[FloatArray, FloatArray]


def calibrate(
    *proofs: Proof,
    hidden_size: int | None = None,
    controls: Sequence[str] = (),
    progress: Progress | None = None,
) -> Calibration:
    """Measure the noise of a build between the machines of honest proofs.

    Proofs of the same round are compared nonce by nonce. Every machine needs a round in common with
    another one. Two machines give the noise between these two. Three or more give a law that also
    predicts the noise of a machine that was not measured: see the head of this module. Its effect
    is the smallest at which honest machines that were left out of the measurement are not accused.

    Args:
        proofs: Honest proofs of one checkpoint and preset, one of every machine and round.
        hidden_size: Hidden size of the model, which makes a law of distances relative to the scale
            of each block; without it the law is wider.
        controls: One or two number formats. Proofs in them are no machines, but what the machine
            with the same device computes again as a validator. They give a second law, of scores,
            for each two formats where that is a gain.
        progress: Function that is called with (machines left out, machines in all).

    Raises:
        ProofMismatch: The proofs are of other checkpoints or presets, or have fewer than 30 nonces
            in common.
        UsageError: The preset decodes, or no machine has proofs of the same rounds in all formats
            of the controls.

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
    proofs = tuple(
        replace(proof, header=replace(proof.header, round=proof.round.plain)) for proof in proofs
    )
    machines = [proof for proof in proofs if proof.header.fingerprint.dtype not in controls]
    if len(machines) < 2:
        raise ProofMismatch(
            f"{len(machines)} proof to calibrate with{' beside controls' * bool(controls)}",
            wanted="two or more",
            do="prove the same round on another machine",
        )
    first = proofs[0].header
    check_one_checkpoint(proofs)
    if first.pipeline.steps:
        raise UsageError(
            f"proofs of {first.round.preset}, whose tokens part after the first that differs",
            wanted="proofs of a preset whose values are compared nonce by nonce",
            do="judge them by the default law; research/results/decode_noise.json says how it was "
            "measured",
        )
    pairs, fingerprints = _pair_machines(machines)
    size = hidden_size if hidden_size and first.pipeline.head == "random" else 0
    scales = {
        proof.round: block_scale(proof.round, hidden_size) if hidden_size else 1.0
        for proof in machines
    }
    measured = {
        pair: np.concatenate(
            [
                residuals(*_in_common(first_proof, second_proof)) / scales[first_proof.round]
                for first_proof, second_proof in paired
            ]
        )
        for pair, paired in pairs.items()
    }
    check_compared(measured, len(fingerprints))
    fit = partial(
        fit_build, pipeline=first.pipeline, digest=first.digest, hidden_size=size, progress=progress
    )
    builds = [fit(measured, describe_machines(fingerprints))]
    if controls:
        engines = [(proof, proof.header.fingerprint) for proof in proofs]
        again = {
            (proof.round, engine.device, engine.dtype): proof
            for proof, engine in engines
            if engine.dtype in controls
        }
        builds += _fit_scores(
            _sides_of(pairs, again, controls, scales), fingerprints, controls, fit
        )
    for build in builds:
        # The test refuses noise that is as large as invented values.
        sequential_test(build.noise_between("", None))
    return Calibration(builds=tuple(builds))


def _pair_machines(proofs: Sequence[Proof]) -> tuple[PairedProofs, list[Fingerprint]]:
    """Return the proofs of the same round by pair of machines, which are engines, and their
    fingerprints.
    """
    machines: dict[tuple[Fingerprint, int], int] = {}
    rows = list[int]()
    proofs_of_engine = Counter[tuple[Fingerprint, Round]]()
    for proof in proofs:
        # Two proofs of one round are of two machines, even if their engines are described alike.
        engine = proof.header.fingerprint
        rows.append(
            machines.setdefault((engine, proofs_of_engine[engine, proof.round]), len(machines))
        )
        proofs_of_engine[engine, proof.round] += 1
    pairs: dict[Pair, list[tuple[Proof, Proof]]] = {}
    for a, b in combinations(range(len(proofs)), 2):
        if proofs[a].round == proofs[b].round:
            (i, first), (j, second) = sorted(
                [(rows[a], proofs[a]), (rows[b], proofs[b])], key=lambda pair: pair[0]
            )
            pairs.setdefault((i, j), []).append((first, second))
    return pairs, [engine for engine, _ in machines]


def _in_common(*proofs: Proof) -> list[list[Record]]:
    """Return the records of the nonces that all proofs have, of each of them."""
    records = [{record.nonce: record for record in proof.records} for proof in proofs]
    common = [nonce for nonce in records[0] if all(nonce in by_nonce for by_nonce in records)]
    return [[by_nonce[nonce] for nonce in common] for by_nonce in records]


def _sides_of(
    pairs: PairedProofs,
    again: Mapping[tuple[Round, str, str], Proof],
    controls: Sequence[str],
    scales: Mapping[Round, float],
) -> dict[Pair, Sides]:
    """Return residuals of nodes, [E, N], and between computations of validators, [P, N], by node
    and validator.
    """
    sides = {}
    for (i, j), paired in pairs.items():
        for pair, proofs in (((i, j), paired), ((j, i), [two[::-1] for two in paired])):
            parts = []
            for node, validator in proofs:
                # A control of another device would be further from the first computation than the
                # validator's own is.
                keys = [
                    (node.round, validator.header.fingerprint.device, name) for name in controls
                ]
                if all(key in again for key in keys):
                    received, *computed = _in_common(node, validator, *(again[key] for key in keys))
                    parts.append(
                        [side / scales[node.round] for side in compare(received, computed)]
                    )
            if sum(node_EN.shape[1] for node_EN, _ in parts) >= MIN_NONCES:
                sides[pair] = (
                    np.hstack([node_EN for node_EN, _ in parts]),
                    np.hstack([own_PN for _, own_PN in parts]),
                )
    return sides


def _fit_scores(
    sides_by_pair: Mapping[Pair, Sides],
    engines: Sequence[Fingerprint],
    controls: Sequence[str],
    fit: Callable[..., BuildNoise],
) -> Iterator[BuildNoise]:
    """Yield a law of scores for each two number formats, of nodes and of validators, for which a
    control is a gain.
    """
    if not sides_by_pair or len(controls) > 2:
        raise UsageError(
            f"controls in {' and '.join(controls)}, for "
            f"{'too many formats' if sides_by_pair else 'no machine'}",
            wanted=f"one or two, in which a device that validates has {MIN_NONCES} nonces of "
            f"another machine's round",
            do="prove these rounds again in these formats, on a machine that validates",
        )
    for formats in product(dict.fromkeys(engine.dtype for engine in engines), repeat=2):
        chosen: dict[Pair, Sides] = {}
        for pair, sides in sides_by_pair.items():
            if tuple(engines[row].dtype for row in pair) == formats:
                # A pair counts once, in the direction that came first.
                chosen.setdefault((min(pair), max(pair)), sides)
        control = Control.measured([*chosen.values()], of=formats[1], dtypes=controls)
        if control is not None:
            rows = sorted({row for pair in chosen for row in pair})
            scores = {
                (rows.index(i), rows.index(j)): control.scores(*sides)
                for (i, j), sides in chosen.items()
            }
            yield fit(scores, describe_machines([engines[row] for row in rows]), control=control)


def check_one_checkpoint(proofs: Sequence[Proof]) -> None:
    """Refuse proofs of several checkpoints or presets."""
    headers = [proof.header for proof in proofs]
    if (
        len(
            {
                (header.digest, header.weights, header.frame, header.pipeline.name)
                for header in headers
            }
        )
        > 1
    ):
        raise ProofMismatch(
            "proofs of different presets, checkpoints or frames",
            wanted="honest proofs of one checkpoint, frame and preset",
            do="calibrate every checkpoint and preset by itself; --merge puts them into one file",
        )


def check_compared(measured: Residuals, machines: int) -> None:
    """Refuse a pair with fewer than 30 nonces, or a machine without a pair."""
    fewest = min((errors.size for errors in measured.values()), default=0)
    compared = {i for pair in measured for i in pair}
    if fewest < MIN_NONCES or len(compared) < machines:
        seen = (
            f"proofs with {fewest} nonces in common"
            if measured
            else "proofs of different rounds or checkpoints"
        )
        raise ProofMismatch(
            seen,
            wanted=f"proofs of one round and checkpoint, with at least {MIN_NONCES} nonces in "
            f"common",
            do="prove the same round on all engines, for instance --nonces 0:256",
        )
