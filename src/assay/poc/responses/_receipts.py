"""Receipts: what a server states about the responses that it gave, as JSON Lines.

    {"kind":"assay.poc.receipts","schema":1,"public_key":…,"model":…,"fingerprint":…,"sketch":…}
    {"request_id":…,"chosen_by":…,"index":0,"user_seed":…,"block_hash":…,"sampling":…,"prompt":…,"output":[…],…}
    {"footer":{"receipts":200,"tokens":12800,"seconds":81.2,"sha256":"…"}}

The SHA-256 covers the bytes of the receipt lines, newlines included. Reading is as strict as that of proofs, and a line
is refused before it is parsed if it is longer, or has more parts, than any receipt. docs/responses.md has the format.
"""

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from assay.errors import UsageError
from assay.poc.protocol import (
    SKETCH_EVERY,
    SKETCH_SIZE,
    Fingerprint,
    check_name,
    check_number,
    encode_vector,
    sketch_steps,
)
from assay.poc.responses._adapters import Adapter
from assay.poc.responses._sampling import HIGHEST_TOKEN, Sampling
from assay.poc.responses._seeds import HIGHEST_INDEX, ResponseSeed, check_block_hash, check_digest, check_request_texts
from assay.reports import dumps

KIND = "assay.poc.receipts"
SCHEMA = 1
SKETCH = {"every": SKETCH_EVERY, "size": SKETCH_SIZE}

MOST_TOKENS = 2**20
"""Tokens of a prompt, and of an output: the positions that a proof may have."""

CHOOSERS = ("client", "server")
FINISHES = ("stop", "length", "abort")


@dataclass(frozen=True)
class Prompt:
    """The prompt of a response: its token ids, or only what identifies them.

    Two prompts are equal if their hashes are, whether or not the ids are there. Make one with :meth:`of`.

    Args:
        sha256: SHA-256 of the ids as little-endian uint32.
        tokens: Number of the ids.
        ids: Token ids; None where the client keeps them.

    Raises:
        UsageError: A value is out of range.
    """

    sha256: str
    tokens: int
    ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_digest("sha256", self.sha256)
        check_number("the number of tokens of the prompt", self.tokens, 1, MOST_TOKENS)

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Prompt":
        """Return the prompt of these token ids."""
        listed = check_ids("the prompt", ids, fewest=1)
        return cls(hashlib.sha256(np.array(listed, dtype="<u4").tobytes()).hexdigest(), len(listed), listed)

    def as_dict(self) -> dict[str, Any]:
        """Return the ids, or hash and length where they are not known."""
        if self.ids is not None:
            return {"ids": list(self.ids)}
        return {"sha256": self.sha256, "tokens": self.tokens}


@dataclass(frozen=True, kw_only=True, eq=False)
class Receipt:
    """What a server states about one response.

    Args:
        request_id: Name of the request.
        user_seed: Seed of the client; empty where it gave none.
        block_hash: Beacon that became known after the request was accepted.
        prompt: Prompt, with or without its ids.
        output: Ids of the tokens of the response, in order, the one that ended it included.
        sketches: Sketches [S, 12] in float16, of every 32nd token from the first; empty where the engine has none.
        sampling: Parameters of the seeded sampling; None where the engine sampled by itself.
        index: Place among the answers that were asked for with one request.
        chosen_by: Who chose the request id, ``client`` or ``server``. A server that chooses it can try many.
        finish: What ended the response: ``stop``, ``length`` or ``abort``.
        mask: Whether a grammar, or a list of allowed tokens, forbade tokens.
        adapter: LoRA adapter that answered; None where the model did by itself.

    Raises:
        UsageError: A value is out of range; names it.
    """

    request_id: str
    user_seed: str
    block_hash: str
    prompt: Prompt
    output: tuple[int, ...]
    sketches: NDArray[np.float16]
    sampling: Sampling | None
    index: int = 0
    chosen_by: Literal["client", "server"] = "server"
    finish: Literal["stop", "length", "abort"] = "stop"
    mask: bool = False
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        check_request_texts(user_seed=self.user_seed, request_id=self.request_id)
        check_block_hash(self.block_hash)
        check_number("index", self.index, 0, HIGHEST_INDEX)
        _check_word("chosen_by", self.chosen_by, CHOOSERS)
        _check_word("finish", self.finish, FINISHES)
        if type(self.mask) is not bool:
            raise UsageError(f"mask is {self.mask!r:.60}", wanted="true or false", do="correct mask")
        object.__setattr__(self, "output", check_ids("the output", self.output, fewest=0))
        object.__setattr__(self, "sketches", self._checked_sketches())

    def _checked_sketches(self) -> NDArray[np.float16]:
        given = np.asarray(self.sketches, dtype=np.float16)
        wanted = (len(sketch_steps(len(self.output))), SKETCH_SIZE)
        if given.size == 0:
            return given.reshape(0, SKETCH_SIZE)
        if given.shape != wanted or not np.isfinite(given).all():
            raise UsageError(
                f"sketches of shape {given.shape} for {len(self.output)} tokens",
                wanted=f"finite numbers of shape {wanted}, or no sketches",
                do=f"sketch the state of every {SKETCH_EVERY}nd token, from the first",
            )
        return given

    @property
    def request(self) -> tuple[str, str, str, int]:
        """What sets the seed apart from those of other responses of this node and model."""
        return self.user_seed, self.request_id, self.block_hash, self.index

    @property
    def seeded(self) -> bool:
        """Whether a replay can measure its tokens: sampled with a seed, and without a mask."""
        return self.sampling is not None and not self.mask

    def without_prompt(self) -> "Receipt":
        """Return the receipt with the hash of the prompt in place of its ids."""
        if self.prompt.ids is None:
            return self
        other = copy.copy(self)  # unlike a new one, it is not checked again
        object.__setattr__(other, "prompt", replace(self.prompt, ids=None))
        return other

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the line; without an adapter there is no field for it."""
        return {
            "request_id": self.request_id,
            "chosen_by": self.chosen_by,
            "index": self.index,
            "user_seed": self.user_seed,
            "block_hash": self.block_hash,
            "sampling": None if self.sampling is None else self.sampling.as_dict(),
            "prompt": self.prompt.as_dict(),
            "output": list(self.output),
            "finish": self.finish,
            "mask": self.mask,
            **({} if self.adapter is None else {"adapter": self.adapter.as_dict()}),
            "sketches": [encode_vector(sketch) for sketch in self.sketches],
        }

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps(self.as_dict())


@dataclass(frozen=True, kw_only=True)
class ReceiptHeader:
    """First line of a file of receipts: the node, the model and the engine.

    Args:
        public_key: Key of the node.
        reference: Reference of the model, as the node names it.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model: trained, random-all or random-embed.
        fingerprint: Description of the engine; ``seq_len`` is the number of positions that it was made for.
        sketched: Whether the receipts have sketches.

    Raises:
        UsageError: A value is out of range; names it.
    """

    public_key: str
    reference: str
    digest: str
    weights: str
    fingerprint: Fingerprint
    sketched: bool = True

    def __post_init__(self) -> None:
        check_name("public_key", self.public_key, do="pass the public key as the chain prints it")
        check_name("the model's reference", self.reference, do="pass the reference of the model")
        check_digest("digest", self.digest)
        check_name("weights", self.weights, do="pass the weight mode of the model")

    def seed(self, receipt: Receipt) -> ResponseSeed:
        """Return the seed of a response."""
        return ResponseSeed(
            user_seed=receipt.user_seed,
            request_id=receipt.request_id,
            public_key=self.public_key,
            digest=self.digest,
            block_hash=receipt.block_hash,
            index=receipt.index,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the line."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "public_key": self.public_key,
            "model": {"reference": self.reference, "digest": self.digest, "weights": self.weights},
            "fingerprint": self.fingerprint.as_dict(),
            "sketch": SKETCH if self.sketched else None,
        }

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps(self.as_dict())


@dataclass(frozen=True, kw_only=True)
class ReceiptFooter:
    """Last line of a file of receipts.

    Args:
        receipts: Number of the receipts.
        tokens: Number of the tokens of all outputs.
        seconds: Time that the responses took; of a file that was interrupted and continued, that of the last run alone.
        sha256: SHA-256 of the receipt lines, newlines included.
    """

    receipts: int
    tokens: int
    seconds: float
    sha256: str

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps({"footer": vars(self)})


def check_ids(what: str, ids: Iterable[int], *, fewest: int) -> tuple[int, ...]:
    """Return token ids as a tuple of Python numbers.

    Raises:
        UsageError: There are too few or too many, or one is not a whole number in range.
    """
    listed: tuple[Any, ...] = tuple(ids)  # what a caller passes may be of numpy, or of a file
    plain = not set(map(type, listed)) - {int}  # and mostly is: then nothing is looked at one by one
    if not plain:
        listed = tuple(int(token) if isinstance(token, np.integer) else token for token in listed)
    if not fewest <= len(listed) <= MOST_TOKENS:
        raise UsageError(
            f"{what} of {len(listed)} tokens", wanted=f"{fewest} to {MOST_TOKENS}", do=f"give {what} in token ids"
        )
    if not plain or not 0 <= min(listed, default=0) <= max(listed, default=0) <= HIGHEST_TOKEN:
        for token in listed:
            check_number(f"a token of {what}", token, 0, HIGHEST_TOKEN)
    return listed


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        raise UsageError(f"{name} is {value!r:.60}", wanted=" or ".join(words), do=f"correct {name}")
