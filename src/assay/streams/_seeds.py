"""Seed texts to seeds: the first bytes of SHA-256, read big endian.

Shapes: ``B`` seed texts, ``S`` sub-seeds for each (1 or 8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError


def seed32(text: str) -> int:
    """Return the 32-bit seed of a stream: the first 4 bytes of SHA-256 of the UTF-8 text, big endian.

    Raises:
        UsageError: ``text`` is not a string.
    """
    return int.from_bytes(_sha256(text)[:4], "big")


def seeds(texts: Sequence[str], strength: int = 32) -> npt.NDArray[np.uint32]:
    """Return the seeds of many streams, uint32 ``[B, S]``.

    ``S`` is 1 at strength 32 and 8 at strength 256: the big-endian words of the digest. Word 0 is :func:`seed32`.

    Raises:
        UsageError: ``texts`` is one string or holds something else than strings, or the strength is neither 32 nor 256.
    """
    if isinstance(texts, str):
        raise UsageError(f"one seed text {texts!r}", wanted="a sequence of seed texts", do="write seeds([text])")
    if strength not in (32, 256):
        raise UsageError(f"strength {strength!r}", wanted="32 or 256", do="use 32, the published format, or 256")
    digests = b"".join(_sha256(text) for text in texts)
    words_BW = np.frombuffer(digests, dtype=">u4").reshape(-1, 8)
    return words_BW[:, : strength // 32].astype(np.uint32)


def _sha256(text: str) -> bytes:
    if not isinstance(text, str):
        raise UsageError(f"seed text {text!r}", wanted="a string", do="pass the seed text of the stream as str")
    try:
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"seed text {text!r}", wanted="text that UTF-8 can encode", do="remove lone surrogates"
        ) from error
