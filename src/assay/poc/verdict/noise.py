"""Honest noise: a law of residuals, how well its scale is known, and the cheats that a verdict must exclude."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.files.jsonl import JsonObject, read_json
from assay.poc.protocol.pipelines import Pipeline
from assay.stats.fits import NoiseFit, fit_log_noise, fit_scale_noise
from assay.stats.noise import Spread

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]
Law = stats.NoiseLaw
"""Law of honest residuals."""

MARGIN = 2.0
"""Factor of the stated defaults over the measured noise, a margin for models and machines that were not measured."""

EFFECT = {"distance": 4.0, "vector": 2.0}
"""Smallest multiple of the honest noise that counts as another computation, where no measurement gives one.

A vector shows a multiple in twelve numbers at once, and cheaper models come closer to it, so half is enough.
"""

DEFAULT_LAWS = Path(__file__).with_name("default_noise.json")  # by research/benchmarks/default_noise.py --install
TEST = 2
"""Version of the residual test: its cheats, their weights and its scales. Another version computes other evidence."""

VECTOR_STEP = 2.0**-11  # of a float16 between one half and one

_KINDS: dict[str, type[Law]] = {"scale": stats.ScaleNoise, "log": stats.LogNoise}
MOST_NAMED = 32  # laws of known cheats
LONGEST_NAME = 64  # characters of the name of one
_RANGES = {
    "sigma": (0.0, 1e3),
    "dof": (0.1, 1e6),
    "junk_sigma": (1e-9, 1e3),
    "mu": (-100.0, 10.0),
    "sd": (1e-4, 100.0),
    "dimension": (2, 2**24),
    "tail": (1e-3, 30.0),
    "floor": (1e-12, 2.0),
}
"""Ranges of the parameters of laws in files. Beyond them densities overflow float64, and no test is left."""


@dataclass(frozen=True)
class Noise:
    """The honest law, its source, and what an honest verdict must exclude.

    Args:
        law: Law of honest residuals.
        source: Where the law comes from, in words.
        spread: Law of the scale of a machine over that of ``law``.
        effect: Smallest multiple of the noise that counts as another computation; that of :data:`EFFECT` when None.
        named: Laws of known cheats by name.
        caution: Warning about the law, which ends the reason of a verdict; empty without one. It is not stored:
            ``source`` says it in short.
    """

    law: Law
    source: str
    spread: Spread = field(default_factory=Spread)
    effect: float | None = None
    named: Mapping[str, Law] = field(default_factory=lambda: MappingProxyType({}))
    caution: str = ""

    @property
    def size(self) -> float:
        """A typical honest residual: sigma of a distance, or the median L2 distance of two vectors."""
        return self.law.size

    def scaled(self, factor: float) -> "Noise":
        """Return the noise ``factor`` times larger, that of the known cheats included."""
        named = {name: law.scaled(factor) for name, law in self.named.items()}
        return replace(self, law=self.law.scaled(factor), named=named)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        values = {**law_as_dict(self.law), "source": self.source, "test": TEST}
        if self.spread.sd:
            values["spread"] = asdict(self.spread)
        if self.effect is not None:
            values["effect"] = self.effect
        if self.named:
            values["named"] = {name: law_as_dict(law) for name, law in self.named.items()}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Noise":
        """Read what :meth:`as_dict` wrote.

        Raises:
            CalibrationError: The values are no noise, or a parameter is not a finite number.
        """
        try:
            law = dict(values)
            rest = {name: law.pop(name) for name in ("source", "effect", "spread", "named") if name in law}
            check_version(law.pop("test", TEST), TEST, "the residual test")
            return read_fields(
                cls,
                {"law": law, "source": ""} | rest,
                law=read_law,
                source=read_source,
                spread=read_spread,
                effect=lambda value: None if value is None else read_number(value),
                named=lambda laws: read_named(laws, read_law),
            )
        except (TypeError, ValueError, AttributeError, UsageError):
            raise _no_noise(values) from None


def default_noise(output: str, prover_dtype: str, validator_dtype: str) -> Noise:
    """Return the stated default for a pair of dtypes, as measured by research/benchmarks/default_noise.py.

    Args:
        output: Family of noise: :attr:`assay.poc.Pipeline.noise`.
        prover_dtype: Dtype of one engine.
        validator_dtype: Dtype of the other engine; the order does not matter.

    Raises:
        CalibrationError: No default was measured for this pair.
    """
    pair = "/".join(sorted((prover_dtype, validator_dtype)))
    laws = _defaults()["laws"].get(output, {})
    found = laws.get(pair)
    if found is None:
        raise CalibrationError(
            f"no default noise between {prover_dtype} and {validator_dtype}",
            wanted="one of " + ", ".join(laws),
            do="measure it with `assay poc calibrate A.jsonl B.jsonl` and pass --calibration",
        )
    return Noise(read_law(found), f"default for {pair}, of the bundled models")


def fit_noise(
    pipeline: Pipeline, errors: FloatArray, *, most_dof: float = math.inf
) -> NoiseFit[stats.ScaleNoise] | NoiseFit[stats.LogNoise]:
    """Fit a law to honest residuals [N] of a pipeline; one of distances has at most ``most_dof`` degrees of freedom."""
    if pipeline.output != "distance":
        # Rounded to float16, equal vectors may differ by a step. The published law came before that was measured.
        floor = 1e-4 if pipeline.read == "last" and pipeline.output == "vector" else VECTOR_STEP
        return fit_log_noise(errors, dimension=pipeline.output_size(0, 0), floor=floor)
    found = fit_scale_noise(errors)
    return found if found.reached.dof <= most_dof else fit_scale_noise(errors, dof=most_dof)


def law_as_dict(law: Law) -> dict[str, Any]:
    """Return the parameters of a law with its kind."""
    return {"kind": "scale" if isinstance(law, stats.ScaleNoise) else "log", **asdict(law)}


def read_fields(kind: type[T], values: Any, **readers: Callable[[Any], Any]) -> T:
    """Return a dataclass from the values of its fields; a field without a reader of its own is a finite number.

    Readers raise ValueError, and the dataclass TypeError or UsageError, for values that it cannot have.
    """
    return kind(**{name: readers.get(name, read_number)(value) for name, value in dict(values).items()})


def read_number(value: Any) -> Any:
    """Return a finite number; anything else is a ValueError."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} where a finite number belongs")
    return value


def read_source(value: Any) -> str:
    """Return a text that says where a law comes from; anything else is a ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"a source of {value!r:.60}")
    return value


def read_law(values: Any) -> Law:
    """Read a law.

    Raises:
        CalibrationError: The values are not a law, or a parameter is one that no measurement gives.
    """
    try:
        parameters = dict(values)
        law = read_fields(_KINDS[parameters.pop("kind")], parameters)
        if not all(_RANGES[name][0] <= value <= _RANGES[name][1] for name, value in asdict(law).items()):
            raise ValueError
        return law
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, UsageError):
        raise _no_noise(values) from None


def read_spread(values: Any) -> Spread:
    """Return a spread; values that no measurement gives are a ValueError, TypeError or UsageError."""
    if set(values) != {"sd", "dof"} or any(abs(read_number(value)) > 1e6 for value in values.values()):
        raise ValueError(f"a spread of {values!r:.60}")
    return Spread(**values)


def read_named(values: Mapping[str, Any], read: Callable[[Any], T]) -> dict[str, T]:
    """Return the laws of known cheats by name."""
    check_cheat_names(list(values))
    return {name: read(law) for name, law in values.items()}


def check_cheat_names(names: Sequence[str]) -> None:
    """Refuse names of known cheats that are empty, too long or not printable, and more names than a file may hold."""
    odd = [name for name in names if not 0 < len(name) <= LONGEST_NAME or not name.isprintable()]
    if odd or len(names) > MOST_NAMED:
        raise UsageError(
            f"a known cheat named {odd[0]!r:.80}" if odd else f"{len(names)} known cheats",
            wanted=f"at most {MOST_NAMED}, each with a name of 1 to {LONGEST_NAME} printable characters",
            do="shorten the --name" if odd else "leave some of them out",
        )


def check_version(found: Any, wanted: int, test: str) -> None:
    """Refuse noise for another version of a test."""
    if found != wanted:
        raise CalibrationError(
            f"noise for version {found!r:.20} of {test}",
            wanted=f"version {wanted}, whose evidence this release can compute again",
            do="read it with the release of assay that wrote it",
        )


def sequential_test(noise: Noise, *, alpha: float = 1e-3, beta: float = 1e-2) -> stats.SequentialTest:
    """Return a fresh test of residuals against honest noise.

    Every verdict comes from this test: in `verify`, the service, the validator and the experiments.

    Args:
        noise: Honest noise of distances or of vectors.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat which an honest verdict excludes is called honest.

    Raises:
        UsageError: A rate is not in (0, 1), or the law is too wide for invented values to stand out.
    """
    usual = EFFECT["distance" if isinstance(noise.law, stats.ScaleNoise) else "vector"]
    return stats.SequentialTest(
        noise.law,
        spread=noise.spread,
        alpha=alpha,
        beta=beta,
        effect=noise.effect or usual,
        named=noise.named,
    )


@cache
def _defaults() -> JsonObject:
    return read_json(DEFAULT_LAWS)


def _no_noise(values: Any) -> CalibrationError:
    return CalibrationError(
        f"noise {values!r:.120}",
        wanted="a kind, scale or log, with its finite parameters",
        do="write the file with `assay poc calibrate`",
    )
