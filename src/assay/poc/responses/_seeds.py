"""The seed of a response: fixed by what no server can choose alone, before the first token is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from assay import streams
from assay.errors import UsageError
from assay.poc.protocol import check_name, check_number, prefixed

VERSION = "assay.responses/1"
HIGHEST_INDEX = 2**16 - 1
"""Highest index of a choice of a request, far above what a server gives."""
_HEX = frozenset("0123456789abcdef")

Stream = Literal["tokens", "sketch"]


@dataclass(frozen=True, kw_only=True)
class ResponseSeed:
    """What the noise of one response follows from.

    Args:
        user_seed: Seed of the client; empty where it gave none.
        request_id: Name of the request.
        public_key: Key of the node that serves it.
        digest: SHA-256 of the tensors of the checkpoint, in hex.
        block_hash: Beacon that became known after the request was accepted.
        index: Place among the answers that were asked for with one request.

    Raises:
        UsageError: A value is not printable, too long or out of range.

    Example:
        >>> seed = ResponseSeed(user_seed="", request_id="r1", public_key="K", digest="0" * 64, block_hash="B")
        >>> seed.text[:38]
        '17:assay.responses/16:tokens0:2:r11:K6'
    """

    user_seed: str
    request_id: str
    public_key: str
    digest: str
    block_hash: str
    index: int = 0

    def __post_init__(self) -> None:
        check_request_texts(user_seed=self.user_seed, request_id=self.request_id)
        check_block_hash(self.block_hash)
        check_name("public_key", self.public_key, do="pass the public key as the chain prints it")
        check_digest("digest", self.digest)
        check_number("index", self.index, 0, HIGHEST_INDEX)

    @property
    def text(self) -> str:
        """The seed text of the noise of tokens."""
        return self.text_of("tokens")

    def text_of(self, stream: Stream) -> str:
        """Return the seed text of a stream: tag, stream and every field, each after its length in UTF-8 bytes."""
        fields = (self.user_seed, self.request_id, self.public_key, self.digest, self.block_hash, self.index)
        return prefixed(VERSION, stream, *fields)

    def words(self, stream: Stream = "tokens") -> NDArray[np.uint32]:
        """Return SHA-256 of the seed text of a stream as 8 big-endian words, uint32 [8]."""
        words_18: NDArray[np.uint32] = streams.seeds([self.text_of(stream)], 256)
        return words_18.reshape(8)

    def step_seeds(self, steps: Sequence[int], stream: Stream = "tokens") -> NDArray[np.uint32]:
        """Return the 32-bit seeds of steps of a stream, uint32 [N]. Step 0 gives the first token of the output."""
        return step_seeds(self.words(stream), steps)


def step_seeds(words: NDArray[np.uint32], steps: Sequence[int]) -> NDArray[np.uint32]:
    """Return the 32-bit seeds of steps, uint32 [N].

    Args:
        words: Words of the stream, uint32 [8].
        steps: Steps, each at least 0.
    """
    seeds_1N: NDArray[np.uint32] = streams.step_seeds(words[None], np.asarray(steps, np.uint32))
    return seeds_1N.reshape(-1)


def check_request_texts(*, user_seed: object, request_id: object) -> None:
    """Refuse texts of a request that cannot be parts of a seed text.

    Raises:
        UsageError: Names the first of them.
    """
    check_name("user_seed", user_seed, fewest=0, do="pass the seed of the client, or an empty text where it gave none")
    check_name("request_id", request_id, do="pass the id of the request")


def check_block_hash(block_hash: object) -> None:
    """Refuse a block hash that cannot be part of a seed text.

    Raises:
        UsageError: Names it.
    """
    check_name("block_hash", block_hash, do="pass the block hash as the chain prints it")


def check_digest(name: str, value: Any) -> None:
    """Refuse what is not a SHA-256 in lower-case hexadecimal digits.

    Raises:
        UsageError: Names the value.
    """
    if not isinstance(value, str) or len(value) != 64 or not _HEX.issuperset(value):
        raise UsageError(
            f"{name} is {value!r:.80}", wanted="a SHA-256: 64 lower-case hexadecimal digits", do=f"correct the {name}"
        )
