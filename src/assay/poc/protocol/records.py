"""Records: the published value of a nonce, and the forms in which presets publish.

A preset names its form in :attr:`Pipeline.output`. A form has one method for each place where a
value is made, written, read and compared, so another form is a class here and a line in
:data:`FORMS`.

Legend of shapes: K length of a vector or sketch, N tokens, S sketches.
"""

import base64
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from assay.errors import ProofFormatError
from assay.poc.protocol.pipelines import SPHERE_POINTS, Pipeline
from assay.poc.protocol.strict_file import STRICT, format_error

# Points of the unit sphere are at most 2 apart. Both vectors are scaled to length one in float32,
# so each may be a few units in the last place too long (1.2e-7 each), and the norm of their
# difference may round up once more.
MAX_DISTANCE = 2 + 1e-6

# Largest margin that a token counts with: the largest squared distance of two unit vectors.
LARGEST_MARGIN = 4.0

# Largest margin of a point: two cosines differ by no more. A claim that is no point counts as this.
FARTHEST_POINT = 2.0


@dataclass(frozen=True, eq=False)
class Record:
    """One line of a proof: a nonce with what its preset publishes, and the rest left empty.

    Args:
        nonce: Nonce.
        distance: Distance to the target of the block; NaN where something else is published.
        vector: Vector [K] in float16.
        tokens: Ids of the decoded tokens, [N] in uint32.
        sketches: Sketch of every 32nd state, [S, K] in float16.
        margins: How far the score of each claimed token or point is below the best one, in float32,
            where these were replayed; None in a proof.
        points: Numbers of the nearest points, [N + 1] in uint8: behind the prompt, and of every
            step.
    """

    nonce: int
    distance: float = math.nan
    vector: NDArray[Any] | None = None
    tokens: NDArray[Any] | None = None
    sketches: NDArray[Any] | None = None
    margins: NDArray[Any] | None = None
    points: NDArray[Any] | None = None

    @property
    def has_distance(self) -> bool:
        """Whether a distance is published, and not a vector, tokens or points."""
        return self.vector is None and self.tokens is None and self.points is None


@dataclass(frozen=True, kw_only=True)
class RecordLine:
    """The line of a nonce; fields that a form does not have stay at their defaults."""

    __pydantic_config__: ClassVar = STRICT

    nonce: int
    distance: int | float = math.nan
    valid: bool = False
    vector: str = ""
    tokens: str = ""
    sketches: str = ""
    points: str = ""


class PublishedForm(ABC):
    """One form of published values.

    ``replayed`` names the field whose claimed values an engine replays, where it has one.
    """

    replayed: ClassVar[Literal["", "tokens", "points"]] = ""

    def records(self, nonces: Sequence[int], values: Mapping[str, NDArray[Any]]) -> list[Record]:
        """Return the records of a batch, from what an engine gave for it."""
        rows = zip(*values.values(), strict=True)
        return [
            Record(nonce, **dict(zip(values, row, strict=True)))
            for nonce, row in zip(nonces, rows, strict=True)
        ]

    def is_valid(self, record: Record, r_target: float) -> bool:
        """Return whether a record counts; everything that is no distance does."""
        return True

    @abstractmethod
    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        """Return the fields of a record's line in a proof, beside the nonce."""

    @abstractmethod
    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        """Return the record of a line; a ProofFormatError where its value cannot be one."""

    @abstractmethod
    def pack(self, record: Record) -> bytes:
        """Return the bytes of a record, as callbacks, databases and commitments have them."""

    @abstractmethod
    def unpack(self, nonce: int, text: object, pipeline: Pipeline) -> Record:
        """Return the record whose bytes, in base64, another machine sent."""

    @abstractmethod
    def residual(self, received: Record, again: Record) -> float:
        """Return how far a received record is from a recomputed one; NaN if a value is missing."""

    def counted(self, received: Record, again: Record) -> float:
        """Return what the published count holds against its threshold; NaN likewise."""
        return self.residual(received, again)


class DistanceForm(PublishedForm):
    """A distance to the target of the block."""

    @override
    def records(self, nonces: Sequence[int], values: Mapping[str, NDArray[Any]]) -> list[Record]:
        # The shortest decimal that reads back to the same float32.
        return [
            Record(nonce, distance=float(str(np.float32(distance))))
            for nonce, distance in zip(nonces, values["distance"], strict=True)
        ]

    @override
    def is_valid(self, record: Record, r_target: float) -> bool:
        return is_valid(record.distance, r_target)

    @override
    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        return {"distance": record.distance, "valid": is_valid(record.distance, r_target)}

    @override
    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        if not is_distance(line.distance):
            raise format_error(f"distance {line.distance!r:.60}", "a number in [0, 2]")
        return Record(line.nonce, distance=float(line.distance))

    @override
    def pack(self, record: Record) -> bytes:
        # Only commitments hold a distance as bytes; elsewhere it is a number.
        return struct.pack("<d", record.distance)

    @override
    def unpack(self, nonce: int, text: object, pipeline: Pipeline) -> Record:
        return Record(nonce, distance=float(decode_vector(text, 1, "<f8")[0]))

    @override
    def residual(self, received: Record, again: Record) -> float:
        return received.distance - again.distance


class VectorForm(PublishedForm):
    """A vector of unit length, whose residual is an L2 distance."""

    @override
    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        return {"vector": encode_vector(_present(record.vector))}

    @override
    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        return Record(line.nonce, vector=decode_vector(line.vector, pipeline.vector_size))

    @override
    def pack(self, record: Record) -> bytes:
        return _present(record.vector).astype("<f2").tobytes()

    @override
    def unpack(self, nonce: int, text: object, pipeline: Pipeline) -> Record:
        return Record(nonce, vector=decode_vector(text, pipeline.vector_size))

    @override
    def residual(self, received: Record, again: Record) -> float:
        if received.vector is None or again.vector is None:
            return math.nan
        if received.vector.shape != again.vector.shape:
            return math.nan
        apart_K = received.vector.astype(np.float64) - again.vector.astype(np.float64)
        return float(np.linalg.norm(apart_K))


class TokenForm(PublishedForm):
    """Decoded tokens with sketches of their states, which are replayed and not decoded again.

    The residual is √(mean ‖u − v‖² + mean d): u and v are the two sketches of a state, and d is the
    score of the best token minus that of the claimed one, at most 4. Noise m times larger makes
    both terms m² times larger.
    """

    replayed = "tokens"

    @override
    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        return {
            "tokens": encode_vector(_present(record.tokens), "<u4"),
            "sketches": encode_vector(_present(record.sketches)),
        }

    @override
    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        tokens = decode_vector(line.tokens, pipeline.steps, "<u4")
        sketches = decode_vector(line.sketches, pipeline.vector_count * pipeline.vector_size)
        return Record(
            line.nonce, tokens=tokens, sketches=sketches.reshape(pipeline.vector_count, -1)
        )

    @override
    def pack(self, record: Record) -> bytes:
        tokens = _present(record.tokens).astype("<u4").tobytes()
        return tokens + _present(record.sketches).astype("<f2").tobytes()

    @override
    def unpack(self, nonce: int, text: object, pipeline: Pipeline) -> Record:
        packed = decode_vector(text, packed_size(pipeline), "u1")
        tokens, sketches = np.split(packed, [4 * pipeline.steps])
        if not np.isfinite(sketches.view("<f2")).all():
            raise format_error("sketches that are NaN or infinity", "finite float16 values")
        return Record(
            nonce,
            tokens=tokens.view("<u4").astype(np.uint32),
            sketches=sketches.view("<f2").astype(np.float16).reshape(-1, pipeline.vector_size),
        )

    @override
    def residual(self, received: Record, again: Record) -> float:
        if received.sketches is None or again.sketches is None or again.margins is None:
            return math.nan
        if received.sketches.shape != again.sketches.shape:
            return math.nan
        apart_SK = received.sketches.astype(np.float64) - again.sketches.astype(np.float64)
        margins_N = np.minimum(again.margins.astype(np.float64), LARGEST_MARGIN)
        return math.sqrt(np.square(apart_SK).sum(axis=1).mean() + margins_N.mean())


class PointForm(PublishedForm):
    """Points of a chain, which are replayed under the chain that is claimed.

    The residual is √(mean d), and d is the cosine of the best point minus that of the claimed one,
    at most 2. Noise m times larger moves m times as many states across a border, and m times as
    far.
    """

    replayed = "points"

    @override
    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        return {"points": encode_vector(_present(record.points), "u1")}

    @override
    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        return self.unpack(line.nonce, line.points, pipeline)

    @override
    def pack(self, record: Record) -> bytes:
        return _present(record.points).astype("u1").tobytes()

    @override
    def unpack(self, nonce: int, text: object, pipeline: Pipeline) -> Record:
        points = decode_vector(text, pipeline.steps + 1, "u1")
        if (points >= SPHERE_POINTS).any():
            raise format_error(f"point {points.max()}", f"numbers below {SPHERE_POINTS}")
        return Record(nonce, points=points)

    @override
    def residual(self, received: Record, again: Record) -> float:
        if received.points is None or again.margins is None:
            return math.nan
        return math.sqrt(np.minimum(again.margins.astype(np.float64), FARTHEST_POINT).mean())

    @override
    def counted(self, received: Record, again: Record) -> float:
        if received.points is None or again.margins is None:
            return math.nan
        return min(float(again.margins.max()), FARTHEST_POINT)


FORMS: Mapping[str, PublishedForm] = {
    "distance": DistanceForm(),
    "vector": VectorForm(),
    "tokens": TokenForm(),
    "points": PointForm(),
}
"""Every form of published values, by its name in :attr:`Pipeline.output`."""


def published_form(pipeline: Pipeline) -> PublishedForm:
    """Return the form in which a preset publishes."""
    return FORMS[pipeline.output]


def form_of(record: Record) -> PublishedForm:
    """Return the form of a record, from the values that it has."""
    names = ("points", "tokens", "vector")
    return FORMS[next((name for name in names if getattr(record, name) is not None), "distance")]


def pack_record(record: Record) -> bytes:
    """Return the bytes of a record, as :meth:`PublishedForm.pack` does."""
    return form_of(record).pack(record)


def is_valid(distance: float, r_target: float) -> bool:
    """Return whether a nonce counts: its distance is strictly below the target."""
    return distance < r_target


def is_distance(value: float) -> bool:
    """Return whether a number can be a distance: 0 to 2, with room for the rounding of float32."""
    return 0 <= value <= MAX_DISTANCE


def encode_vector(vector: NDArray[Any], dtype: str = "<f2") -> str:
    """Return numbers as base64 of their little-endian bytes: float16, or token ids in ``<u4``."""
    return base64.b64encode(np.asarray(vector).astype(dtype).tobytes()).decode("ascii")


def decode_vector(text: object, size: int, dtype: str = "<f2") -> NDArray[Any]:
    """Return the finite numbers of base64, float16 or ids in ``<u4``; else a ProofFormatError."""
    kind = np.dtype(dtype)
    wanted = f"base64 of {size} finite little-endian {kind.name} values"
    try:
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__}")
        raw = base64.b64decode(text, validate=True)
        if len(raw) != size * kind.itemsize:
            raise ValueError(f"{len(raw)} bytes")
    except ValueError as error:
        raise format_error(f"a vector that is {error}", wanted) from None
    vector = np.frombuffer(raw, kind).astype(kind.newbyteorder("="))
    if kind.kind == "f" and not np.isfinite(vector).all():
        raise format_error("a vector that is NaN or infinity", wanted)
    return vector


def packed_size(pipeline: Pipeline) -> int:
    """Return the bytes of a packed record; 0 where a distance is published."""
    if pipeline.output == "points":
        return pipeline.steps + 1
    return 4 * pipeline.steps + 2 * pipeline.vector_size * pipeline.vector_count


def pack_points(points: Sequence[int]) -> str:
    """Return points of a chain as base64; a number that is no byte becomes one that is no point."""
    return encode_vector(np.array([k if 0 <= k < 256 else 255 for k in points], np.uint8), "u1")


def artifact_fields(packed: bytes, pipeline: Pipeline) -> dict[str, Any]:
    """Return the fields of a packed record in callbacks and replies; chains list their points."""
    if pipeline.output == "points":
        return {"vector_b64": "", "k_points_steps": list(packed)}
    return {"vector_b64": base64.b64encode(packed).decode("ascii")}


def unpack_or_nan(nonce: int, text: object, pipeline: Pipeline) -> Record:
    """Unpack a record; without a text, return one of NaN, which never matches."""
    try:
        return published_form(pipeline).unpack(nonce, text, pipeline)
    except ProofFormatError:
        missing = np.full((pipeline.vector_count, pipeline.vector_size), np.nan, dtype=np.float16)
        if pipeline.output == "vector":
            return Record(nonce, vector=missing[0])
        # A value that is no point of the sphere is as far from any as can be.
        if pipeline.output == "points":
            return Record(nonce, points=np.full(pipeline.steps + 1, SPHERE_POINTS, np.uint8))
        return Record(nonce, tokens=np.zeros(pipeline.steps, dtype=np.uint32), sketches=missing)


def describe_packing(pipeline: Pipeline) -> dict[str, Any]:
    """Return how packed records are to be read, as callbacks say it beside them."""
    if pipeline.output == "points":
        return {"dtype": "u8", "points": SPHERE_POINTS, "steps": pipeline.steps}
    form = {"dtype": "f16", "k_dim": pipeline.vector_size, "endian": "le"}
    return form | {"dtype": "u32+f16", "tokens": pipeline.steps} if pipeline.steps else form


def _present(values: NDArray[Any] | None) -> NDArray[Any]:
    """Return values that a record of its form always has."""
    assert values is not None
    return values
