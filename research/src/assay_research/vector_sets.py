"""Sets of nonce vectors as networks publish them, without a proof around them, and the noise that
they measure.

A file has one JSON object a line, and may be compressed with gzip. A line has ``set``,
``block_hash``, ``public_key``, ``seq_len``, ``k_dim``, ``nonces`` and ``vectors`` (base64 of
little-endian float16, K numbers each). It may have ``config`` with ``model``, ``gpu`` and
``batch_size``. A file may be hostile, so every size is bounded before anything is read or made.

Legend of shapes: N nonces, K published numbers.
"""

import base64
import binascii
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.errors import DataError
from assay.files.jsonl import JsonObject, loads, read_lines
from assay.files.reading import read_whole
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.verdict.build_noise import Machine
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.machine_fit import fit_build
from assay.poc.verdict.proof_calibration import check_compared

LARGEST_FILE = 2**28  # bytes, as it is stored
LARGEST_CONTENT = 2**29  # bytes, without gzip
LONGEST_LINE = 2**26
MOST_SETS = 4096
MOST_NONCES = 2**20
MOST_NUMBERS = 4096  # in a file, in a set, in a vector
LARGEST_NONCE = 2**63 - 1
LARGEST_SEQ_LEN = 2**31 - 1
LARGEST_BATCH = 2**20
LONGEST_NAME = 256

_KIND = re.compile(
    r"(?:^|[^a-z0-9]|\dx)((?:gb|gh|[abhlv])\d{1,3}s?|mi\d{3}x?|gaudi ?\d)(?![a-z0-9])"
)
_RTX = re.compile(r"rtx[ _-]?(pro|a)?[ _-]?(\d{4})")


@dataclass(frozen=True, kw_only=True)
class VectorSet:
    """Vectors of one machine as networks publish them, without a proof around them.

    Args:
        name: Name of the set.
        kind: Kind of machine, such as its GPU; empty where it is not known.
        block_hash: Block that seeded them.
        public_key: Key of the node.
        seq_len: Number of positions of a nonce.
        vectors: Vector [K] of every nonce, in the order in which they were computed.
        model: Name of the model; empty where it is not known.
        batch_size: Number of nonces of a batch; None where it is not known.
    """

    name: str
    kind: str
    block_hash: str
    public_key: str
    seq_len: int
    vectors: Mapping[int, npt.NDArray[np.float64]] = field(repr=False)
    model: str = ""
    batch_size: int | None = None

    @property
    def round(self) -> tuple[Any, ...]:
        """What two sets must share to be compared."""
        return (
            self.block_hash,
            self.public_key,
            self.seq_len,
            len(next(iter(self.vectors.values()))),
        )

    def common(self, other: "VectorSet") -> list[int]:
        """Return the nonces that both have, in ascending order."""
        return sorted(self.vectors.keys() & other.vectors.keys())

    def distances(self, other: "VectorSet") -> npt.NDArray[np.float64]:
        """Return the L2 distances [N] of the nonces that both have, in ascending order of the
        nonces.
        """
        common = self.common(other)
        mine, theirs = (
            np.array([vector_set.vectors[n] for n in common]) for vector_set in (self, other)
        )
        return np.asarray(np.linalg.norm(mine - theirs, axis=1)) if common else np.zeros(0)

    def positions(self, nonces: list[int]) -> npt.NDArray[np.int64]:
        """Return the index of every nonce [N] in the order in which this set was computed."""
        places = {nonce: index for index, nonce in enumerate(self.vectors)}
        return np.array([places[nonce] for nonce in nonces], dtype=np.int64)


def read_vector_sets(path: str | Path) -> list[VectorSet]:
    """Read a file of sets, strictly.

    Args:
        path: JSON Lines, or gzip of them.

    Raises:
        DataError: The file cannot be read, is too large, or a line is not a set; names the line.
    """
    sets: list[VectorSet] = []
    for number, line in _lines(Path(path)):
        where = f"{path}, line {number}"
        if len(sets) >= MOST_SETS:
            raise _bad(where, f"more than {MOST_SETS} sets", "fewer")
        sets.append(_vector_set(loads(line, where), where))
        if sets[-1].name in {earlier.name for earlier in sets[:-1]}:
            raise _bad(where, f"set {sets[-1].name!r} twice", "every name once")
    if not sets:
        raise _bad(str(path), "no set", "one set a line")
    return sets


def machine_kind(gpu: str) -> str:
    """Return the kind of a machine by the name of its GPU or of its set, such as ``h200``; empty
    where none is known.

    Example:
        >>> names = "NVIDIA H100 80GB HBM3", "4xa100_sxm4", "RTX PRO 6000 Blackwell"
        >>> [machine_kind(name) for name in names]
        ['h100', 'a100', 'rtxpro6000']
    """
    words = gpu.lower()
    if rtx := _RTX.search(words):
        return "rtx" + "".join(part or "" for part in rtx.groups())
    kind = _KIND.search(words)
    return kind[1].replace(" ", "") if kind else ""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, gzip undone."""
    if path.suffix != ".gz":
        room = LARGEST_CONTENT
        for number, line in read_lines(path):
            room -= len(line)
            if room < 0:
                raise _bad(str(path), f"longer than {LARGEST_CONTENT} bytes", "a smaller file")
            yield number, line
        return
    unpacked = zlib.decompressobj(wbits=31)
    try:
        text = unpacked.decompress(read_whole(path, LARGEST_FILE), LARGEST_CONTENT + 1)
    except zlib.error as error:
        raise _bad(str(path), f"no gzip ({error})", "JSON Lines in one gzip stream") from None
    if len(text) > LARGEST_CONTENT:
        raise _bad(
            str(path), f"longer than {LARGEST_CONTENT} bytes when unpacked", "a smaller file"
        )
    if not unpacked.eof or unpacked.unused_data:
        raise _bad(
            str(path),
            "gzip that is cut off, or has something after it",
            "JSON Lines in one gzip stream",
        )
    for number, line in enumerate(
        io.BytesIO(text), 1
    ):  # one at a time: a list of all takes many times their size
        if len(line) > LONGEST_LINE:
            raise _bad(
                f"{path}, line {number}", f"longer than {LONGEST_LINE} bytes", "shorter lines"
            )
        yield number, line


def _vector_set(row: JsonObject, where: str) -> VectorSet:
    config = row.get("config") or {}
    if not isinstance(config, dict):
        raise _bad(
            where,
            "a config that is no object",
            "an object with model, gpu and batch_size, or nothing",
        )
    name = _text(row, "set", where)
    batch = config.get("batch_size")
    size = _whole(row.get("k_dim"), "k_dim", 2, MOST_NUMBERS, where)
    return VectorSet(
        name=name,
        kind=machine_kind(_text(config, "gpu", where, "")) or machine_kind(name),
        block_hash=_text(row, "block_hash", where),
        public_key=_text(row, "public_key", where),
        seq_len=_whole(row.get("seq_len"), "seq_len", 1, LARGEST_SEQ_LEN, where),
        vectors=_vectors(row.get("nonces"), row.get("vectors"), size, where),
        model=_text(config, "model", where, ""),
        batch_size=None if batch is None else _whole(batch, "batch_size", 1, LARGEST_BATCH, where),
    )


def _vectors(nonces: Any, texts: Any, size: int, where: str) -> dict[int, npt.NDArray[np.float64]]:
    """Return the vectors [K] by nonce."""
    if not isinstance(nonces, list) or not isinstance(texts, list) or len(nonces) != len(texts):
        raise _bad(
            where, "nonces and vectors that are not two lists of one length", "one vector per nonce"
        )
    if not 1 <= len(nonces) <= MOST_NONCES:
        raise _bad(where, f"{len(nonces)} nonces", f"1 to {MOST_NONCES}")
    for nonce in nonces:
        _whole(nonce, "nonce", 0, LARGEST_NONCE, where)
    if len(set(nonces)) < len(nonces):
        raise _bad(where, "a nonce twice", "every nonce once")
    length = 4 * math.ceil(2 * size / 3)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or len(text) != length:
            raise _bad(
                where,
                f"vector {index} of another length",
                f"{length} characters, {size} float16 in base64",
            )
    try:
        raw = b"".join(base64.b64decode(text, validate=True) for text in texts)
    except (binascii.Error, ValueError):
        raise _bad(where, "a vector that is not base64", f"base64 of {size} float16") from None
    if len(raw) != 2 * size * len(texts):
        raise _bad(where, "a vector of another length", f"base64 of {size} float16")
    values_NK = np.frombuffer(raw, "<f2").reshape(-1, size).astype(np.float64)
    odd = np.flatnonzero(~np.isfinite(values_NK).all(axis=1))
    if odd.size:
        raise _bad(
            where, f"a vector of nonce {nonces[odd[0]]} that is not finite", "finite numbers"
        )
    return dict(zip(nonces, values_NK, strict=True))


def _text(row: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if (
        not isinstance(value, str)
        or len(value) > LONGEST_NAME
        or not (value.isprintable() and (value or default == ""))
    ):
        raise _bad(
            where, f"{name} {value!r:.60}", f"a text of at most {LONGEST_NAME} printable characters"
        )
    return value


def _whole(value: Any, name: str, low: int, high: int, where: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _bad(where, f"{name} {value!r:.60}", f"a whole number from {low} to {high}")
    return value


def _bad(where: str, seen: str, wanted: str) -> DataError:
    return DataError(
        f"{where}: {seen}",
        wanted=wanted,
        do="pass a file of sets: set, config, block_hash, public_key, seq_len, k_dim, nonces, "
        "vectors",
    )


def calibrate_vectors(
    sets: Sequence[VectorSet],
    *,
    digest: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure the noise of a build from sets of vectors that honest machines published.

    Args:
        sets: Vectors of the preset ``artifact``, one set of every machine.
        digest: SHA-256 of the checkpoint, which the sets do not say; a law without one judges no
            proof.
        progress: Function that is called with (machines left out, machines in all).

    Raises:
        ProofMismatch: Fewer than two sets are of one round, or they have fewer than 30 nonces in
            common.
    """
    measured = {
        (i, j): sets[i].distances(sets[j])
        for i, j in combinations(range(len(sets)), 2)
        if sets[i].round == sets[j].round
    }
    check_compared(measured, len(sets))
    pipeline = get_pipeline("artifact")
    machines = tuple(
        Machine(name=vector_set.name, kind=vector_set.kind, fingerprint=None) for vector_set in sets
    )
    return Calibration(
        builds=(fit_build(measured, machines, pipeline, digest=digest, progress=progress),)
    )
