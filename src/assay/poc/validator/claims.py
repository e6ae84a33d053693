"""Claims of nodes: published callback bodies, read strictly and checked against the pins.

A callback says less than the header of a proof: block, key, share, nonces and their values. The
preset, the length, the number format and the checkpoint are those of the pins, so a node that
computed anything else has other values.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from assay.errors import AssayError, ProofMismatch
from assay.files.jsonl import JsonObject, dumps, loads
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import (
    Record,
    describe_packing,
    is_distance,
    is_valid,
    pack_points,
    pack_record,
    packed_size,
    unpack_or_nan,
)
from assay.poc.protocol.round import Round
from assay.poc.validator.registry import Registry, Sender
from assay.poc.verdict.entries import round_identity
from assay.poc.verdict.proof_checks import check_proof

MOST_NONCES = 2**16  # of one message
REASONS = (
    "body",
    "public_key",
    "signature",
    "webhook-id",
    "block_hash",
    "block_height",
    "node_id",
    "node_count",
    "preset",
    "r_target",
    "encoding",
    "nonces",
    "dist",
    "artifacts",
    "seq_len",
    "strength",
    "builds",
    "digest",
    "weights",
    "prover_dtype",
    "fewest_nonces",
    "format",
    "busy",
    "room",
    "other",
)
"""Names under which messages are refused, and counted."""


@dataclass(frozen=True)
class Claim:
    """Nonces of one node in one round, with the values that it published."""

    round: Round  # as the pins and the node's share make it
    nonces: Sequence[int]  # ascending
    # Distances, or the base64 of vectors, or of tokens with their sketches.
    values: Sequence[float | str]

    def record(self, place: int, pipeline: Pipeline) -> Record:
        """Return the record of a place; a malformed vector is a row of NaN, never a match."""
        nonce = self.nonces[place]
        value = self.values[place]
        if isinstance(value, (int, float)):
            return Record(nonce, distance=float(value))
        return unpack_or_nan(nonce, value, pipeline)

    def encode(self) -> bytes:
        """Return the stored form of a claim, which :meth:`decode` reads unchecked.

        The round is JSON on a line; nonces have eight bytes each, then distances eight bytes each,
        or texts of one length.
        """
        head = _head_of(self.round) + b"\n" + np.asarray(self.nonces, "<i8").tobytes()
        if isinstance(self.values[0], str):
            return head + "".join(map(str, self.values)).encode()
        return head + np.asarray(self.values, "<f8").tobytes()

    @classmethod
    def decode(cls, encoded: bytes, count: int, pipeline: Pipeline) -> "Claim":
        """Return the claim of ``count`` nonces that :meth:`encode` made."""
        head, nonces_N, values = _split_claim(encoded, count)
        round = Round(**loads(head, "claim"))
        nonces = nonces_N.tolist()
        if pipeline.output == "distance":
            return cls(round, nonces, np.frombuffer(values, "<f8", count).tolist())
        text = values.decode()
        size = len(values) // count
        return cls(
            round, nonces, [text[size * place : size * (place + 1)] for place in range(count)]
        )


def _split_claim(encoded: bytes, count: int) -> tuple[bytes, npt.NDArray[np.int64], bytes]:
    """Return head, nonces [N] and values of what `Claim.encode` made."""
    head, _, numbers = encoded.partition(b"\n")
    return head, np.frombuffer(numbers, "<i8", count), numbers[8 * count :]


def named_nonces(encoded: bytes | None, count: int) -> tuple[str, str, list[int]]:
    """Return the round's identity, its block and the nonces of what `Claim.encode` made."""
    if not encoded or not count:
        return "", "", []
    if len(encoded.partition(b"\n")[2]) < 8 * count:  # in another form, equal ones are copies
        return encoded.hex(), "", [*range(count)]
    head, nonces_N, _ = _split_claim(encoded, count)
    return (*_round_of(head), nonces_N.tolist())


@lru_cache(maxsize=2**10)
def _head_of(round: Round) -> bytes:
    return dumps(round.as_dict()).encode()


@lru_cache(maxsize=2**10)
def _round_of(head: bytes) -> tuple[str, str]:
    round = Round(**loads(head, "claim"))
    return round_identity(round), round.block_hash


def restrict_claim(encoded: bytes | None, count: int, places: Sequence[int]) -> bytes | None:
    """Return what `Claim.encode` makes of the nonces at some places; None of none."""
    if not encoded or not places:
        return None
    if len(places) == count:
        return encoded
    head, nonces_N, values = _split_claim(encoded, count)
    rows = np.frombuffer(values, np.uint8).reshape(count, -1)[list(places)]
    return head + b"\n" + nonces_N[list(places)].tobytes() + rows.tobytes()


def refused(name: str, seen: object, wanted: object, *, status: int = 422) -> Refusal:
    """Return the refusal of a value that contradicts the pins, by its name."""
    agreed = wanted if isinstance(wanted, str) else f"{wanted!r:.80}"
    return Refusal(
        status,
        f"{name} {seen!r:.80}",
        wanted=f"{name} {agreed}",
        do="send what the network agreed on; GET /api/v1/validator/status shows it",
        fields={"fields": [name]},
    )


def _named(name: str, error: AssayError) -> Refusal:
    return Refusal(422, error.seen, wanted=error.wanted, do=error.do, fields={"fields": [name]})


def sender_of(values: JsonObject, registry: Registry) -> Sender:
    """Return the node that a body names; refuse with 403 a key that is not pinned."""
    key = values.get("public_key")
    sender = registry.senders.get(key) if isinstance(key, str) else None
    if sender is None:
        raise refused(
            "public_key", key, "of a node that the pins or the nodes file list", status=403
        )
    return sender


class Block(NamedTuple):
    """A block of which messages are accepted; None is what is not known of it."""

    height: int | None
    computed: frozenset[str] | None = None  # hashes of what nodes compute by the pins of its time


@dataclass(frozen=True)
class Reader:
    """Reads claims under the pins."""

    registry: Registry
    blocks: Mapping[str, Block]  # of which messages are accepted, by hash
    positions: int  # positions of a share that messages may name

    def pins(self, public_key: str) -> str:
        """Return the hash of what a node computes."""
        return self.registry.computed[sender_of({"public_key": public_key}, self.registry).build]

    def claim(self, values: JsonObject, sender: Sender) -> Claim:
        """Return the claim of a ``generated`` body; 422 where it contradicts the pins."""
        pipeline = self.registry.pipeline
        node_id = self.check_share(values, sender)
        # Callbacks do not state what was agreed on for their block, and would be judged by what is
        # agreed on now.
        block = values["block_hash"]
        hashes = self.blocks[block].computed
        if hashes is not None and self.registry.computed[sender.build] not in hashes:
            raise refused(
                "block_hash", block, "of a block that was announced under the pins of now"
            )
        vectors = pipeline.output != "distance"
        if vectors != ("artifacts" in values):
            raise refused(
                "preset", "vectors" if "artifacts" in values else "distances", pipeline.name
            )
        nonces, claimed = self._vectors(values) if vectors else self._distances(values)
        agreed = self.registry.network.round
        round = Round(
            block_hash=block,
            public_key=sender.public_key,
            block_height=values["block_height"],
            node_id=node_id,
            node_count=sender.node_count,
            model=self.registry.model.reference,
            preset=pipeline.name,
            seq_len=agreed.seq_len,
            r_target=agreed.r_target or Round.r_target,
            strength=agreed.strength,
        )
        self._check_nonces(nonces, round)
        return Claim(round, nonces, claimed)

    def check_share(self, values: JsonObject, sender: Sender) -> int:
        """Return the machine's number, after the block was compared."""
        block = values.get("block_hash")
        height = values.get("block_height")
        node_id = values.get("node_id")
        agreed = self.blocks.get(block) if isinstance(block, str) else None
        for holds, name, wanted in (
            (
                type(height) is int and 0 <= height <= MAX_NONCE,
                "block_height",
                "a height",
            ),
            (
                agreed is not None and agreed.height in (None, height),
                "block_hash",
                "of a block that is open, at its height",
            ),
            (sender.has(node_id), "node_id", "of a machine that the pins list for this key"),
        ):
            if not holds:
                raise refused(name, values.get(name), wanted)
        return int(node_id)  # type: ignore[arg-type]  # a number, as the node has it

    def _distances(self, values: JsonObject) -> tuple[list[Any], Sequence[float | str]]:
        target = values.get("r_target")
        agreed = self.registry.network.round.r_target
        if target != agreed or isinstance(target, bool):
            raise refused("r_target", target, agreed)
        nonces = values.get("nonces")
        distances = values.get("dist")
        if (
            not isinstance(nonces, list)
            or not isinstance(distances, list)
            or len(nonces) != len(distances)
        ):
            raise refused("dist", "lists of different lengths", "one distance for every nonce")
        if odd := [value for value in distances if type(value) not in (float, int)]:
            raise refused("dist", odd[0], "a number")
        # The outermost ones decide for all, in a tenth of the time of looking at each.
        for distance in (min(distances, default=0.0), max(distances, default=0.0)):
            if not is_distance(distance) or not is_valid(distance, agreed or 0.0):
                raise refused("dist", distance, f"a distance below {agreed}")
        return nonces, distances

    def _vectors(self, values: JsonObject) -> tuple[list[Any], Sequence[float | str]]:
        packing = describe_packing(self.registry.pipeline)
        size = packed_size(self.registry.pipeline)
        if values.get("encoding") != packing:
            raise refused("encoding", values.get("encoding"), packing)
        artifacts = values["artifacts"]
        length = 4 * -(-size // 3)
        if not isinstance(artifacts, list):
            raise refused("artifacts", artifacts, "a list")
        artifacts = [_packed(artifact) for artifact in artifacts]
        for artifact in artifacts:
            well_formed = isinstance(artifact, dict) and artifact.keys() == {"nonce", "vector_b64"}
            if not well_formed or not isinstance(artifact["vector_b64"], str):
                raise refused("artifacts", artifact, "a nonce and a vector_b64")
            if len(text := artifact["vector_b64"]) != length or not text.isascii():
                raise refused("artifacts", text, f"the base64 of {size} bytes")
        return [artifact["nonce"] for artifact in artifacts], [
            artifact["vector_b64"] for artifact in artifacts
        ]

    def _check_nonces(self, nonces: Sequence[Any], round: Round) -> None:
        """Refuse nonces of another share, those that do not ascend, and far ones."""
        if not 0 < len(nonces) <= MOST_NONCES:
            raise refused("nonces", f"{len(nonces)} of them", f"1 to {MOST_NONCES} in one message")
        count = round.node_count
        share = round.share
        last = -1
        for nonce in nonces:
            if type(nonce) is not int or nonce <= last or nonce % count != share:
                raise refused("nonces", nonce, f"ascending ones that are {share} modulo {count}")
            last = nonce
        if last > MAX_NONCE:
            raise refused("nonces", last, f"at most {MAX_NONCE}")
        self.check_reach(last, round)

    def check_reach(self, last: int, round: Round) -> None:
        """Refuse a nonce that is so far out that 32-bit seeds may have been chosen to collide.

        A node that may choose among n positions finds n²/2³³ pairs of equal 32-bit seeds, so that
        one forward pass serves two nonces: 2048 pairs with the bound of 2²² positions. So it saves
        2048 passes of a round at most, which are half of those of a node that names these pairs
        alone. Proofs of few nonces each can be chosen as well as single nonces.
        """
        if round.strength == 32 and last // round.node_count >= self.positions:
            raise refused(
                "nonces",
                last,
                f"among the first {self.positions} positions of the share (`positions` under "
                f"[poc.validator])",
            )


def read_proof(body: bytes, reader: Reader) -> Claim:
    """Return what a proof claims, after all in it was held against the pins."""
    try:
        proof = Proof.parse("the proof", body)
    except AssayError as error:
        raise _named("format", error) from None
    registry = reader.registry
    stated = proof.round
    sender = sender_of(stated.as_dict(), registry)
    node_id = reader.check_share(stated.as_dict(), sender)
    # Not by the nodes of the pins: the file of nodes may list more.
    share = registry.network.for_share(registry.model, (sender.build,), node_id, sender.node_count)
    pins = replace(share, block_hash=stated.block_hash, public_key=sender.public_key)
    try:
        check_proof(proof, expect=pins, sample=1)
    except AssayError as error:
        raise _named((isinstance(error, ProofMismatch) and error.field) or "other", error) from None
    reader.check_reach(proof.records[-1].nonce, stated)
    published = [
        r.distance if r.has_distance else base64.b64encode(pack_record(r)).decode("ascii")
        for r in proof.records
    ]
    return Claim(stated, [record.nonce for record in proof.records], published)


def _packed(artifact: Any) -> Any:
    """Return an artifact with its list of points as text; anything else as it is."""
    points = artifact.get("k_points_steps") if isinstance(artifact, dict) else None
    if not isinstance(points, list) or any(type(point) is not int for point in points):
        return artifact
    packed = artifact | {"vector_b64": pack_points(points)}
    return {name: value for name, value in packed.items() if name != "k_points_steps"}
