"""The honest noise of one build, as it was measured between machines, and what it may judge.

Legend of shapes: N nonces, M machines, K published numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import CalibrationError
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.record import Fingerprint, Header
from assay.poc.protocol.round import Round
from assay.poc.verdict.machines import FEWEST_MACHINES, PAIR_SPREAD, LeftOut, MachineNoise
from assay.poc.verdict.noise import Law, Noise
from assay.stats.fits import fit_log_noise, fit_scale_noise
from assay.stats.noise import Spread

MIN_NONCES = 30  # that two machines have in common
ENOUGH_OF_MIXTURE = 1024
"""Distances of a mixture that a law should rest on: of 256, a block may have none that asks other experts."""

VECTOR_STEP = 2.0**-11  # of a float16 between one half and one
MIXTURE_DOF = 2.5
"""Most degrees of freedom of a law of distances of a mixture, for which its block may show too light a tail.

It is what the distances of many blocks of a small Qwen3-MoE choose, judged on Mixtral and on a mixture that was not
measured before (benchmarks/mixture_wider.py), and where the audit has as many nonces as the law (mixture_audits.py).
"""

LAWS: dict[str, type[Law]] = {
    "distance": stats.ScaleNoise,
    "position distance": stats.ScaleNoise,
    "vector": stats.LogNoise,
    "position vector": stats.LogNoise,
    "tokens": stats.LogNoise,
    "few tokens": stats.LogNoise,
}
_MEASURED = {"dtype", "seq_len"}  # fields whose value must have been measured
_UNSAID = "measure it again with `assay poc calibrate A.jsonl B.jsonl`"
_OTHER = "measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that was measured.

    Args:
        name: Name in tables; the identity of its engine where nothing else is known.
        kind: Kind of machine, such as its GPU; empty where it is not known.
        fingerprint: Description of its engine; None for vectors that were published without one.
    """

    name: str
    kind: str = ""
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, kw_only=True)
class BuildNoise:
    """Honest noise of one build, preset and checkpoint.

    A field of the fingerprint in which all measured machines agree belongs to the build, and a proof must agree in it
    too. One in which they differ belongs to the machine, and may have any value; but the number format must be that of
    a measured machine. Two machines do not show how machines differ, so with two only these are judged.

    Args:
        output: Family of noise that was compared: :attr:`assay.poc.Pipeline.noise`.
        preset: Preset of the proofs; None in files of the first version.
        digest: SHA-256 of the tensors of the checkpoint; None in files of the first version, which did not record it,
            and for vectors without a model.
        machines: Machines that were measured.
        noise: Law at the typical size, sizes by pair of machines, and spreads.
        n: Nonces of the pair that has the fewest in common.
        hidden_size: Hidden size of the model where the law is relative to the block's own scale; 0 where it is not.
        effect: Smallest multiple of the noise that counts as another computation; the usual one when None.
        left_out: How often honest machines were accused that the law does not know; None with fewer than three.
        named: Laws of known cheats by name.
        mixture: Whether the model is a mixture of experts; None where the measurement was not told.
    """

    output: str
    preset: str | None
    digest: str | None
    machines: tuple[Machine, ...]
    noise: MachineNoise
    n: int
    hidden_size: int = 0
    effect: float | None = None
    left_out: LeftOut | None = None
    named: Mapping[str, Law] = field(default_factory=dict)
    mixture: bool | None = None

    def caution(self, *, mixture: bool = False) -> str:
        """Return what to say of a law of distances of a mixture that may accuse an honest node; of others nothing.

        Args:
            mixture: Whether the model is a mixture, for a measurement that was not told.
        """
        law = self.noise.law
        if not (self.mixture or mixture) or not isinstance(law, stats.ScaleNoise):
            return ""
        if self.is_few:
            seen, todo = f"rests on {self.n} distances of a mixture of experts", f"on {ENOUGH_OF_MIXTURE} or more"
        elif law.dof > MIXTURE_DOF:
            seen, todo = f"of a mixture of experts has a tail of {law.dof:g} degrees of freedom", "again with --model"
        else:
            return ""
        return f"the law {seen} and may accuse an honest node: calibrate {todo}"

    @property
    def is_few(self) -> bool:
        """Whether these are fewer nonces than a law of distances of a mixture should rest on."""
        return self.n < ENOUGH_OF_MIXTURE

    @property
    def known(self) -> list[Fingerprint]:
        """The fingerprints of the measured machines."""
        return [machine.fingerprint for machine in self.machines if machine.fingerprint is not None]

    def judges(self, prover: Fingerprint) -> list[Fingerprint]:
        """Return the fingerprints of the measured machines that may judge a prover: of a pair, the other one."""
        if not 0 < len(self.known) < FEWEST_MACHINES:
            return self.known
        one, two = self.known
        return [two if prover == one else one]

    def check(self, header: Header) -> None:
        """Refuse a proof of another model or preset, or by another build, than this was measured with.

        Raises:
            CalibrationError: Names what differs.
        """
        if self.digest is None or self.preset is None:
            raise CalibrationError(
                "a calibration that does not say of which model and preset it is",
                wanted="one made by this version: the noise of one model gives cheaters on a quieter one room",
                do=_UNSAID,
            )
        stated = {"preset": header.pipeline.name, "checkpoint": header.digest[:12], "output": header.pipeline.noise}
        measured = {"preset": self.preset, "checkpoint": self.digest[:12], "output": self.output}
        refuse_difference(measured, stated, "than the proof's")
        self.check_engine(header.fingerprint, "than the prover's")

    def check_engine(self, engine: Fingerprint, than: str) -> None:
        """Refuse an engine of another build.

        Raises:
            CalibrationError: Names the fields in which it differs from the nearest measured one.
        """
        if not self.known:
            return
        wanted, measured = engine.as_dict(), [known.as_dict() for known in self.known]
        of_machine: set[str] = set()
        if len(measured) >= FEWEST_MACHINES:
            of_machine = {name for name in wanted if len({str(one[name]) for one in measured}) > 1} - _MEASURED
        differing = [
            {name: value for name, value in one.items() if value != wanted[name] and name not in of_machine}
            for one in measured
        ]
        nearest = min(differing, key=len)
        refuse_difference(nearest, {name: wanted[name] for name in nearest}, than)

    def between(
        self,
        prover: Fingerprint | None,
        validator: Fingerprint | None,
        *,
        round: Round | None = None,
        mixture: bool = False,
    ) -> Noise:
        """Return the noise between a prover's machine and a validator's.

        Args:
            prover: Description of the prover's engine; None for any machine of the build.
            validator: Description of the validator's engine; None for any.
            round: Round whose block scales a law that is relative to it.
            mixture: Whether the model is a mixture of experts, for a measurement that was not told.
        """
        row, mine = self._row(validator), self._row(prover)
        kind = _kind(prover) if prover is not None else ""
        law = self.noise.law_of(kind, row)
        measured = row is not None and mine is not None and len(self.machines) < FEWEST_MACHINES
        spread, source = self.noise.known if measured else self.noise.spread, self.source
        if caution := self.caution(mixture=mixture):
            source += f" of a mixture, fewer than {ENOUGH_OF_MIXTURE}" if self.is_few else " of a mixture"
        noise = Noise(law, source, spread, self.effect, self.named, caution)
        if self.hidden_size and round is not None:
            return noise.scaled(block_scale(round, self.hidden_size))
        return noise

    @property
    def source(self) -> str:
        """Where the law comes from, in words."""
        if len(self.machines) < FEWEST_MACHINES:
            return f"calibration on {self.n} nonces"
        return f"calibration on {self.n} nonces of {len(self.machines)} machines"

    def _row(self, engine: Fingerprint | None) -> int | None:
        if engine is None:
            return None
        same = [i for i, machine in enumerate(self.machines) if machine.fingerprint == engine]
        alike = [i for i, machine in enumerate(self.machines) if machine.kind and machine.kind == _kind(engine)]
        return next(iter(same + alike), None)


def refuse_difference(measured: Mapping[str, Any], stated: Mapping[str, Any], than: str) -> None:
    """Refuse values that differ from what was measured.

    Raises:
        CalibrationError: Names them.
    """
    other = [name for name in measured if measured[name] != stated[name]]
    if other:
        raise CalibrationError(
            f"a calibration with another {' and '.join(other)} {than}: " + ", ".join(str(measured[n]) for n in other),
            wanted=", ".join(f"{name} {stated[name]}" for name in other),
            do=_OTHER,
        )


def fit_noise(
    pipeline: Pipeline, errors: npt.NDArray[np.float64], *, most_dof: float = math.inf
) -> "stats.NoiseFit[stats.ScaleNoise] | stats.NoiseFit[stats.LogNoise]":
    """Fit the law of honest residuals [N] of a pipeline, that of distances with at most so many degrees of freedom."""
    if pipeline.output != "distance":
        # Rounded to float16, equal vectors may differ by a step. The published law came before that was measured.
        floor = 1e-4 if pipeline.read == "last" and pipeline.output == "vector" else VECTOR_STEP
        return fit_log_noise(errors, dimension=pipeline.output_size(0, 0), floor=floor)
    found = fit_scale_noise(errors)
    return found if found.reached.dof <= most_dof else fit_scale_noise(errors, dof=most_dof)


def fitted_noise(pipeline: Pipeline, errors: npt.NDArray[np.float64], source: str) -> Noise:
    """Return the noise that was measured on honest residuals [N] of one pair of engines, with the error of its size."""
    fit = fit_noise(pipeline, errors)
    return Noise(fit.reached, source, Spread(min(float(np.hypot(fit.error, PAIR_SPREAD)), 0.99)))


def machines_of(fingerprints: Sequence[Fingerprint]) -> tuple[Machine, ...]:
    """Return the machines with these engines."""
    return tuple(Machine(name=one.id, kind=_kind(one), fingerprint=one) for one in fingerprints)


def _kind(engine: Fingerprint) -> str:
    return f"{engine.device}, {engine.dtype}"
