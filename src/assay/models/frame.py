"""The frame of a checkpoint: the tokens of its nonces, and the mean and scale of its states.

A state h after the final norm becomes (h − mean) / scale, coordinate by coordinate. A trained model
has most of the energy of its states in a few coordinates and in one common direction; in the frame
every coordinate counts alike. A network makes the frame of its checkpoint once (``assay poc
frame``) and publishes the file, so that all nodes and validators use the same numbers. The proof
and the pins name it by its SHA-256.

The frame is measured on :data:`SEQUENCES` sequences of random tokens, over the positions that
nonces are read at: sequence i has the tokens of the seeds i·T to (i + 1)·T − 1 of the text
``frame`` of the checkpoint's digest.

The file is one safetensors: ``mean`` and ``scale`` [D] in float32, ``left_out`` [E] in int32, and
one entry of metadata.

Legend of shapes: V tokens of the vocabulary, D hidden size, E ids that are left out, B nonces, T
positions.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt32
from safetensors.numpy import load, save

from assay.errors import DataError, UsageError
from assay.files.jsonl import dumps, parse
from assay.files.reading import read_whole
from assay.files.storage import write_atomic

SEQUENCES = 64
"""Sequences that a frame is measured on."""

POSITIONS = 64
"""Length of these sequences, where the model takes it."""

MOST_ROWS = 2**24
"""Rows of the largest vocabulary."""

LARGEST_FILE = 2**25  # bytes
_LARGEST_HEADER = 2**12  # bytes
_DIGEST = re.compile("[0-9a-f]{64}")
_KIND = "assay.poc.frame"


@dataclass(frozen=True, eq=False)
class Frame:
    """What the preset ``tokens-1`` needs of a checkpoint beside its weights.

    Args:
        digest: SHA-256 of the checkpoint.
        weights: Weight mode of the model.
        rows: Number V of rows of its embeddings.
        left_out: Ids that no nonce has, [E], ascending: special tokens, and rows without a token.
        mean: Mean of every coordinate of a state, [D].
        scale: Standard deviation of every coordinate, [D], above 0.

    Raises:
        UsageError: A value is out of range, or the arrays do not fit together.

    Example:
        >>> ones = np.ones(4, np.float32)
        >>> left_out = np.array([0, 1], np.int32)
        >>> frame = Frame("0" * 64, "trained", 8, left_out, mean=0 * ones, scale=ones)
        >>> frame.tokens(np.array([[0, 2**31, 2**32 - 1]], np.uint32)).tolist()
        [[2, 5, 7]]
    """

    digest: str
    weights: str
    rows: int
    left_out: Int32[np.ndarray, " E"]
    mean: Float32[np.ndarray, " D"]
    scale: Float32[np.ndarray, " D"]
    sha256: str = field(init=False, default="")  # of the file

    def __post_init__(self) -> None:
        left_out = self.left_out.ravel()
        first, last = left_out[[0, -1]] if left_out.size else (0, 0)
        is_sorted = bool((left_out[1:] > left_out[:-1]).all())
        are_rows = self.left_out.ndim == self.mean.ndim == 1 and self.mean.shape == self.scale.shape
        for holds, fault, wanted in (
            (
                _DIGEST.fullmatch(str(self.digest)),
                f"the digest {self.digest!r:.80}",
                "64 hexadecimal digits",
            ),
            (
                type(self.rows) is int and 1 <= self.drawn <= self.rows <= MOST_ROWS,
                f"{self.drawn} of {self.rows!r:.20} rows",
                f"1 to {MOST_ROWS} rows, some of which are drawn",
            ),
            (
                is_sorted and 0 <= first <= last < max(1, self.rows),
                "ids in another order, twice, or without a row",
                "ascending ids below the number of rows",
            ),
            (
                are_rows and np.isfinite(self.mean).all() and np.isfinite(self.scale).all(),
                "a mean or a scale that is not finite",
                "finite rows of one length",
            ),
            (
                (self.scale > 1e-37).all(),
                "a scale of 0 or less, or next to it",
                "scales above 0",
            ),
        ):
            if not holds:
                raise UsageError(
                    f"a frame with {fault}",
                    wanted=wanted,
                    do="make it again with `assay poc frame`",
                )
        object.__setattr__(self, "sha256", hashlib.sha256(self.to_bytes()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and other.sha256 == self.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def tokens(self, seeds_BT: UInt32[np.ndarray, "B T"]) -> Int64[np.ndarray, "B T"]:
        """Return the token of every 32-bit seed s: number ⌊s·(V − E)/2³²⌋ of the drawn ids."""
        places_BT = (seeds_BT.astype(np.uint64) * np.uint64(self.drawn)) >> np.uint64(32)
        return places_BT.astype(np.int64) + np.searchsorted(
            self.before, places_BT.astype(np.int64), side="right"
        )

    @property
    def drawn(self) -> int:
        """Number of ids that nonces draw from."""
        return self.rows - len(self.left_out)

    @property
    def before(self) -> Int64[np.ndarray, " E"]:
        """For each excluded token id, how many allowed ids are smaller."""
        return self.left_out.astype(np.int64) - np.arange(len(self.left_out))

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        arrays = {
            "left_out": self.left_out.astype("<i4"),
            "mean": self.mean.astype("<f4"),
            "scale": self.scale.astype("<f4"),
        }
        facts = {
            "kind": _KIND,
            "schema": 1,
            "digest": self.digest,
            "weights": self.weights,
            "rows": self.rows,
        }
        # One entry of metadata: the order of several is not fixed.
        return save(arrays, metadata={_KIND: dumps(facts)})

    @classmethod
    def from_bytes(cls, content: bytes, source: str | Path = "a frame") -> "Frame":
        """Return the frame that :meth:`to_bytes` wrote.

        Raises:
            DataError: The bytes are something else, or written in another way.
        """
        try:
            frame = cls._parse(content)
        except UsageError as error:
            raise DataError(f"{source}: {error.seen}", wanted=error.wanted, do=error.do) from None
        # The library and the JSON of a hostile file fail with exceptions of many kinds.
        except Exception as error:
            raise DataError(
                f"{source}: {type(error).__name__}: {error}"[:200],
                wanted="a frame",
                do="make it with `assay poc frame`, or fetch it again",
            ) from None
        if frame.to_bytes() != content:
            raise DataError(
                f"{source} in another form than it is written in",
                wanted="the bytes that `assay poc frame` wrote",
                do="fetch the file again",
            )
        return frame

    @classmethod
    def _parse(cls, content: bytes) -> "Frame":
        # A header of more tensors is cut, and then it is no JSON.
        size = min(int.from_bytes(content[:8], "little"), _LARGEST_HEADER)
        metadata = parse(content[8 : 8 + size].decode())["__metadata__"]
        facts: dict[str, Any] = parse(metadata[_KIND])
        arrays = load(content)
        return cls(
            facts["digest"],
            facts["weights"],
            facts["rows"],
            arrays["left_out"],
            arrays["mean"],
            arrays["scale"],
        )

    @classmethod
    def load(cls, path: str | Path) -> "Frame":
        """Read a file of at most 32 MiB.

        Raises:
            DataError: It cannot be read, is larger, or is no frame.
        """
        return cls.from_bytes(read_whole(path, LARGEST_FILE), path)

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            StorageError: It cannot be written.
        """
        write_atomic(path, self.to_bytes())
