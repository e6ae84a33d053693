"""Sampling parameters and noise seeds; :mod:`assay.poc.responses.sampler` has the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from assay import streams
from assay.errors import UsageError
from assay.poc.protocol.checks import check_digest, check_name, check_number, join_prefixed

# Largest token id: far beyond vocabularies, and what a reader has to make room for at most.
HIGHEST_TOKEN = 2**24 - 1

MOST_BIASES = 1024
RANGES = {
    "temperature": (0.01, 1000.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
"""Range of every parameter that is not a whole number; a temperature may also be 0, which means
greedy.
"""
BIASES = (-100.0, 100.0)
VERSION = "assay.responses/1"
# Highest index of a choice of a request, far above what a server gives.
HIGHEST_INDEX = 2**16 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The parameters of sampling.

    Args:
        temperature: Divisor of the logits, from 0.01; 0 takes the likeliest token.
        top_k: Number of likeliest tokens to keep; 0 keeps all.
        top_p: Probability that the kept tokens have together at least.
        min_p: Probability of a kept token at least, relative to the likeliest one.
        repetition_penalty: Divisor of positive, and factor of negative, logits of tokens in the
            prompt or the output.
        frequency_penalty: Number that is subtracted from a logit for every time the token is in the
            output.
        presence_penalty: Number that is subtracted from the logit of a token that is in the output.
        logit_bias: Numbers that are added to logits, by token id.

    Raises:
        UsageError: A parameter is out of range; names it.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9).as_dict()["top_p"]
        0.9
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            object.__setattr__(
                self,
                name,
                _number(name, getattr(self, name), low, high, zero=name == "temperature"),
            )
        check_number("top_k", self.top_k, 0, HIGHEST_TOKEN + 1)
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MOST_BIASES:
            raise UsageError(
                f"logit_bias is {self.logit_bias!r:.60}",
                wanted=f"numbers by token id, at most {MOST_BIASES}",
                do="correct logit_bias",
            )
        for token in self.logit_bias:
            check_number("a token of logit_bias", token, 0, HIGHEST_TOKEN)
        biases = {
            token: _number("a logit_bias", self.logit_bias[token], *BIASES)
            for token in sorted(self.logit_bias)
        }
        object.__setattr__(self, "logit_bias", biases)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the scores depend on the tokens before."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters in the order of a receipt, token ids as text."""
        return vars(self) | {
            "logit_bias": {str(token): bias for token, bias in self.logit_bias.items()}
        }


def mark_tokens(ids: Sequence[int], vocab_size: int) -> NDArray[np.bool_]:
    """Return which tokens of the vocabulary are among ids, bool [V]."""
    found_V = np.zeros(vocab_size, dtype=np.bool_)
    found_V[np.asarray(ids, dtype=np.int64)] = True
    return found_V


def counts_before(
    output: Sequence[int], vocab_size: int, start: int, stop: int
) -> NDArray[np.int32]:
    """Return the counts of every token before the steps ``start`` to ``stop - 1``, int32 [N, V]."""
    counts_NV = np.zeros((stop - start, vocab_size), dtype=np.int32)
    if stop > start:
        counts_NV[0] = np.bincount(np.asarray(output[:start], dtype=np.int64), minlength=vocab_size)
        counts_NV[
            np.arange(1, stop - start), np.asarray(output[start : stop - 1], dtype=np.int64)
        ] = 1
    return np.cumsum(counts_NV, axis=0, dtype=np.int32)


def _number(name: str, value: Any, low: float, high: float, *, zero: bool = False) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if plain and (low <= value <= high or (zero and value == 0)):
        return float(value) + 0.0  # no negative zero
    do = f"correct {name}, which is --{name.replace('_', '-')} on the command line"
    raise UsageError(
        f"{name} is {value!r:.60}",
        wanted=f"{'0, or ' if zero else ''}a number in [{low:g}, {high:g}]",
        do=f"correct {name}" if " " in name else do,
    )


Stream = Literal["tokens", "sketch"]


@dataclass(frozen=True, kw_only=True)
class ResponseName:
    """What a client calls a response.

    Raises:
        UsageError: A value is not printable, too long or out of range.
    """

    user_seed: str  # seed of the client; empty where it gave none
    request_id: str  # name of the request
    index: int = 0  # place among the answers that were asked for with one request

    def __post_init__(self) -> None:
        check_name(
            "user_seed",
            self.user_seed,
            fewest=0,
            do="pass the seed of the client, or an empty text where it gave none",
        )
        check_name("request_id", self.request_id, do="pass the id of the request")
        check_number("index", self.index, 0, HIGHEST_INDEX)

    @property
    def name(self) -> tuple[str, str, int]:
        """What sets the response apart from the others of one client's record."""
        return self.user_seed, self.request_id, self.index


@dataclass(frozen=True, kw_only=True)
class ResponseSeed(ResponseName):
    """The fields that seed the noise of one response.

    Args:
        user_seed, request_id, index: As of :class:`ResponseName`.
        public_key: Key of the node that serves it.
        digest: SHA-256 of the tensors of the checkpoint, in hex.
        block_hash: Beacon that became known after the request was accepted.

    Raises:
        UsageError: A value is not printable, too long or out of range.

    Example:
        >>> seed = ResponseSeed(
        ...     user_seed="", request_id="r1", public_key="K", digest="0" * 64, block_hash="B"
        ... )
        >>> seed.text()[:38]
        '17:assay.responses/16:tokens0:2:r11:K6'
    """

    public_key: str
    digest: str
    block_hash: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_hash(self.block_hash)
        check_name("public_key", self.public_key, do="pass the public key as the chain prints it")
        check_digest("digest", self.digest)

    def text(self, stream: Stream = "tokens") -> str:
        """Return the seed text of a stream: tag, stream and fields, each after its byte length."""
        fields = (
            self.user_seed,
            self.request_id,
            self.public_key,
            self.digest,
            self.block_hash,
            self.index,
        )
        return join_prefixed(VERSION, stream, *fields)

    def words(self, stream: Stream = "tokens") -> NDArray[np.uint32]:
        """Return SHA-256 of the seed text of a stream as 8 big-endian words, uint32 [8]."""
        return np.asarray(streams.seeds([self.text(stream)], 256), np.uint32).reshape(8)

    def step_seeds(self, steps: Sequence[int], stream: Stream = "tokens") -> NDArray[np.uint32]:
        """Return the 32-bit seeds of a stream's steps, uint32 [N]; step 0 gives the first token."""
        return step_seeds(self.words(stream), steps)


def step_seeds(words: NDArray[np.uint32], steps: Sequence[int]) -> NDArray[np.uint32]:
    """Return the 32-bit seeds of steps, uint32 [N], from the words of a stream, uint32 [8]."""
    seeds_1N: NDArray[np.uint32] = streams.step_seeds(words[None], np.asarray(steps, np.uint32))
    return seeds_1N.reshape(-1)


def check_block_hash(block_hash: object) -> None:
    """Refuse a block hash that cannot be part of a seed text; a UsageError names it."""
    check_name("block_hash", block_hash, do="pass the block hash as the chain prints it")
