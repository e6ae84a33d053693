"""The measurement of honest noise from proofs of several machines.

The size of the noise between two machines i and j of one build is s_ij, the median of their residuals. All pairs share
one shape, which is fitted to all of them together. The size predicted for a new machine and a validator's machine j is

    usual_j = median over kinds k of median over machines i of kind k of s_ij.

Machines of one kind may agree far more closely than others. So the validator's own kind is left out where another kind
was measured. If machines of the new machine's kind were measured and are noisier than usual_j, their size is taken
instead. If they were quieter, it is not: that promises nothing.

The spread is the root mean square of ln(size/predicted) over machines that were left out of the measurement and lay
above their prediction. Deviations downwards do not count, because only larger noise can accuse. A few machines say
little about the spread, so it is combined with the prior :data:`PRIOR`.

Legend of shapes: M machines, N nonces.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np

from assay import stats
from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.proof import Fingerprint, Proof
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration import (
    FEWEST_MACHINES,
    MIN_NONCES,
    MIXTURE_DOF,
    BuildNoise,
    Calibration,
    LeftOut,
    Machine,
    MachineNoise,
    Pair,
    Sizes,
    describe_machines,
)
from assay.poc.verdict.judge import residuals
from assay.poc.verdict.noise import FloatArray, Noise, fit_noise, sequential_test
from assay.stats.noise import NoiseFit, Spread

Fit = Callable[[FloatArray], NoiseFit[stats.ScaleNoise] | NoiseFit[stats.LogNoise]]
Progress = Callable[[int, int], None]

PRIOR = Spread(sd=0.03, dof=30.0)
"""Spread of ln size between machines of one build that is assumed before any was measured.

It was chosen on sets of two quantised mixtures (docs/networks.md). Machines that were left out lay above their
prediction by .02 in the root mean square for one mixture, and by up to .07 for the other.
"""

PAIR_SPREAD = 0.02
"""Spread of ln size of one pair of machines between blocks, added to the error of its measurement."""

AUDITS = 200  # of every left-out machine against every other one
AUDITED = 300  # nonces of such an audit, or all where fewer were measured
EFFECTS = (1.25, 1.5, 2.0, 3.0, 4.0)
_WIDEST = 0.9  # spread: beyond it nothing is known

BLOCK_SPREAD = 0.07
"""Spread of ln size of distances between blocks, where the law does not know the block's own scale."""

SCALED_SPREAD = 0.03
"""That spread where the law is relative to the length of the block's folded head (block_scale.json)."""

Residuals = Mapping[Pair, FloatArray]


def calibrate(
    *proofs: Proof,
    hidden_size: int | None = None,
    mixture: bool | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the noise of a build between the machines of honest proofs.

    Proofs of the same round are compared nonce by nonce. Every machine needs a round in common with another one. Two
    machines give the noise between these two. Three or more give a law that also predicts the noise of a machine that
    was not measured: see the head of this module. Its effect is the smallest at which honest machines that
    were left out of the measurement are not accused.

    Args:
        proofs: Honest proofs of one checkpoint and preset, one of every machine and round.
        hidden_size: Hidden size of the model, which makes a law of distances relative to the scale of each block;
            without it the law is wider.
        mixture: Whether the model is a mixture of experts. A law of its distances has at most 2.5 degrees of freedom,
            because few nonces of a block ask other experts. It should rest on 1024 distances or more.
        progress: Function that is called with (machines left out, machines in all).

    Returns:
        The calibration.

    Raises:
        ProofMismatch: The proofs are of other checkpoints or presets, or have fewer than 30 nonces in common.
        UsageError: The preset decodes.

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
    return Calibration(builds=(replace(build, digest=first.digest, hidden_size=size, mixture=mixture),))


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
    for a, b in combinations(range(len(proofs)), 2):
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


def fit_machines(
    residuals: Residuals, kinds: Sequence[str], fit: Fit, *, between_blocks: float = PAIR_SPREAD
) -> MachineNoise:
    """Fit the noise of a build to the residuals of pairs of machines.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine; empty where it is unknown.
        fit: Function that fits a law to residuals.
        between_blocks: Spread of ln size of one pair between blocks.
    """
    size = {pair: float(np.median(np.abs(errors_N))) for pair, errors_N in residuals.items()}
    some = {pair: value for pair, value in size.items() if value > 0}
    if not some:  # machines that agree to the bit
        law = fit(np.concatenate(list(residuals.values()))).reached
        return MachineNoise(law, Sizes(dict.fromkeys(size, law.size), tuple(kinds)), PRIOR, PRIOR)
    sizes = Sizes(some, tuple(kinds))
    pooled_N = np.concatenate([residuals[pair] * (sizes.typical / value) for pair, value in some.items()])
    found = fit(pooled_N)
    fewest = min(residuals[pair].size for pair in some)
    error = found.error * math.sqrt(pooled_N.size / fewest)  # of the size of one pair
    deviations = sizes.deviations()
    upwards = deviations[deviations > 0]
    machines = len({i for pair in some for i in pair})
    squares = (machines - 1) * float(np.mean(upwards**2)) if upwards.size else 0.0
    dof = PRIOR.dof + machines - 1
    known = min(math.hypot(error, between_blocks), _WIDEST)
    new = min(math.hypot(math.sqrt((PRIOR.dof * PRIOR.sd**2 + squares) / dof), known), _WIDEST)
    return MachineNoise(found.reached, sizes, Spread(new, dof), Spread(known, PRIOR.dof))


def leave_out(
    residuals: Residuals,
    kinds: Sequence[str],
    fit: Fit,
    *,
    effects: Sequence[float] = EFFECTS,
    audits: int = AUDITS,
    between_blocks: float = PAIR_SPREAD,
    progress: Progress | None = None,
) -> tuple[float | None, LeftOut | None]:
    """Return the smallest effect at which machines left out are not accused, and how often they are accused then.

    Every machine is left out once. Its audits against every other machine draw nonces without replacement, and are
    judged by the law that the other machines give. If no effect is large enough, the last one is returned. With fewer
    than three machines both values are None.

    Args:
        residuals: Residuals [N] of pairs (i, j) with i < j.
        kinds: Kind of every machine.
        fit: Function that fits a law to residuals.
        effects: Multiples of the noise that may count as another computation, in ascending order.
        audits: Number of audits of every ordered pair.
        between_blocks: Spread of ln size of one pair between blocks.
        progress: Function that is called with (machines done, machines in all) for every effect.
    """
    if len(kinds) < FEWEST_MACHINES:
        return None, None
    checked = min(AUDITED, *(errors_N.size for errors_N in residuals.values()))
    for effect in effects:
        rng = np.random.default_rng(0)
        shares: list[float] = []
        left: list[int] = []
        for machine in range(len(kinds)):
            rest = {pair: errors_N for pair, errors_N in residuals.items() if machine not in pair}
            mine = {pair: errors_N for pair, errors_N in residuals.items() if machine in pair and errors_N.any()}
            if rest and mine:
                noise = fit_machines(rest, kinds, fit, between_blocks=between_blocks)
            for pair, errors_N in mine.items() if rest else ():
                law = noise.predict_law(kinds[machine], pair[0] if pair[1] == machine else pair[1])
                test = sequential_test(Noise(law, "left out", noise.spread, effect))
                drawn = [rng.permutation(errors_N)[:checked] for _ in range(audits)]
                shares.append(float(test.accusations(np.stack(drawn))[:, -1].mean()))
                left.append(machine)
            if progress:
                progress(machine + 1, len(kinds))
        if not shares:
            return None, None
        low, high = stats.grouped_share_interval(shares, left)
        left_out = LeftOut(
            accused=float(np.mean(shares)),
            low=low,
            high=high,
            worst=max(shares),
            pairs=len(shares),
            audits=audits,
            checked=checked,
        )
        if left_out.holds:
            break
    return effect, left_out
