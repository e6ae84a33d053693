"""Laws of honest residuals in files: how they are read, written and checked."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.files.jsonl import dumps
from assay.stats.noise_laws import Spread

FloatArray = npt.NDArray[np.float64]
Law = stats.NoiseLaw  # law of honest residuals
# Added to residuals over their typical size, so that zero has a logarithm.
LEAST_SCORE = 1e-6
MOST_SCORES = (
    1024  # honest residuals that are kept with a law, to price its bets; of more, as many quantiles
)
_KINDS: dict[str, TypeAdapter[Any]] = {
    "scale": TypeAdapter(stats.ScaleNoise),
    "log": TypeAdapter(stats.LogNoise),
}
OF_RESIDUALS = ("a kind, scale or log, with its finite parameters", "calibrate")


@contextmanager
def refusing(values: Any, wanted: str, command: str) -> Iterator[None]:
    """Say of values that cannot be read that they are no noise."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, UsageError):
        raise CalibrationError(
            f"noise {values!r:.120}", wanted=wanted, do=f"write the file with `assay poc {command}`"
        ) from None


def read_law(values: Any) -> Law:
    """Read a law; a CalibrationError if it is malformed or a parameter is out of range."""
    with refusing(values, *OF_RESIDUALS):
        parameters = dict(values)
        law: Law = _KINDS[parameters.pop("kind")].validate_json(dumps(parameters))
    return law


def _read_spread(values: Any) -> Spread:
    if set(values) != {"sd", "dof"}:
        raise ValueError(f"a spread of {values!r:.60}")
    return TypeAdapter(Spread).validate_json(dumps(values))


def pack_scores(residuals: npt.ArrayLike, law: Law) -> str:
    """Return relative residual sizes as base64 of float16 logarithms, ascending.

    Of more than :data:`MOST_SCORES`, as many quantiles are kept.
    """
    logs = np.sort(np.log(law.magnitudes(residuals) / law.size + LEAST_SCORE))
    if len(logs) > MOST_SCORES:
        logs = np.quantile(logs, (np.arange(MOST_SCORES) + 0.5) / MOST_SCORES)
    return base64.b64encode(logs.astype("<f2").tobytes()).decode()


def unpack_scores(text: str) -> FloatArray:
    """Return the sizes [N] that :func:`pack_scores` wrote, or raise a ValueError."""
    logs = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float64)
    if len(logs) > MOST_SCORES or not np.isfinite(logs).all() or bool(np.any(np.diff(logs) < 0)):
        raise ValueError(f"{len(logs)} scores, or some that are not numbers in ascending order")
    return np.exp(logs)


def _check_scores(text: str) -> str:
    unpack_scores(text)
    return text


ReadLaw = Annotated[Law, PlainValidator(read_law)]


ReadSpread = Annotated[Spread, PlainValidator(_read_spread)]


Scores = Annotated[str, Field(max_length=4 * MOST_SCORES), AfterValidator(_check_scores)]


def law_as_dict(law: Law) -> dict[str, Any]:
    """Return the parameters of a law with its kind."""
    return {"kind": "scale" if isinstance(law, stats.ScaleNoise) else "log", **asdict(law)}


def check_version(version: Any, wanted: int, test: str) -> None:
    """Refuse noise for another version of a test."""
    if version != wanted:
        raise CalibrationError(
            f"noise for version {version!r:.20} of {test}",
            wanted=f"version {wanted}, whose evidence this release can compute again",
            do="read it with the release of assay that wrote it",
        )
