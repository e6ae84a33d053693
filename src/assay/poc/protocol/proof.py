"""Proof files: JSON Lines with a header, one record per nonce, and a footer.

    {"kind":"assay.poc.proof","schema":1,"round":…,"pipeline":…,"model":…,"fingerprint":…,"nonces":…}
    {"nonce":0,"distance":1.4131,"valid":true}        or  {"nonce":0,"vector":"base64"}
                                                      or  {"nonce":0,"tokens":"base64","sketches":"base64"}
    {"footer":{"records":256,"valid":151,"seconds":8.1,"sha256":"…"}}

The SHA-256 covers the bytes of the record lines, newlines included. Reading is strict: anything
that is not exactly a proof, spaces and the order of keys included, is an error that names the line.
"""

import base64
import hashlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

import numpy as np
import scipy
from pydantic import AfterValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import override

from assay import streams
from assay.errors import AssayError, DataError, ProofFormatError, ProofMismatch, UsageError
from assay.files.jsonl import dumps, read_lines
from assay.files.storage import write_lines
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.round import DIGEST, MAX_COUNT, MAX_NAME, MAX_NONCE, Round

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How a dataclass is read from JSON: values of its types and no others."""

MOST_PARTS: Mapping[bytes, int] = MappingProxyType({b",": 2**23, b"[": 2**21, b"{": 2**13})
"""How often a character may be in a line: enough for two million runs of nonces in a header."""

FOOTER = b'{"footer":'  # beginning of the last line of a file

LARGEST_SIZE = 2**31 - 1  # largest number in a fingerprint


def format_error(seen: str, wanted: str) -> ProofFormatError:
    """Return the error of a value that is not what its format says."""
    return ProofFormatError(seen, wanted=wanted, do="ask the node for it again")


def line_error(path: str | Path, number: int, seen: str, wanted: str) -> ProofFormatError:
    """Return the error of a line, with the name of the file and the number of the line."""
    return format_error(f"{path}, line {number}: {seen}", wanted)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_as(kind: type[T], text: bytes) -> T:
    """Return JSON as a value of a type that is :data:`STRICT`; a ProofFormatError names the field
    that is wrong.
    """
    try:
        made: T = _adapter(cast("Any", kind)).validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"]))
        value = fault["input"]
        wanted = f"{fault['msg']:.200}"
        if (
            not place or fault["type"] == "missing"
        ):  # no place: the text is no JSON, and pydantic says where
            raise format_error(
                f"no {place}" if place else wanted, "a line as assay writes it"
            ) from None
        said = "holds" if isinstance(value, dict | list) else "is"
        shown = value[:60] if isinstance(value, str) else f"{value!r:.60}"
        raise format_error(
            f"{place} {said} {shown}", wanted.removeprefix("Input should be ")
        ) from None
    return made


def parse_line(
    path: str | Path,
    number: int,
    line: bytes,
    read: Callable[[bytes], T],
    write: Callable[[T], str],
    most: Mapping[bytes, int] = MOST_PARTS,
    longest: int | None = None,
) -> T:
    """Parse a line and refuse it if the value would be written in other bytes, with the names of
    the file and the line.

    ``most`` says how often a character may be in the line, as values take many times the room of
    their text, and ``longest`` how many bytes it may have. It is empty where the file ends.
    """
    if not line:
        raise line_error(
            path, number, "the end of the file", "a complete file: it is empty or was cut off"
        )
    if longest is not None and len(line) > longest:
        raise line_error(path, number, f"a line of {len(line)} bytes", f"at most {longest}")
    for character, times in most.items():
        if (count := line.count(character)) > times:
            raise line_error(
                path, number, f"{count} times {character.decode()!r}", f"at most {times}"
            )
    if line.endswith(b"\r\n"):
        raise line_error(
            path,
            number,
            "the line ends of Windows (CRLF)",
            "LF alone: fetch the file again as binary",
        )
    try:
        value = read(line)
        written = write(value)
    except AssayError as error:
        raise line_error(path, number, error.seen, error.wanted) from None
    if line != written.encode() + b"\n":
        raise line_error(
            path, number, f"{line[:60]!r} in another form than it is written in", f"{written:.60}…"
        )
    return value


class LastLine:
    """Base of footers: counts, the seconds that they took, and the SHA-256 of the lines between
    header and footer.
    """

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps({"footer": vars(self)})

    @classmethod
    def read(cls, path: str | Path, number: int, line: bytes) -> Self:
        """Read the last line of a file. Raises ProofFormatError: the line is wrong; names the file
        and the line.
        """
        begun = FOOTER
        ended = b"}\n"
        return parse_line(
            path,
            number,
            line,
            lambda line: read_as(cls, line.removeprefix(begun).removesuffix(ended)),
            cls.line,
        )


class StrictFile(ABC):
    """A file of JSON Lines that is read strictly: a header, one line for each record, and a
    footer.
    """

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file; a ProofFormatError names the line that is not complete or not
        consistent.
        """
        try:
            return cls._read(path, read_lines(path))
        except DataError as error:
            raise ProofFormatError(error.seen, wanted=error.wanted, do=error.do) from error

    @classmethod
    def parse(cls, source: str, content: bytes) -> Self:
        """Read and check a file that is in memory, as :meth:`load` does; the source names it in
        errors.
        """
        return cls._read(source, enumerate(io.BytesIO(content), start=1))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file; the final name appears when it is whole.

        Raises:
            UsageError: The file exists and may not be replaced.
            StorageError: The file cannot be written.
        """
        write_lines(path, self.lines(), overwrite=overwrite)

    @abstractmethod
    def lines(self) -> list[str]:
        """Return the lines of the file, without their newlines."""

    @classmethod
    @abstractmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        """Read the lines with their numbers."""


KIND = "assay.poc.proof"
SCHEMA = 1
SEPARATOR = ", "  # between the library and its kernels

# Points of the unit sphere are at most 2 apart. Both vectors are scaled to length one in float32,
# so each may be a few units in the last place too long (1.2e-7 each), and the norm of their
# difference may round up once more.
MAX_DISTANCE = 2 + 1e-6
CHANCE = 1e-4  # that honest nonces are refused because their seeds happen to collide
CHUNK = 2**16


def _printable(text: str) -> str:
    if len(text) > MAX_NAME or not text.isprintable():
        raise ValueError(f"a text of at most {MAX_NAME} printable characters")
    return text


Text = Annotated[str, AfterValidator(_printable)]  # a text that a message can show on a terminal
Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
Seconds = Annotated[int | float, Field(ge=0)]  # written as they were given


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything about an engine that can move the last bits of a hidden state.

    Two engines with equal fingerprints return equal bits. Noise between two different ones is what
    a calibration measures.

    Args:
        engine: Name of the engine, for instance ``hf`` or ``vllm``.
        device: Name of the processor or GPU.
        dtype: Number format of the weights, and after a plus that of a cache that rounds keys and
            values.
        attention: Name of the attention implementation.
        batch_size: Number of nonces of a batch.
        seq_len: Number of positions of a nonce.
        threads: Number of CPU threads; 0 on a GPU.
        torch: Version of torch.
        library: Library that runs the model, and its version.
        kernels: Choices beside the defaults of that library, for instance ``compiled`` or ``tp 2``.
            In a file they follow the library in one text, joined by commas, and such a text is
            taken apart.
    """

    __pydantic_config__: ClassVar = STRICT

    engine: Text
    device: Text
    dtype: Text
    attention: Text
    batch_size: Size
    seq_len: Size
    threads: Size
    torch: Text
    library: Text
    kernels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        library, *kernels = self.library.split(SEPARATOR)
        if kernels:
            object.__setattr__(self, "library", library)
            object.__setattr__(self, "kernels", (*kernels, *self.kernels))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the proof header, with the kernels joined to the
        library.
        """
        values = asdict(self)
        values["library"] = SEPARATOR.join([self.library, *values.pop("kernels")])
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Fingerprint":
        """Return the fingerprint that :meth:`as_dict` wrote; a ProofFormatError names the field
        that is wrong.
        """
        made = read_as(cls, dumps(values).encode())
        if made.as_dict() != values:
            raise format_error(
                "a fingerprint with kernels", "them in one text with the library, joined by commas"
            )
        return made

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the whole."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Header:
    """First line of a proof: everything about it that the records do not say.

    Args:
        round: Round, with its model named.
        pipeline: Description of the preset.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model: trained, random-all or random-embed.
        frame: SHA-256 of the frame of the checkpoint, where the preset has one; else empty.
        fingerprint: Description of the prover's engine.
        nonces: Nonces of the records, in order, as runs ``[first, end, step]``.
    """

    round: Round
    pipeline: Pipeline
    digest: str
    weights: str
    frame: str = ""
    fingerprint: Fingerprint
    nonces: tuple[tuple[int, int, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the header line."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "round": self.round.as_dict(),
            "pipeline": self.pipeline.as_dict(),
            "model": {"reference": self.round.model, "digest": self.digest, "weights": self.weights}
            | ({"frame": self.frame} if self.frame else {}),
            "fingerprint": self.fingerprint.as_dict(),
            "nonces": [list(run) for run in self.nonces],
        }

    def all_nonces(self) -> Iterator[int]:
        """Iterate over the nonces in the order of the records."""
        for run in self.nonces:
            yield from range(*run)

    def places_of(self, nonces: Sequence[int]) -> list[int]:
        """Return the index of each nonce in the sequence that the prover computed."""
        if len(self.nonces) > 1:
            places = {nonce: index for index, nonce in enumerate(self.all_nonces())}
            return [places[nonce] for nonce in nonces]
        first, _, step = self.nonces[0]
        return [(nonce - first) // step for nonce in nonces]

    @property
    def count(self) -> int:
        """Number of records that a complete proof has."""
        return sum(len(range(*run)) for run in self.nonces)

    @property
    def positions(self) -> int:
        """Number of positions of a nonce: its input, and the tokens that are decoded after it."""
        return self.round.seq_len + self.pipeline.steps

    def claims(self) -> dict[str, Any]:
        """Return everything that the prover chose and a validator can pin, by the names of
        :class:`Pins`.
        """
        return {
            **self.round.as_dict(),
            "digest": self.digest,
            "weights": self.weights,
            "prover_dtype": self.fingerprint.dtype,
            "builds": self.fingerprint,
            "nonces": self.nonces,
            "fewest_nonces": self.count,
        }

    def line(self, record: "Record") -> str:
        """Return the line of a record, without its newline."""
        if isinstance(record, VectorRecord):
            return dumps({"nonce": record.nonce, "vector": encode_vector(record.vector)})
        if isinstance(record, TokenRecord):
            tokens = encode_vector(record.tokens, "<u4")
            sketches = encode_vector(record.sketches)
            return dumps({"nonce": record.nonce, "tokens": tokens, "sketches": sketches})
        return dumps(
            {"nonce": record.nonce, "distance": record.distance, "valid": self.is_valid(record)}
        )

    def is_valid(self, record: "Record") -> bool:
        """Return whether a record counts: a distance below the target does, and everything that is
        no distance.
        """
        return not isinstance(record, DistanceRecord) or is_valid(
            record.distance, self.round.r_target
        )


@dataclass(frozen=True, eq=False)
class DistanceRecord:
    """The result of one nonce under a preset that publishes distances."""

    nonce: int
    distance: float
    vector: ClassVar[None] = None


@dataclass(frozen=True, eq=False)
class VectorRecord:
    """The result of one nonce under a preset that publishes vectors: [K] in float16."""

    nonce: int
    vector: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """The result of one nonce under a preset that decodes, or what another engine says to the
    tokens of it.

    Args:
        nonce: Nonce.
        tokens: Ids of the decoded tokens, [N] in uint32.
        sketches: Sketch of every 32nd state, [S, K] in float16.
        margins: How far the score of each token is below the best one where these tokens were
            replayed, [N] in float32; None in a proof.
    """

    nonce: int
    tokens: np.ndarray
    sketches: np.ndarray
    margins: np.ndarray | None = None


Record = DistanceRecord | VectorRecord | TokenRecord
"""One line of a proof: a nonce with a distance, a vector, or tokens and sketches."""


@dataclass(frozen=True, kw_only=True)
class Footer(LastLine):
    """Last line of a complete proof.

    Args:
        records: Number of records.
        valid: Number of those that count; all of them where nothing is called valid.
        seconds: Time that the proof took. Of a proof that was interrupted and continued, that of
            the last run alone.
        sha256: SHA-256 of the record lines.
    """

    __pydantic_config__: ClassVar = STRICT

    records: int
    valid: int
    seconds: Seconds
    sha256: str


def runs_of(nonces: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Return ascending nonces as few runs ``(first, end, step)``."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    while start < len(nonces):
        step = nonces[start + 1] - nonces[start] if start + 1 < len(nonces) else 1
        end = start + 1
        while end < len(nonces) and nonces[end] - nonces[end - 1] == step:
            end += 1
        runs.append((nonces[start], nonces[end - 1] + step, step))
        start = end
    return tuple(runs)


def is_valid(distance: float, r_target: float) -> bool:
    """Return whether a nonce counts: its distance is strictly below the target."""
    return distance < r_target


def is_distance(value: float) -> bool:
    """Return whether a number can be a distance: from 0 to 2, with room for the rounding of
    float32.
    """
    return 0 <= value <= MAX_DISTANCE


def check_distinct_seeds(round: Round, nonces: Iterable[int]) -> None:
    """Refuse nonces of which one forward pass would serve several, because their 32-bit input seeds
    collide.

    A node that may choose its nonces finds such groups by hashing alone. Among n nonces that were
    not chosen for it, n(n − 1)/2³³ pairs collide by chance. More repeated seeds than chance gives
    once in ten thousand are refused: any at all in up to 927 nonces. Seeds of 256 bits do not
    collide. A ProofMismatch names two nonces that share one.
    """
    if round.strength != 32:
        return
    nonces_N = np.fromiter(nonces, dtype=np.int64)
    parts = np.array_split(
        nonces_N, nonces_N.size // CHUNK + 1
    )  # the texts take far more room than the seeds
    seeds_N = np.concatenate(
        [streams.seeds(round.texts("inputs", part.tolist()))[:, 0] for part in parts]
    )
    order_N = np.argsort(seeds_N, kind="stable")
    equal = np.flatnonzero(np.diff(seeds_N[order_N]) == 0)
    pairs = nonces_N.size * (nonces_N.size - 1) / 2
    if equal.size and equal.size > scipy.stats.poisson.isf(CHANCE, pairs / 2**32):
        one, other = nonces_N[order_N[equal[0] : equal[0] + 2]]
        seen = (
            f"{equal.size} of {nonces_N.size} nonces with the input seed of another one, such as "
            f"{one} and {other}"
        )
        wanted = (
            "an input seed of its own for every nonce: one forward pass must not serve two of them"
        )
        do = (
            "ask the node for consecutive nonces of its share, or agree on strength = 256 in the "
            "pins"
        )
        raise ProofMismatch(seen, wanted=wanted, do=do, field="nonces")


def encode_vector(vector: np.ndarray, dtype: str = "<f2") -> str:
    """Return numbers of any shape as base64 of their little-endian bytes: float16, or token ids in
    ``<u4``.
    """
    return base64.b64encode(np.asarray(vector).astype(dtype).tobytes()).decode("ascii")


def decode_vector(text: object, size: int, dtype: str = "<f2") -> np.ndarray:
    """Return the finite numbers that base64 stands for, float16 [K] or ids in ``<u4``; else a
    ProofFormatError.
    """
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


def pack_record(record: Record) -> bytes:
    """Return the bytes of a record that is no distance: the vector, or the tokens and after them
    the sketches.
    """
    if isinstance(record, TokenRecord):
        return record.tokens.astype("<u4").tobytes() + record.sketches.astype("<f2").tobytes()
    assert isinstance(record, VectorRecord)
    return record.vector.astype("<f2").tobytes()


def unpack_record(nonce: int, text: object, pipeline: Pipeline) -> Record:
    """Return the record whose bytes, in base64, another machine sent; a ProofFormatError where they
    hold no record.
    """
    if pipeline.output == "vector":
        return VectorRecord(nonce, decode_vector(text, pipeline.vector_size))
    tokens, sketches = np.split(
        decode_vector(text, packed_size(pipeline), "u1"), [4 * pipeline.steps]
    )
    if not np.isfinite(sketches.view("<f2")).all():
        raise format_error("sketches that are NaN or infinity", "finite float16 values")
    states = sketches.view("<f2").astype(np.float16).reshape(-1, pipeline.vector_size)
    return TokenRecord(nonce, tokens.view("<u4").astype(np.uint32), states)


def packed_size(pipeline: Pipeline) -> int:
    """Return the number of bytes that :func:`pack_record` makes of a record; 0 where a distance is
    published.
    """
    return 4 * pipeline.steps + 2 * pipeline.vector_size * pipeline.vector_count


def unpack_or_nan(nonce: int, text: object, pipeline: Pipeline) -> Record:
    """Return what :func:`unpack_record` returns, or a record of NaN, which is never a match, where
    it is not one.
    """
    try:
        return unpack_record(nonce, text, pipeline)
    except ProofFormatError:
        nothing = np.full((pipeline.vector_count, pipeline.vector_size), np.nan, dtype=np.float16)
        if pipeline.output == "vector":
            return VectorRecord(nonce, nothing[0])
        return TokenRecord(nonce, np.zeros(pipeline.steps, dtype=np.uint32), nothing)


def describe_packing(pipeline: Pipeline) -> dict[str, Any]:
    """Return how the bytes of :func:`pack_record` are to be read, as callbacks say it beside
    them.
    """
    form = {"dtype": "f16", "k_dim": pipeline.vector_size, "endian": "le"}
    return form | {"dtype": "u32+f16", "tokens": pipeline.steps} if pipeline.steps else form


@dataclass(frozen=True, eq=False)
class Proof(StrictFile):
    """A complete proof."""

    header: Header
    records: tuple[Record, ...]
    footer: Footer

    @property
    def round(self) -> Round:
        """The round for which it was made."""
        return self.header.round

    @property
    def distances(self) -> np.ndarray:
        """Distances [N] in float64; NaN where something else is published."""
        return np.array(
            [
                record.distance if isinstance(record, DistanceRecord) else math.nan
                for record in self.records
            ]
        )

    @property
    def valid_rate(self) -> float:
        """Share of the nonces that are valid."""
        return self.footer.valid / max(1, self.footer.records)

    @override
    def lines(self) -> list[str]:
        return [
            dumps(self.header.as_dict()),
            *map(self.header.line, self.records),
            self.footer.line(),
        ]

    @override
    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        number, line = next(lines, (1, b""))
        header = parse_line(
            path, number, line, parse_header, lambda header: dumps(header.as_dict())
        )
        records: list[Record] = []
        digest = hashlib.sha256()
        for nonce in header.all_nonces():
            number, line = next(lines, (number + 1, b""))
            records.append(parse_record_line(path, number, line, header, nonce))
            digest.update(line)
        number, line = next(lines, (number + 1, b""))
        footer = Footer.read(path, number, line)
        proof = cls.build(header, records, footer.seconds, sha256=digest.hexdigest())
        if footer != proof.footer:
            seen = f"a footer that does not fit the records: {footer.line()}"
            raise line_error(path, number, seen, proof.footer.line())
        for number, _ in lines:
            raise line_error(path, number, "a line after the footer", "the end of the file")
        return proof

    @classmethod
    def build(
        cls, header: Header, records: Sequence[Record], seconds: float, *, sha256: str | None = None
    ) -> Self:
        """Return the proof of these records, with the footer that follows from them.

        Args:
            header: Header of the proof.
            records: Records of all its nonces, in order.
            seconds: Time that the proof took, as it is written; see :class:`Footer`.
            sha256: Hash of the record lines, if the caller has it already.

        Raises:
            UsageError: The header announces another number of records.
        """
        if len(records) != header.count:
            seen = f"{len(records)} records for {header.count} nonces"
            do = "compute the nonces that are missing"
            raise UsageError(seen, wanted="one record for each nonce of the header", do=do)
        if sha256 is None:
            sha256 = hashlib.sha256(
                "".join(f"{header.line(record)}\n" for record in records).encode()
            ).hexdigest()
        valid = sum(header.is_valid(record) for record in records)
        footer = Footer(records=len(records), valid=valid, seconds=seconds, sha256=sha256)
        return cls(header, tuple(records), footer)


@dataclass(frozen=True, kw_only=True)
class ModelLine:
    """What a header says of the model."""

    __pydantic_config__: ClassVar = STRICT

    reference: Text
    digest: Text
    weights: Text


@dataclass(frozen=True, kw_only=True)
class _FramedModelLine(ModelLine):
    frame: Annotated[str, Field(pattern=f"^({DIGEST.pattern})?$")] = ""


@dataclass(frozen=True, kw_only=True)
class _HeaderLine:
    __pydantic_config__: ClassVar = STRICT

    kind: Literal["assay.poc.proof"]
    schema: Literal[1]
    round: dict[str, Any]
    pipeline: dict[str, Any]
    model: _FramedModelLine
    fingerprint: Fingerprint
    nonces: Annotated[tuple[tuple[int, int, int], ...], FailFast()]


@dataclass(frozen=True, kw_only=True)
class _RecordLine:
    """The line of a nonce. Fields that a pipeline has not are left out, as the bytes of the line
    are compared.
    """

    __pydantic_config__: ClassVar = STRICT

    nonce: int
    distance: int | float = math.nan
    valid: bool = False
    vector: str = ""
    tokens: str = ""
    sketches: str = ""


def parse_header(line: bytes) -> Header:
    """Read the header line of a proof. Raises AssayError: the line is wrong; names what is."""
    read = read_as(_HeaderLine, line)
    if read.round.keys() != Round.__dataclass_fields__.keys():
        odd = ", ".join(sorted(read.round.keys() ^ Round.__dataclass_fields__.keys()))
        raise format_error(
            f"a round with {odd:.200} missing or unknown", ", ".join(Round.__dataclass_fields__)
        )
    round = Round(**read.round)
    fingerprint = read.fingerprint
    pipeline = get_pipeline(round.preset)
    if read.pipeline != json.loads(dumps(pipeline.as_dict())):  # tuples become lists
        raise format_error(
            f"another pipeline than this version's {pipeline.name}", "the same description"
        )
    if read.model.reference != round.model:
        raise format_error("two different model references", "one")
    if fingerprint.seq_len != round.seq_len or fingerprint.batch_size < 1:
        raise format_error(
            f"an engine of {fingerprint.batch_size} × {fingerprint.seq_len} positions",
            f"one for seq_len {round.seq_len}, of at least one row",
        )
    if pipeline.framed is not bool(read.model.frame):
        raise format_error("a frame, or none", "one for the presets that need it, and for no other")
    _check_runs(read.nonces, round)
    return Header(
        round=round,
        pipeline=pipeline,
        digest=read.model.digest,
        weights=read.model.weights,
        frame=read.model.frame,
        fingerprint=fingerprint,
        nonces=read.nonces,
    )


def parse_record_line(
    path: str | Path, number: int, line: bytes, header: Header, nonce: int
) -> Record:
    """Read the line of a nonce, line end included; a ProofFormatError names the file and the
    line.
    """
    if not line or line.startswith(FOOTER):
        wanted = f"the record of nonce {nonce}: the file is truncated"
        raise line_error(path, number, "the end of the records", wanted)
    return parse_line(
        path, number, line, lambda line: _parse_record(line, header, nonce), header.line
    )


def _parse_record(line: bytes, header: Header, nonce: int) -> Record:
    read = read_as(_RecordLine, line)
    pipeline = header.pipeline
    if read.nonce != nonce:
        raise format_error(
            f"nonce {read.nonce!r:.60}", f"nonce {nonce}, the next one that the header announces"
        )
    if pipeline.output == "vector":
        return VectorRecord(nonce, decode_vector(read.vector, pipeline.vector_size))
    if pipeline.output == "tokens":
        tokens = decode_vector(read.tokens, pipeline.steps, "<u4")
        sketches = decode_vector(read.sketches, pipeline.vector_count * pipeline.vector_size)
        return TokenRecord(nonce, tokens, sketches.reshape(pipeline.vector_count, -1))
    if not is_distance(read.distance):
        raise format_error(f"distance {read.distance!r:.60}", "a number in [0, 2]")
    return DistanceRecord(nonce, float(read.distance))


def _check_runs(runs: Sequence[tuple[int, int, int]], round: Round) -> None:
    """Refuse runs of nonces that do not ascend, or are not of the node of a round."""
    last = -1
    for first, end, step in runs:
        if not (last < first < end and step >= 1):
            raise format_error(f"run {[first, end, step]}", "runs that ascend without doubles")
        last = range(first, end, step)[-1]
        if last > MAX_NONCE:
            raise format_error(f"nonce {last}", f"nonces up to {MAX_NONCE}")
        if first % round.node_count != round.node_id or (last > first and step % round.node_count):
            raise format_error(
                f"run {[first, end, step]}", f"nonces of node {round.node_id} of {round.node_count}"
            )
    if not 0 < (count := sum(len(range(*run)) for run in runs)) <= MAX_COUNT:
        raise format_error(f"{count} nonces", f"at most {MAX_COUNT} in one proof, and one at least")
