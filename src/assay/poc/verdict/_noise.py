"""How far honest engines differ: the law against which the sequential test holds residuals."""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from assay import stats
from assay.errors import CalibrationError, UsageError

__all__ = ["MARGIN", "Law", "Noise", "default_noise", "law_as_dict", "law_from_dict"]

Law = stats.ScaleNoise | stats.LogNoise

MARGIN = 2.0
"""Factor of the stated defaults over the measured noise, so that they hold for models and machines not measured."""


@dataclass(frozen=True)
class Noise:
    """The honest law and where it comes from, in words."""

    law: Law
    source: str

    @property
    def size(self) -> float:
        """A typical honest residual: sigma of a distance, or the median L2 distance of two vectors."""
        return self.law.sigma if isinstance(self.law, stats.ScaleNoise) else math.exp(self.law.mu)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**law_as_dict(self.law), "source": self.source}


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
        CalibrationError: The values are not a law, or a parameter is not a finite number.
    """
    try:
        parameters = dict(values)
        kind = {"scale": stats.ScaleNoise, "log": stats.LogNoise}[parameters.pop("kind")]
        if not all(type(value) in (int, float) and math.isfinite(value) for value in parameters.values()):
            raise ValueError
        law: Law = kind(**parameters)
        return law
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, UsageError):
        raise CalibrationError(
            f"noise {values!r:.120}",
            wanted="a kind, scale or log, with its finite parameters",
            do="write the file with `assay poc calibrate`",
        ) from None


@cache
def _defaults() -> dict[str, Any]:
    text = resources.files("assay.poc.verdict").joinpath("default_noise.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded
