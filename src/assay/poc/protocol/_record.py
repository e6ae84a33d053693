"""The parts of a proof file: JSON Lines with a header, one record per nonce, and a footer.

    {"kind":"assay.poc.proof","schema":1,"round":…,"pipeline":…,"model":…,"fingerprint":…,"nonces":…}
    {"nonce":0,"distance":1.4131,"valid":true}        or  {"nonce":0,"vector":"base64"}
    {"footer":{"records":256,"valid":151,"seconds":8.1,"sha256":"…"}}

The SHA-256 covers the bytes of the record lines, newlines included. Reading is strict: anything that is not exactly a
proof, spaces and the order of keys included, is an error that names the line.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from scipy import stats as distributions

from assay import streams
from assay.errors import ProofFormatError, ProofMismatch
from assay.poc.protocol._pipelines import Pipeline
from assay.poc.protocol._round import Round
from assay.reports import dumps

KIND = "assay.poc.proof"
SCHEMA = 1
SEPARATOR = ", "  # between the library and its kernels

# Points of the unit sphere are at most 2 apart. Both vectors are scaled to length one in float32, so each may be a few
# units in the last place too long (1.2e-7 each), and the norm of their difference may round up once more.
MAX_DISTANCE = 2 + 1e-6
CHANCE = 1e-4  # that honest nonces are refused because their seeds happen to collide
CHUNK = 2**16


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything about an engine that can move the last bits of a hidden state.

    Two engines with equal fingerprints return equal bits. Noise between two different ones is what a calibration
    measures.

    Args:
        engine: Name of the engine, for instance ``hf`` or ``vllm``.
        device: Name of the processor or GPU.
        dtype: Number format of the weights.
        attention: Name of the attention implementation.
        batch_size: Number of nonces of a batch.
        seq_len: Number of positions of a nonce.
        threads: Number of CPU threads; 0 on a GPU.
        torch: Version of torch.
        library: Library that runs the model, and its version.
        kernels: Choices beside the defaults of that library, for instance ``compiled`` or ``tp 2``. In a file they
            follow the library in one text, joined by commas.
    """

    engine: str
    device: str
    dtype: str
    attention: str
    batch_size: int
    seq_len: int
    threads: int
    torch: str
    library: str
    kernels: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the proof header, with the kernels joined to the library."""
        values = asdict(self)
        values["library"] = SEPARATOR.join([self.library, *values.pop("kernels")])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Fingerprint":
        """Return the fingerprint that :meth:`as_dict` wrote.

        Raises:
            KeyError: the library is missing.
            TypeError: another field is missing or unknown.
        """
        library, *kernels = values["library"].split(SEPARATOR)
        return cls(**{**values, "library": library}, kernels=tuple(kernels))

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
        fingerprint: Description of the prover's engine.
        nonces: Nonces of the records, in order, as runs ``[first, end, step]``.
    """

    round: Round
    pipeline: Pipeline
    digest: str
    weights: str
    fingerprint: Fingerprint
    nonces: tuple[tuple[int, int, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the header line."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "round": self.round.as_dict(),
            "pipeline": self.pipeline.as_dict(),
            "model": {"reference": self.round.model, "digest": self.digest, "weights": self.weights},
            "fingerprint": self.fingerprint.as_dict(),
            "nonces": [list(run) for run in self.nonces],
        }

    def all_nonces(self) -> Iterator[int]:
        """Iterate over the nonces in the order of the records."""
        for run in self.nonces:
            yield from range(*run)

    @property
    def count(self) -> int:
        """Number of records that a complete proof has."""
        return sum(len(range(*run)) for run in self.nonces)

    def claims(self) -> dict[str, Any]:
        """Return everything that the prover chose and a validator can pin, by the names of :class:`Pins`."""
        of_model = {"digest": self.digest, "weights": self.weights}
        of_engine = {"prover_dtype": self.fingerprint.dtype, "builds": self.fingerprint}
        return {
            **self.round.as_dict(),
            **of_model,
            **of_engine,
            "nonces": self.nonces,
            "fewest_nonces": self.count,
        }

    def line(self, record: "Record") -> str:
        """Return the line of a record, without its newline."""
        if isinstance(record, VectorRecord):
            return dumps({"nonce": record.nonce, "vector": encode_vector(record.vector)})
        return dumps({"nonce": record.nonce, "distance": record.distance, "valid": self.is_valid(record)})

    def is_valid(self, record: "Record") -> bool:
        """Return whether a record counts: every vector does, and a distance below the target."""
        return isinstance(record, VectorRecord) or is_valid(record.distance, self.round.r_target)


@dataclass(frozen=True, eq=False)
class DistanceRecord:
    """The result of one nonce under a preset that publishes distances."""

    nonce: int
    distance: float
    vector: ClassVar[None] = None  # `record.vector is None` tells the two kinds apart, for type checkers too


@dataclass(frozen=True, eq=False)
class VectorRecord:
    """The result of one nonce under a preset that publishes vectors: [K] in float16."""

    nonce: int
    vector: np.ndarray


Record = DistanceRecord | VectorRecord


@dataclass(frozen=True, kw_only=True)
class Footer:
    """Last line of a complete proof."""

    records: int
    valid: int
    seconds: float
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the footer line."""
        return {"footer": asdict(self)}


def is_valid(distance: float, r_target: float) -> bool:
    """Return whether a nonce counts: its distance is strictly below the target."""
    return distance < r_target


def is_distance(value: float) -> bool:
    """Return whether a number can be a distance: from 0 to 2, with room for the rounding of float32."""
    return 0 <= value <= MAX_DISTANCE


def check_distinct_seeds(round: Round, nonces: Iterable[int]) -> None:
    """Refuse nonces of which one forward pass would serve several, because their 32-bit input seeds collide.

    A node that may choose its nonces finds such groups by hashing alone. Among n nonces that were not chosen for it,
    n(n − 1)/2³³ pairs collide by chance. More repeated seeds than chance gives once in ten thousand are refused: any
    at all in up to 927 nonces. Seeds of 256 bits do not collide.

    Args:
        round: Round that the nonces belong to, with the key of the node that proves.
        nonces: Nonces of one proof or of one request, each once.

    Raises:
        ProofMismatch: Too many of the seeds are equal; names two nonces that share one.
    """
    if round.strength != 32:
        return
    nonces_N = np.fromiter(nonces, dtype=np.int64)
    parts = np.array_split(nonces_N, nonces_N.size // CHUNK + 1)  # the texts take far more room than the seeds
    seeds_N = np.concatenate([streams.seeds(round.texts("inputs", part.tolist()))[:, 0] for part in parts])
    order_N = np.argsort(seeds_N, kind="stable")
    equal = np.flatnonzero(np.diff(seeds_N[order_N]) == 0)
    pairs = nonces_N.size * (nonces_N.size - 1) / 2
    if equal.size > distributions.poisson.isf(CHANCE, pairs / 2**32):
        one, other = nonces_N[order_N[equal[0] : equal[0] + 2]]
        raise ProofMismatch(
            f"{equal.size} of {nonces_N.size} nonces with the input seed of another one, such as {one} and {other}",
            wanted="an input seed of its own for every nonce: one forward pass must not serve two of them",
            do="ask the node for consecutive nonces of its share, or agree on --strength 256",
        )


def encode_vector(vector_K: np.ndarray) -> str:
    """Return a float16 vector [K] as base64 of its little-endian bytes."""
    return base64.b64encode(np.asarray(vector_K).astype("<f2").tobytes()).decode("ascii")


def decode_vector(text: object, size: int) -> np.ndarray:
    """Return the float16 vector [K] that a base64 string stands for.

    Raises:
        ProofFormatError: The value is not a string, not base64, of another length, or not finite.
    """
    try:
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__}")
        raw = base64.b64decode(text, validate=True)
        if len(raw) != 2 * size:
            raise ValueError(f"{len(raw)} bytes")
        vector = np.frombuffer(raw, dtype="<f2").astype(np.float16)
        if not np.isfinite(vector).all():
            raise ValueError("NaN or infinity")
    except ValueError as error:
        raise ProofFormatError(
            f"a vector that is {error}",
            wanted=f"base64 of {size} finite little-endian float16 values",
            do="ask the prover for a new proof",
        ) from None
    return vector
