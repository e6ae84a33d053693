"""Honest noise of proofs: laws of residuals, how files have them, and the noise around a law."""

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Round
from assay.poc.verdict.control import Control
from assay.poc.verdict.residuals import compare, residuals
from assay.stats.chord import FloatArray
from assay.stats.noise_laws import Spread, StrictLaw, fit_log_noise, fit_scale_noise

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
# Laws that were measured on the two bundled models, on a CPU and a GPU, with their digests. They
# hold for no other.
BUNDLED_LAWS = Path(__file__).with_name("bundled_noise.json")
# version of the residual test: its cheats, weights and scales; another one computes other evidence
TEST = 2
VECTOR_STEP = 2.0**-11  # of a float16 between one half and one


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


@dataclass(frozen=True)
class Noise(StrictLaw):
    """The honest law, its source, and what an honest verdict must exclude.

    Args:
        law: Law of honest residuals.
        source: Where the law comes from, in words.
        spread: Law of the scale of a machine over that of ``law``.
        effect: Smallest multiple of the noise that counts as another computation; that of
            :data:`EFFECT` when None.
        scores: Honest residuals that the law was measured on, as :func:`pack_scores` writes them:
            they price the bets of the test. Without them the law is believed.
        widest: Those of the pair of machines whose shape is the widest, which price the bets on a
            share.
        control: Other computations of each nonce, by which residuals are scores; None without one.
    """

    law: ReadLaw
    source: str = ""
    spread: ReadSpread = field(default_factory=Spread)
    effect: float | None = None
    scores: Scores = ""
    widest: Scores = ""
    control: Control | None = None

    @property
    def size(self) -> float:
        """A typical honest residual: sigma of a distance, or the median L2 distance of two
        vectors.
        """
        return self.law.size

    @property
    def shape(self) -> str:
        """All parameters but size and words: noises of one shape differ in their unit alone."""
        of_size = ("sigma", "mu", "source")
        return dumps({name: value for name, value in self.as_dict().items() if name not in of_size})

    def residuals(
        self,
        received: Sequence[Record],
        again: Sequence[Record],
        controls: Mapping[str, Sequence[Record]],
    ) -> FloatArray:
        """Return the residuals that this law is of, [N]: scores where it has a control.

        ``again`` are the records that a validator computed, and ``controls`` those that it computed
        in the number formats of the control, by format.
        """
        if self.control is None:
            return residuals(received, again)
        computations = [again, *(controls[dtype] for dtype in self.control.dtypes)]
        return self.control.scores(*compare(received, computations))

    def scaled(self, factor: float) -> "Noise":
        """Return the noise where residuals, and controls as well, are ``factor`` times larger."""
        power = 0.0 if self.control is None else sum(self.control.powers)
        return replace(self, law=self.law.scaled(factor ** (1 - power)))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        return {
            **law_as_dict(self.law),
            "source": self.source,
            "test": TEST,
            **({"spread": asdict(self.spread)} if self.spread.sd else {}),
            **({"scores": self.scores, "widest": self.widest} if self.scores else {}),
            **({"control": asdict(self.control)} if self.control is not None else {}),
            **({"effect": self.effect} if self.effect is not None else {}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Noise":
        """Read what :meth:`as_dict` wrote; a CalibrationError if it is malformed."""
        with refusing(values, *OF_RESIDUALS):
            law = dict(values)
            beside_law = ("source", "effect", "spread", "scores", "widest", "control")
            fields = {name: law.pop(name) for name in beside_law if name in law}
            # Laws of known cheats, which earlier releases had.
            law.pop("named", None)
            check_version(law.pop("test", TEST), TEST, "the residual test")
            return TypeAdapter(cls).validate_json(dumps({"law": law, **fields}))


def bundled_noise(
    digest: str, output: str, prover_dtype: str, validator_dtype: str
) -> Noise | None:
    """Return the law of a bundled model between two formats; None for other models.

    ``digest`` is the SHA-256 of the tensors of the checkpoint, ``output`` the family:
    :attr:`assay.poc.Pipeline.noise`. The order of the formats does not matter.
    """
    bundled = _bundled()
    pair = "/".join(sorted((prover_dtype, validator_dtype)))
    law = bundled["laws"].get(output, {}).get(pair) if is_bundled(digest) else None
    return None if law is None else Noise(read_law(law), f"measured on the bundled models, {pair}")


def is_bundled(digest: str) -> bool:
    """Return whether a checkpoint is one of the two whose laws come with assay."""
    return digest in _bundled()["digests"]


def missing_law(
    model: str, digest: str, round: Round, *, dtype: str | None = None, frame: Path | None = None
) -> str:
    """Return the sentence that says that a model has no law, and which command measures one.

    ``model``, ``dtype`` and ``frame`` are the reader's own values: the prover writes the header,
    and its words must not become a command.
    """
    flags = f" --frame {shlex.quote(str(frame))}" if frame is not None else ""
    flags += f" --dtype {dtype}" if dtype is not None else ""
    return (
        f"no law of honest noise was measured for checkpoint {digest[:12]}, preset {round.preset} "
        f"and these number formats: measure one with "
        f"`assay poc calibrate --model {shlex.quote(model[:200])} --preset {round.preset}{flags} "
        f"--seq-len {round.seq_len} -o calibration.json` (--quick takes minutes), and pass "
        f"--calibration"
    )


def fit_noise(pipeline: Pipeline, errors: FloatArray) -> tuple[Law, float]:
    """Fit a law to honest residuals [N]; return it with the standard error of ln size."""
    if pipeline.output == "distance":
        return fit_scale_noise(errors)
    # Rounded to float16, equal vectors may differ by a step. The published law came before that was
    # measured.
    floor = 1e-4 if pipeline.read == "last" and pipeline.output == "vector" else VECTOR_STEP
    return fit_log_noise(errors, dimension=pipeline.output_size(0, 0), floor=floor)


@cache
def _bundled() -> JsonObject:
    return read_json(BUNDLED_LAWS)
