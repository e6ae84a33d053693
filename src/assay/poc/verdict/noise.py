"""Honest noise: the law that residuals are held against, how well it is known, and what must be told apart from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.files.jsonl import JsonObject, read_json
from assay.stats.noise import Spread

Law = stats.NoiseLaw
"""Law of honest residuals."""

MARGIN = 2.0
"""Factor of the stated defaults over the measured noise, so that they hold for models and machines not measured."""

EFFECT = {"distance": 4.0, "vector": 2.0}
"""Smallest multiple of the honest noise that counts as another computation, where no measurement says which.

Vectors show a multiple in twelve numbers at once, and cheaper models come closer to them: half is enough.
"""

DEFAULT_LAWS = Path(__file__).with_name("default_noise.json")  # written by benchmarks/default_noise.py --install
TEST = 2
"""Version of the residual test: its cheats, their weights and its scales. Another one computes other evidence."""

_KINDS: dict[str, type[Law]] = {"scale": stats.ScaleNoise, "log": stats.LogNoise}
MOST_NAMED = 32  # laws of known cheats
LONGEST_NAME = 64  # characters of the name of one
_LARGEST_DOF = 1e6
_RANGES = {
    "sigma": (0.0, 1e3),
    "dof": (0.1, _LARGEST_DOF),
    "junk_sigma": (1e-9, 1e3),
    "mu": (-100.0, 10.0),
    "sd": (1e-4, 100.0),
    "dimension": (2, 2**24),
    "tail": (1e-3, 30.0),
    "floor": (1e-12, 2.0),
}
"""Parameters of laws in files. Wider ones leave no test: their densities are beyond float64."""


@dataclass(frozen=True)
class Noise:
    """The honest law, where it comes from, and what an honest verdict must exclude.

    Args:
        law: Law of honest residuals.
        source: Where it comes from, in words.
        spread: Law of the scale of a machine over that of ``law``.
        effect: Smallest multiple of the noise that counts as another computation; that of :data:`EFFECT` when None.
        named: Laws of known cheats by name.
        caution: What makes the law doubtful, in words that a reason ends with; empty where nothing is known to.
            ``source`` says it in short, which is what is stored.
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
            parts = dict(values)
            source, effect = parts.pop("source", ""), parts.pop("effect", None)
            if parts.pop("test", TEST) != TEST:
                raise CalibrationError(
                    f"noise for version {dict(values)['test']!r:.20} of the residual test",
                    wanted=f"version {TEST}, whose evidence this release can compute again",
                    do="read it with the release of assay that wrote it",
                )
            spread = spread_from_dict(parts.pop("spread")) if "spread" in parts else Spread()
            named = named_from_dict(parts.pop("named", {}))
            if not isinstance(source, str) or not (effect is None or _is_number(effect)):
                raise ValueError
            return cls(law_from_dict(parts), source, spread, effect, named)
        except (TypeError, ValueError, AttributeError, UsageError):
            raise _no_noise(values) from None


def default_noise(output: str, prover_dtype: str, validator_dtype: str) -> Noise:
    """Return the stated default for a pair of dtypes, as measured by benchmarks/default_noise.py.

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
    return Noise(law_from_dict(found), f"default for {pair}, of the bundled models")


def law_as_dict(law: Law) -> dict[str, Any]:
    """Return the parameters of a law with its kind."""
    return {"kind": "scale" if isinstance(law, stats.ScaleNoise) else "log", **asdict(law)}


def law_from_dict(values: Any) -> Law:
    """Read a law back.

    Raises:
        CalibrationError: The values are not a law, or a parameter is one that no measurement gives.
    """
    try:
        parameters = dict(values)
        kind = _KINDS[parameters.pop("kind")]
        if not all(_is_number(value) and _in_range(name, value) for name, value in parameters.items()):
            raise ValueError
        return kind(**parameters)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, UsageError):
        raise _no_noise(values) from None


def named_from_dict(values: Mapping[str, Any]) -> dict[str, Law]:
    """Read laws of known cheats back.

    Raises:
        UsageError: A name is empty or too long, or there are too many.
        CalibrationError: A value is not a law.
    """
    check_names(list(values))
    return {name: law_from_dict(law) for name, law in values.items()}


def check_names(names: Sequence[str]) -> None:
    """Refuse names of known cheats that a file may not hold.

    Raises:
        UsageError: A name is empty, too long or not printable, or there are too many.
    """
    odd = [name for name in names if not 0 < len(name) <= LONGEST_NAME or not name.isprintable()]
    if odd or len(names) > MOST_NAMED:
        raise UsageError(
            f"a known cheat named {odd[0]!r:.80}" if odd else f"{len(names)} known cheats",
            wanted=f"at most {MOST_NAMED}, each with a name of 1 to {LONGEST_NAME} printable characters",
            do="shorten the --name" if odd else "leave some of them out",
        )


def spread_from_dict(values: Mapping[str, Any]) -> Spread:
    """Read a spread back.

    Raises:
        ValueError: A value is missing, not a number, or one that no measurement gives. TypeError, AttributeError and
            UsageError mean the same.
    """
    if set(values) != {"sd", "dof"} or not all(_is_number(x) and abs(x) <= _LARGEST_DOF for x in values.values()):
        raise ValueError(f"a spread of {values!r:.60}")
    return Spread(**values)


def sequential_test(noise: Noise, *, alpha: float = 1e-3, beta: float = 1e-2) -> stats.SequentialTest:
    """Return a fresh test of residuals against honest noise.

    Every verdict comes from this test: that of `verify`, of the service, of the validator, and of the experiments.

    Args:
        noise: Honest noise of distances or of vectors.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat is called honest which such a verdict excludes.

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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _in_range(name: str, value: float) -> bool:
    low, high = _RANGES.get(name, (-math.inf, math.inf))  # a law refuses names that it does not have
    return low <= value <= high


def _no_noise(values: Any) -> CalibrationError:
    return CalibrationError(
        f"noise {values!r:.120}",
        wanted="a kind, scale or log, with its finite parameters",
        do="write the file with `assay poc calibrate`",
    )
