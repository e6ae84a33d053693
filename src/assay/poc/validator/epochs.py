"""Secrets that seed samples: committed before use, secret during it, published afterwards.

The commitment of an epoch is SHA-256(secret ‖ epoch), with the number of the epoch in eight bytes,
the highest first; it is published one whole epoch ahead. A message that arrives in an epoch is
drawn from with

    seed  = the first 53 bits of HMAC-SHA-256(secret, tag ‖ key ‖ id ‖ SHA-256(body))
    order = its new nonces, sorted by SHA-256(seed ‖ nonce), both in eight bytes,

and the nonces that are recomputed are the first ones of that order. Of the messages of a node, the
one with the lowest

    turn  = (nonces drawn before + seed / 2^53 · min(sample, nonces)) / nonces

is next. So of every message the same share is drawn, however a node divides its nonces into
messages. A node that does not have the secret cannot tell which they are. The validator could not
choose them: who has the published secret draws them again.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

SECRET_BYTES = 32
SEED_BITS = 53  # exact in every reader of JSON
TAG = b"assay.poc.validator/1"


@dataclass(frozen=True)
class Epoch:
    """A time in which one secret draws the samples."""

    number: int  # number of the epoch, from 1
    secret: bytes  # secret of 32 bytes
    begins: float | None  # time at which it began, in seconds; None before
    ends: float | None  # time at which it ended; None before

    def public(self) -> dict[str, Any]:
        """Return what anyone may know: the secret only once it draws from no message."""
        return {
            "epoch": self.number,
            "begins": self.begins,
            "ends": self.ends,
            "commitment": commitment(self.secret, self.number),
            "secret": self.secret.hex() if self.ends is not None else None,
        }


def commitment(secret: bytes, epoch: int) -> str:
    """Return the commitment to the secret of an epoch, in hexadecimal digits."""
    return hashlib.sha256(secret + epoch.to_bytes(8, "big")).hexdigest()


def message_seed(secret: bytes, public_key: str, message_id: str, digest: bytes) -> int:
    """Return the sample seed of a message from its SHA-256 and its epoch's secret."""
    parts = (TAG, public_key.encode(), message_id.encode(), digest)
    # Each after its length, so that no two messages have one text.
    text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return int.from_bytes(hmac.digest(secret, text, "sha256")[:8], "big") >> (64 - SEED_BITS)


def first_turn(seed: int, nonces: int, sample: int) -> float:
    """Return the turn, 0 to 1, of a message without samples; the lowest is sampled first.

    A draw of so many nonces adds their share of the message, so that turns of all messages rise
    alike: this is systematic sampling with a random start, in which the chance of a nonce does not
    depend on the size of its message.
    """
    return seed / (1 << SEED_BITS) * min(sample, nonces) / max(nonces, 1)


def draw(seed: int, nonces: Sequence[int], first: int, end: int) -> list[int]:
    """Return the places ``[first, end)`` of the drawn order of some nonces, as indices into
    them.
    """
    head = seed.to_bytes(8, "big")

    def ticket(place: int) -> bytes:
        return hashlib.sha256(head + nonces[place].to_bytes(8, "big")).digest()

    return nsmallest(end, range(len(nonces)), key=ticket)[first:]
