"""Records: the published value of a nonce, and the forms in which presets publish.

A preset names its form in :attr:`Pipeline.output`. A form says which arrays a value has and how two
values are compared, so another form is a row of :data:`FORMS`.

Legend of shapes: K length of a vector or sketch, N tokens, S sketches.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, ClassVar, Literal, NamedTuple

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


class Column(NamedTuple):
    """One array of a published value.

    Args:
        name: Field of a record, and of its line in a proof.
        dtype: Format of its bytes.
        shape: Function that returns its shape in a preset.
        missing: Number that stands for a value which did not come; it never matches.
        below: Bound of its numbers; 0 for none.
    """

    name: str
    dtype: str
    shape: Callable[[Pipeline], tuple[int, ...]]
    missing: float = math.nan
    below: int = 0

    def size(self, pipeline: Pipeline) -> int:
        """Return the number of its bytes in a preset."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape(pipeline))


@dataclass(frozen=True)
class PublishedForm:
    """One form of published values.

    Args:
        columns: Its arrays, in the order of their bytes.
        residual: Function that returns how far a received record is from a recomputed one; NaN if
            a value is missing.
        replayed: Name of the field whose claimed values an engine replays, where it has one.
        counted: Function that returns what the published count holds against its threshold, where
            that is not the residual.
    """

    columns: tuple[Column, ...]
    residual: Callable[[Record, Record], float]
    replayed: Literal["", "tokens", "points"] = ""
    counted: Callable[[Record, Record], float] | None = None

    def records(self, nonces: Sequence[int], values: Mapping[str, NDArray[Any]]) -> list[Record]:
        """Return the records of a batch, from what an engine gave for it."""
        rows = zip(*values.values(), strict=True)
        return [
            Record(nonce, **dict(zip(values, row, strict=True)))
            for nonce, row in zip(nonces, rows, strict=True)
        ]

    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        """Return the fields of a record's line in a proof, beside the nonce."""
        return {
            column.name: encode_vector(getattr(record, column.name), column.dtype)
            for column in self.columns
        }

    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        """Return the record of a line; a ProofFormatError where its value cannot be one."""
        arrays = {
            column.name: decode_vector(
                getattr(line, column.name), math.prod(column.shape(pipeline)), column.dtype
            )
            for column in self.columns
        }
        return self._record(line.nonce, arrays, pipeline)

    def pack(self, record: Record) -> bytes:
        """Return the bytes of a record, as callbacks, databases and commitments have them."""
        return b"".join(
            np.asarray(getattr(record, column.name)).astype(column.dtype).tobytes()
            for column in self.columns
        )

    def unpack(self, nonce: int, text: object, pipeline: Pipeline) -> Record:
        """Return the record whose bytes, in base64, another machine sent."""
        size = packed_size(pipeline)
        packed = BytesIO(_decode(text, size, f"base64 of {size} bytes"))
        arrays = {
            column.name: _numbers(packed.read(column.size(pipeline)), column.dtype)
            for column in self.columns
        }
        return self._record(nonce, arrays, pipeline)

    def missing(self, nonce: int, pipeline: Pipeline) -> Record:
        """Return a record that never matches, in the place of one that did not come."""
        arrays: dict[str, Any] = {
            column.name: np.full(column.shape(pipeline), column.missing, column.dtype)
            for column in self.columns
        }
        return Record(nonce, **arrays)

    def _record(self, nonce: int, arrays: dict[str, Any], pipeline: Pipeline) -> Record:
        for column in self.columns:
            values = arrays[column.name]
            if column.below and (values >= column.below).any():
                raise format_error(f"{column.name} {values.max()}", f"numbers below {column.below}")
            arrays[column.name] = values.reshape(column.shape(pipeline))
        return Record(nonce, **arrays)


class DistanceForm(PublishedForm):
    """A distance to the target of the block: a number of JSON, and bytes in commitments alone."""

    @override
    def records(self, nonces: Sequence[int], values: Mapping[str, NDArray[Any]]) -> list[Record]:
        # The shortest decimal that reads back to the same float32.
        return [
            Record(nonce, distance=float(str(np.float32(distance))))
            for nonce, distance in zip(nonces, values["distance"], strict=True)
        ]

    @override
    def fields(self, record: Record, r_target: float) -> dict[str, Any]:
        return {"distance": record.distance, "valid": is_valid(record.distance, r_target)}

    @override
    def read(self, line: RecordLine, pipeline: Pipeline) -> Record:
        if not is_distance(line.distance):
            raise format_error(f"distance {line.distance!r:.60}", "a number in [0, 2]")
        return Record(line.nonce, distance=float(line.distance))


def _difference(received: NDArray[Any] | None, again: NDArray[Any] | None) -> NDArray[np.float64]:
    """Return the difference of two arrays in float64; NaN where one is missing or misshapen."""
    if received is None or again is None or received.shape != again.shape:
        return np.full((1, 1), np.nan)
    return received.astype(np.float64) - again.astype(np.float64)


def _margins(again: Record, most: float) -> NDArray[np.float64]:
    """Return the margins of a replay, each at most ``most``; NaN of a record that is no replay."""
    margins_N = np.nan if again.margins is None else again.margins.astype(np.float64)
    return np.minimum(margins_N, most)


def _token_residual(received: Record, again: Record) -> float:
    """Return √(mean ‖u − v‖² + mean d).

    u and v are the two sketches of a state, and d is the score of the best token minus that of the
    claimed one, at most 4. Noise m times larger makes both terms m² times larger.
    """
    apart_SK = _difference(received.sketches, again.sketches)
    return math.sqrt(
        np.square(apart_SK).sum(axis=1).mean() + _margins(again, LARGEST_MARGIN).mean()
    )


def _point_residual(received: Record, again: Record) -> float:
    """Return √(mean d): d is the cosine of the best point minus that of the claimed one, at most 2.

    Noise m times larger moves m times as many states across a border, and m times as far.
    """
    return math.sqrt(_point_margins(received, again).mean())


def _point_margins(received: Record, again: Record) -> NDArray[np.float64]:
    """Return the margins of claimed points; NaN where no points were claimed."""
    return np.full(1, np.nan) if received.points is None else _margins(again, FARTHEST_POINT)


FORMS: Mapping[str, PublishedForm] = {
    "distance": DistanceForm(
        (Column("distance", "<f8", lambda _: ()),),
        lambda received, again: received.distance - again.distance,
    ),
    "vector": PublishedForm(
        (Column("vector", "<f2", lambda pipeline: (pipeline.vector_size,)),),
        lambda received, again: float(np.linalg.norm(_difference(received.vector, again.vector))),
    ),
    # Tokens and points are replayed as they are claimed, and not decoded again.
    "tokens": PublishedForm(
        (
            Column("tokens", "<u4", lambda pipeline: (pipeline.steps,), missing=0),
            Column(
                "sketches", "<f2", lambda pipeline: (pipeline.vector_count, pipeline.vector_size)
            ),
        ),
        _token_residual,
        replayed="tokens",
    ),
    "points": PublishedForm(
        (
            # What is no point of the sphere is as far from any as can be.
            Column(
                "points",
                "u1",
                lambda pipeline: (pipeline.steps + 1,),
                missing=SPHERE_POINTS,
                below=SPHERE_POINTS,
            ),
        ),
        _point_residual,
        replayed="points",
        counted=lambda received, again: float(_point_margins(received, again).max()),
    ),
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
    length, wanted = _encoded(size, dtype)
    return _numbers(_decode(text, length, wanted), dtype)


@lru_cache(maxsize=2**8)  # naming a dtype takes numpy as long as reading the JSON of a record
def _encoded(size: int, dtype: str) -> tuple[int, str]:
    """Return the length of numbers in bytes, and what is wanted of their base64."""
    kind = np.dtype(dtype)
    return size * kind.itemsize, f"base64 of {size} finite little-endian {kind.name} values"


def _decode(text: object, size: int, wanted: str) -> bytes:
    """Return so many bytes from base64; a ProofFormatError where it is anything else."""
    try:
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__}")
        raw = base64.b64decode(text, validate=True)
        if len(raw) != size:
            raise ValueError(f"{len(raw)} bytes")
    except ValueError as error:
        raise format_error(f"a vector that is {error}", wanted) from None
    return raw


def _numbers(raw: bytes, dtype: str) -> NDArray[Any]:
    """Return the finite numbers of little-endian bytes, in the order of this machine."""
    vector = np.frombuffer(raw, dtype).astype(dtype.removeprefix("<"))
    if vector.dtype.kind == "f" and not np.isfinite(vector).all():
        raise format_error("a vector that is NaN or infinity", f"finite {vector.dtype.name} values")
    return vector


def packed_size(pipeline: Pipeline) -> int:
    """Return the number of bytes of a packed record."""
    return sum(column.size(pipeline) for column in published_form(pipeline).columns)


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
    form = published_form(pipeline)
    try:
        return form.unpack(nonce, text, pipeline)
    except ProofFormatError:
        return form.missing(nonce, pipeline)


def describe_packing(pipeline: Pipeline) -> dict[str, Any]:
    """Return how packed records are to be read, as callbacks say it beside them."""
    if pipeline.output == "points":
        return {"dtype": "u8", "points": SPHERE_POINTS, "steps": pipeline.steps}
    form = {"dtype": "f16", "k_dim": pipeline.vector_size, "endian": "le"}
    return form | {"dtype": "u32+f16", "tokens": pipeline.steps} if pipeline.steps else form
