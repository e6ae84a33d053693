"""Commitments: one hash over all nonces and values of a round, published before the sample.

A commitment is the top of a sum tree. Every node holds how many nonces are below it, the first and
the last of them, and a hash over its two children with their numbers. So the place of a nonce
follows from its path, and no second nonce can be put in that place. A nonce that occurs twice lies
outside the range of a node above it, and its own path shows that. Nodes beside the path are the
word of the node, so each must have room for its nonces: otherwise one whose last lies below its
first would hide what is doubled on both of its sides.

The tree over N leaves splits at the largest power of two below N, like that of RFC 6962, so a tree
over the first nonces is made of nodes of the later one: an early commitment is shown to be the
beginning of the final one with about log2 N nodes.
"""

import base64
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Base64Bytes, Field

from assay.errors import CommitmentBroken, ProofMismatch, UsageError
from assay.files.jsonl import dumps, read_lines
from assay.files.storage import write_atomic
from assay.poc.protocol.checks import DIGEST, MAX_NONCE, check_name, check_number, join_prefixed
from assay.poc.protocol.header import FramedModelLine, Header
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import Record, pack_record
from assay.poc.protocol.round import MAX_COUNT, Round
from assay.poc.protocol.strict_file import STRICT, format_error, line_error, parse_line, read_as

KIND = "assay.poc.commitment"
SCHEMA = 1
# Places of the share for each nonce, at which a round counts as fraud.
LARGEST_POROSITY = 100
DENSE = f"fewer than {LARGEST_POROSITY} places of the share for each nonce"
SAMPLE_TEXT = "assay.poc/sample"
TOGETHER = 1024  # rows that are hashed at once
MOST_NODES = 64  # of a path; the largest round has 24 beside an opening

# One byte before what is hashed, so that no leaf is a node and no node a root.
LEAF = b"\x00"
NODE = b"\x01"
ROOT = b"\x02"

PACKED = struct.Struct(">QQQ32s")
Number = Annotated[int, Field(ge=0, le=MAX_NONCE)]
LABELS = np.dtype([("size", ">u8"), ("first", ">u8"), ("last", ">u8"), ("hash", "u1", 32)])
PAIRS = np.dtype([("tag", "u1"), ("left", LABELS), ("right", LABELS)])


class Label(NamedTuple):
    """A node of the tree: how many nonces are below it, the first and the last, and the hash."""

    size: int
    first: int
    last: int
    hash: bytes


def leaf(nonce: int, value: bytes) -> Label:
    """Return the leaf of a nonce with its published value."""
    return Label(1, nonce, nonce, hashlib.sha256(LEAF + struct.pack(">Q", nonce) + value).digest())


def join(left: Label, right: Label) -> Label:
    """Return the node above two; a CommitmentBroken where their nonces do not ascend."""
    if left.last >= right.first:
        raise _broken(f"nonce {right.first} after {left.last}", "nonces that ascend, each once")
    digest = hashlib.sha256(NODE + PACKED.pack(*left) + PACKED.pack(*right)).digest()
    return Label(left.size + right.size, left.first, right.last, digest)


def has_room(label: Label, round: Round) -> bool:
    """Return whether so many nonces of a share lie from the first to the last of a node."""
    return label.last - label.first >= (label.size - 1) * round.node_count


def is_porous(round: Round, count: int, last: int) -> bool:
    """Return whether nonces are spread over a hundred times as many places of the share, or more.

    A node that may take its nonces from anywhere can look for those that are cheap.
    """
    return last // round.node_count >= LARGEST_POROSITY * count


def check_spread(round: Round, nonces: Sequence[int]) -> None:
    """Refuse to commit to nonces that count as porous; a UsageError names the last of them."""
    if is_porous(round, len(nonces), nonces[-1]):
        raise UsageError(
            f"a commitment to {len(nonces)} nonces up to {nonces[-1]}",
            wanted=f"all nonces of a round: {DENSE}",
            do="prove them from the first one on, or leave --commit out",
        )


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One nonce of a commitment with the path that proves its place.

    Args:
        index: Place of the nonce among all that are committed, from 0.
        nonce: Nonce.
        value: Bytes of its published value.
        path: Nodes beside the path from the top to the leaf, from left to right, 56 bytes each.
    """

    __pydantic_config__: ClassVar = STRICT

    index: Number
    nonce: Number
    value: Base64Bytes
    path: Base64Bytes

    def line(self) -> str:
        """Return the opening as one line of JSON, without its newline."""
        texts = {name: base64.b64encode(getattr(self, name)).decode() for name in ("value", "path")}
        return dumps(vars(self) | texts)

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read the line of an opening; a ProofFormatError says what is wrong with it."""
        # Lone surrogates, which JSON can hold, become bytes that are no text.
        opening = read_as(cls, line.encode("utf-8", "surrogatepass"))
        if opening.line() != line:
            raise format_error(f"{line[:60]!r} in another form", "the form of Opening.line")
        return opening


@dataclass(frozen=True, kw_only=True)
class Commitment:
    """What a node publishes before it knows which of its nonces are checked.

    Args:
        round: Round of the node, with its model named.
        model: What the header of a proof says of the model.
        top: Top of the tree over all nonces and values.
    """

    round: Round
    model: FramedModelLine
    top: Label

    @classmethod
    def of(cls, proof: Proof) -> Self:
        """Return the commitment to all records of a proof."""
        model = read_as(FramedModelLine, dumps(proof.header.as_dict()["model"]).encode())
        return cls(round=proof.round, model=model, top=CommitmentTree.of(proof.records).top)

    @property
    def root(self) -> str:
        """SHA-256 over the round, the model and the top: what a node publishes."""
        return hashlib.sha256(ROOT + dumps(self._statement()).encode()).hexdigest()

    @property
    def porous(self) -> bool:
        """Whether the nonces are spread too far; see :func:`is_porous`."""
        return is_porous(self.round, self.top.size, self.top.last)

    def check(self, proof: Proof, *, early: bool = False) -> None:
        """Refuse a proof whose nonces and values are not the committed ones, in their places.

        Args:
            proof: Proof of the round.
            early: Whether the commitment may cover the first nonces of the proof alone.

        Raises:
            ProofMismatch: The proof is of another round or model.
            CommitmentBroken: The proof is of this round and is not what was committed.
        """
        self.check_round(proof.header)
        records = proof.records[: self.top.size] if early else proof.records
        if len(records) != self.top.size:
            raise _broken(f"a proof of {len(proof.records)} nonces", f"{self.top.size} of them")
        if CommitmentTree.of(records).top != self.top:
            raise _broken(
                f"nonces {records[0].nonce} to {records[-1].nonce} that are not as committed",
                f"the {self.top.size} nonces and values of commitment {self.root[:12]}, in order",
            )
        if self.porous:
            raise _broken(f"{self.top.size} nonces up to {self.top.last}", DENSE)

    def check_round(self, header: Header) -> None:
        """Refuse the proof of another round or model; a ProofMismatch names what differs."""
        ours = {**self.round.as_dict(), **vars(self.model)}
        theirs = {**header.round.as_dict(), **header.as_dict()["model"]}
        odd = [name for name, value in ours.items() if theirs.get(name, "") != value]
        if odd:
            raise ProofMismatch(
                f"a commitment of {odd[0]} {ours[odd[0]]!s:.60}",
                wanted=f"one of {theirs.get(odd[0], '')!s:.60}, as the proof says",
                do="take the commitment that the node published for this round",
            )

    def check_opening(self, opening: Opening, *, index: int) -> None:
        """Refuse a nonce that was not committed in the place that was asked for.

        Args:
            opening: Answer of the node.
            index: Place that the validator drew.

        Raises:
            CommitmentBroken: The place, the nonce or its value is another one, or the nonce is of
                another share.
        """
        check_number("index", index, 0, self.top.size - 1)
        if opening.index != index:
            raise _broken(f"the nonce of place {opening.index}", f"that of place {index}")
        if opening.nonce % self.round.node_count != self.round.share:
            raise _broken(f"nonce {opening.nonce}", "a nonce of the share of the node")
        cuts = (index, index + 1)
        labels = _labels(opening.path, self.round)
        before = sum(start < index for start, _ in _pieces(0, self.top.size, cuts))
        labels.insert(before, leaf(opening.nonce, opening.value))
        self._check_top(_rebuild(self.top.size, cuts, labels))

    def check_prefix(self, early: "Commitment", path: bytes) -> None:
        """Refuse an early commitment whose nonces and values are not the first of this one.

        Args:
            early: Commitment that the node published before this one.
            path: Answer of the node, as `CommitmentTree.prefix` gives it.

        Raises:
            CommitmentBroken: The early commitment is of another round or model, has more nonces, or
                is no beginning of this one.
        """
        if (early.round, early.model) != (self.round, self.model):
            raise _broken("an early commitment of another round", "one of this round and model")
        count = early.top.size
        if count > self.top.size:
            raise _broken(f"an early commitment to {count} nonces", f"at most {self.top.size}")
        labels = _labels(path, self.round)
        self._check_top(_rebuild(self.top.size, (count,), labels))
        begin = sum(start < count for start, _ in _pieces(0, self.top.size, (count,)))
        if reduce(lambda right, left: join(left, right), reversed(labels[:begin])) != early.top:
            raise _broken("a path that gives another early commitment", "the one of the node")

    def draw_places(self, size: int, *, validator_key: str, block_hash: str) -> tuple[int, ...]:
        """Draw the places that a validator checks, from a block that came after the commitment.

        The height and the model are those of the round. A node that knows the block before it
        commits can compute all other nonces cheaply.

        Args:
            size: Number of places; all of them where there are no more.
            validator_key: Key of the validator, so that two of them draw different places.
            block_hash: Hash of the fresh block.

        Returns:
            The places, ascending.

        Raises:
            UsageError: A value is out of range.
        """
        count = self.top.size
        check_number("size", size, 1, MAX_COUNT)
        for name, value in (("validator_key", validator_key), ("block_hash", block_hash)):
            check_name(name, value, do="pass it as the chain prints it")
        if size >= count:
            return tuple(range(count))
        text = join_prefixed(
            SAMPLE_TEXT, validator_key, block_hash, self.round.block_height, self.round.model
        ).encode()
        # A larger number would favour the first places.
        unbiased = 2**64 - 2**64 % count
        places: set[int] = set()
        counter = 0
        while len(places) < size:
            digest = hashlib.sha256(text + struct.pack(">Q", counter)).digest()
            number = int.from_bytes(digest[:8])
            counter += 1
            if number < unbiased:
                places.add(number % count)
        return tuple(sorted(places))

    def _check_top(self, top: Label) -> None:
        if top != self.top:
            raise _broken("a path that leads to another root", f"root {self.root[:12]}")

    def _statement(self) -> dict[str, Any]:
        size, first, last, digest = self.top
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "round": self.round.as_dict(),
            "model": {name: value for name, value in vars(self.model).items() if value != ""},
            "tree": {"count": size, "first": first, "last": last, "hash": digest.hex()},
        }

    def line(self) -> str:
        """Return the line of a commitment file, without its newline."""
        return dumps({**self._statement(), "root": self.root})

    def save(self, path: str | Path) -> None:
        """Write the file in one piece; a StorageError where that fails."""
        write_atomic(path, self.line() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a commitment file strictly; a ProofFormatError names what is wrong."""
        lines = read_lines(path)
        number, line = next(lines, (1, b""))
        commitment = parse_line(path, number, line, cls._parse, cls.line)
        for number, _ in lines:
            raise line_error(path, number, "a second line", "the end of the file")
        return commitment

    @classmethod
    def _parse(cls, line: bytes) -> Self:
        fields = read_as(_CommitmentLine, line)
        tree = fields.tree
        round = fields.round
        top = Label(tree.count, tree.first, tree.last, bytes.fromhex(tree.hash))
        if not has_room(top, round):
            raise format_error(
                f"{top.size} nonces from {top.first} to {top.last}",
                f"distinct nonces of node {round.node_id} of {round.node_count}",
            )
        if fields.model.reference != round.model:
            raise format_error("two different model references", "one")
        return cls(round=round, model=fields.model, top=top)


@dataclass(frozen=True, kw_only=True)
class _TreeLine:
    __pydantic_config__: ClassVar = STRICT

    count: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    first: Number
    last: Number
    hash: Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")]


@dataclass(frozen=True, kw_only=True)
class _CommitmentLine:
    __pydantic_config__: ClassVar = STRICT

    kind: Literal["assay.poc.commitment"]
    schema: Literal[1]
    round: Round
    model: FramedModelLine
    tree: _TreeLine
    root: str


class CommitmentTree:
    """The whole tree of a round in memory: 112 bytes for each nonce.

    Args:
        nonces: Ascending nonces [N].
        values: Bytes of the published values, [N, B] in uint8.

    Raises:
        UsageError: There is no nonce or are more than 2**24, the values are of another number, or
            the nonces do not ascend.
    """

    def __init__(self, nonces: npt.ArrayLike, values: npt.NDArray[np.uint8]) -> None:
        stated_N = np.asarray(nonces)
        count = len(stated_N) if stated_N.ndim == 1 else 0
        check_number("number of nonces", count, 1, MAX_COUNT)
        if values.dtype != np.uint8 or values.shape[:-1] != (count,):
            raise UsageError(
                f"values {values.dtype}{list(values.shape)} for {count} nonces",
                wanted=f"uint8[{count}, B], the bytes of each value",
                do="pack one value for each nonce",
            )
        # Before the cast, which would wrap numbers around.
        in_range = (
            stated_N.dtype.kind in "iu" and stated_N.min() >= 0 and stated_N.max() <= MAX_NONCE
        )
        self._nonces_N = stated_N.astype(np.int64) if in_range else np.zeros(2, np.int64)
        if (np.diff(self._nonces_N) <= 0).any():
            raise UsageError(
                "nonces that do not ascend, or are out of range",
                wanted=f"whole numbers from 0 to {MAX_NONCE}, each once and sorted",
                do="sort them, and leave out what occurs twice",
            )
        self._values_NB = values
        self._levels = [self._leaves()]
        while len(self._levels[-1]) > 1:
            self._levels.append(_level_above(self._levels[-1]))

    @classmethod
    def of(cls, records: Sequence[Record]) -> Self:
        """Return the tree over the records of a proof."""
        packed = [pack_record(record) for record in records]
        values_NB = np.frombuffer(b"".join(packed), np.uint8).reshape(len(packed), -1)
        return cls([record.nonce for record in records], values_NB)

    @property
    def top(self) -> Label:
        """The top of the tree."""
        return Label(*PACKED.unpack(self._levels[-1][0].tobytes()))

    def open(self, index: int) -> Opening:
        """Return the nonce of a place with its path; a UsageError where there is no such place."""
        check_number("index", index, 0, len(self._nonces_N) - 1)
        return Opening(
            index=index,
            nonce=int(self._nonces_N[index]),
            value=self._values_NB[index].tobytes(),
            path=self._path((index, index + 1), without=index),
        )

    def prefix(self, count: int) -> bytes:
        """Return the path that proves what the first nonces are, for `Commitment.check_prefix`."""
        check_number("count", count, 1, len(self._nonces_N))
        return self._path((count,))

    def _leaves(self) -> npt.NDArray[Any]:
        """Return the lowest level, as :func:`leaf` gives it: a gain of 4 at a million nonces."""
        nonces = self._nonces_N.astype(">u8")
        layout = np.dtype(
            [("tag", "u1"), ("nonce", ">u8"), ("value", "u1", self._values_NB.shape[1:])]
        )
        rows = _filled(layout, len(nonces), tag=LEAF[0], nonce=nonces, value=self._values_NB)
        return _filled(
            LABELS, len(nonces), size=1, first=nonces, last=nonces, hash=_hash_rows(rows)
        )

    def _path(self, cuts: Sequence[int], *, without: int | None = None) -> bytes:
        """Return the largest nodes that no cut divides, but for the one that begins at a place."""
        path = b""
        for start, size in _pieces(0, len(self._nonces_N), cuts):
            if start != without:
                level = (size - 1).bit_length()
                path += self._levels[level][start >> level].tobytes()
        return path


def _pieces(start: int, size: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield start and size of the largest nodes that no cut divides, from left to right."""
    if not any(start < cut < start + size for cut in cuts):
        yield start, size
        return
    half = _left_size(size)
    yield from _pieces(start, half, cuts)
    yield from _pieces(start + half, size - half, cuts)


def _left_size(size: int) -> int:
    """Return the largest power of two below the number of leaves of a node."""
    return 1 << ((size - 1).bit_length() - 1)


def _rebuild(count: int, cuts: Sequence[int], labels: Sequence[Label]) -> Label:
    """Return the top over the nodes that cuts leave; a CommitmentBroken where they do not fit."""
    sizes = [size for _, size in _pieces(0, count, cuts)]
    if sizes != [label.size for label in labels]:
        raise _broken("a path with nodes of other sizes", f"nodes of {sizes} nonces")
    nodes = iter(labels)

    def build(size: int, start: int) -> Label:
        if not any(start < cut < start + size for cut in cuts):
            return next(nodes)
        half = _left_size(size)
        return join(build(half, start), build(size - half, start + half))

    return build(count, 0)


def _labels(path: bytes, round: Round) -> list[Label]:
    count, odd = divmod(len(path), PACKED.size)
    if odd or count > MOST_NODES:
        count = min(count, MOST_NODES)
        raise _broken(f"a path of {len(path)} bytes", f"{count} nodes of {PACKED.size} bytes")
    labels = [Label(*fields) for fields in PACKED.iter_unpack(path)]
    for label in labels:
        if not has_room(label, round):
            raise _broken(
                f"{label.size} nonces from {label.first} to {label.last} in a path",
                "room for each in the share of the node",
            )
    return labels


def _level_above(level: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the level above one, as :func:`join` gives it; an odd last node rises as it is."""
    pairs = level[: len(level) // 2 * 2].reshape(-1, 2)
    rows = _filled(PAIRS, len(pairs), tag=NODE[0], left=pairs[:, 0], right=pairs[:, 1])
    joined = _filled(
        LABELS,
        len(pairs),
        size=pairs["size"].astype(np.int64).sum(axis=1),
        first=pairs["first"][:, 0],
        last=pairs["last"][:, 1],
        hash=_hash_rows(rows),
    )
    # Without its dtype the result would have the byte order of this machine.
    return np.concatenate([joined, level[2 * len(pairs) :]], dtype=LABELS)


def _filled(layout: np.dtype[Any], count: int, **columns: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return rows of a layout with these columns."""
    rows = np.empty(count, layout)
    for name, values in columns.items():
        rows[name] = values
    return rows


def _hash_rows(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the SHA-256 of the bytes of every row, [N, 32], in parts that a core's cache holds: a
    gain of 1.4 at a million rows.
    """
    packed = rows.view(f"V{rows.dtype.itemsize}")
    digests = bytearray()
    for start in range(0, len(rows), TOGETHER):
        part = packed[start : start + TOGETHER].tolist()
        digests += b"".join([hashlib.sha256(row).digest() for row in part])
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


def _broken(seen: str, wanted: str) -> CommitmentBroken:
    return CommitmentBroken(
        seen, wanted=wanted, do="reject the round of this node: what it shows is not what it stated"
    )
