"""Commitments: what is published cannot be changed, moved, doubled or left out afterwards."""

import hashlib
import struct
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from assay.errors import CommitmentBroken, ProofFormatError, ProofMismatch, UsageError
from assay.poc import Commitment, Proof, Record, Round
from assay.poc.protocol.commitments import CommitmentTree, Label, Opening, is_porous
from assay.poc.protocol.header import runs_of
from assay.poc.protocol.pipelines import get_pipeline

TRIES = 1000


@pytest.fixture(scope="module")
def vectors(proof):
    """Return a function that makes a proof of the artifact preset, of drawn vectors."""

    def make(nonces, values=None, **changed):
        nonces = [int(nonce) for nonce in nonces]
        changed = {"preset": "artifact", "node_id": 1, "node_count": 3} | changed
        round = replace(proof.round, **changed)
        pipeline = get_pipeline("artifact")
        header = replace(proof.header, round=round, pipeline=pipeline, nonces=runs_of(nonces))
        drawn = np.random.default_rng(0).standard_normal((len(nonces), 12)).astype(np.float16)
        rows = drawn if values is None else values
        records = [Record(nonce, vector=row) for nonce, row in zip(nonces, rows, strict=True)]
        return Proof.build(header, records, 1.0)

    return make


def share(count):
    return [1 + 3 * place for place in range(count)]


def tree_of(proof):
    return CommitmentTree.of(proof.records)


def second_root(leaves):
    """The top of docs/protocol.md, written from the page: (count, first, last, hash)."""
    if len(leaves) == 1:
        nonce, value = leaves[0]
        digest = hashlib.sha256(b"\x00" + nonce.to_bytes(8) + value).digest()
        return 1, nonce, nonce, digest
    half = 1
    while half * 2 < len(leaves):
        half *= 2
    left = second_root(leaves[:half])
    right = second_root(leaves[half:])
    packed = b"".join(struct.pack(">QQQ", *node[:3]) + node[3] for node in (left, right))
    digest = hashlib.sha256(b"\x01" + packed).digest()
    return left[0] + right[0], left[1], right[2], digest


@pytest.mark.parametrize("count", [*range(1, 20), 63, 64, 65, 200])
def test_the_tree_is_that_of_the_page(count):
    values = np.random.default_rng(count).integers(0, 256, (count, 24), dtype=np.uint8)
    nonces = np.cumsum(np.random.default_rng(count).integers(1, 2**30, count))
    leaves = [(int(n), row.tobytes()) for n, row in zip(nonces, values, strict=True)]
    assert tuple(CommitmentTree(nonces, values).top) == second_root(leaves)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 100])
def test_every_place_opens_and_every_beginning_is_shown(count, vectors):
    proof = vectors(share(count))
    tree = tree_of(proof)
    commitment = Commitment.of(proof)
    for index, record in enumerate(proof.records):
        opening = Opening.parse(tree.open(index).line())
        commitment.check_opening(opening, index=index)
        assert opening.nonce == record.nonce
        assert opening.value == record.vector.tobytes()
    for size in range(1, count + 1):
        early = Commitment.of(
            vectors(share(count)[:size], [r.vector for r in proof.records[:size]])
        )
        commitment.check_prefix(early, tree.prefix(size))
        early.check(proof, early=True)


@pytest.mark.slow
def test_what_is_changed_after_the_commitment_is_found(vectors):
    """1000 of 1000: a value changed, a nonce added, left out, replaced, or two exchanged."""
    rng = np.random.default_rng(70)
    missed = []
    for number in range(TRIES):
        count = int(rng.integers(2, 60))
        places = np.sort(rng.choice(90, count, replace=False))
        nonces = 1 + 3 * places
        values = rng.standard_normal((count, 12)).astype(np.float16)
        commitment = Commitment.of(vectors(nonces, values))
        at = int(rng.integers(count))
        nonces_after, values_after = nonces, values.copy()
        kind = ("changed", "added", "left out", "moved", "replaced")[number % 5]
        if kind == "changed":
            bits = values_after.view(np.uint16)
            bits[at, rng.integers(12)] ^= 1 << int(rng.integers(16))
        elif kind == "added":
            free = rng.choice(np.setdiff1d(np.arange(91), places))
            at = int(np.searchsorted(places, free))
            nonces_after = np.insert(nonces, at, 1 + 3 * free)
            values_after = np.insert(values, at, values[0], axis=0)
        elif kind == "left out":
            nonces_after = np.delete(nonces, at)
            values_after = np.delete(values, at, axis=0)
        elif kind == "moved":
            other = (at + 1) % count
            values_after[[at, other]] = values_after[[other, at]]
        else:
            free = rng.choice(np.setdiff1d(np.arange(91), places))
            nonces_after = np.sort(np.append(np.delete(nonces, at), 1 + 3 * free))
        try:
            commitment.check(vectors(nonces_after, values_after))
            missed.append((number, kind))
        except CommitmentBroken:
            pass
    assert missed == []


def test_no_other_opening_is_accepted(vectors):
    """1000 of 1000: another place, nonce, value, or a path with one bit changed."""
    rng = np.random.default_rng(71)
    accepted = []
    for number in range(TRIES):
        count = int(rng.integers(2, 60))
        proof = vectors(share(count))
        commitment = Commitment.of(proof)
        tree = tree_of(proof)
        index = int(rng.integers(count))
        opening = tree.open(index)
        other = tree.open((index + 1) % count)
        value = bytearray(opening.value)
        value[rng.integers(len(value))] ^= 1 << int(rng.integers(8))
        path = bytearray(opening.path)
        path[rng.integers(len(path))] ^= 1 << int(rng.integers(8))
        forged = (
            replace(opening, value=bytes(value)),
            replace(opening, nonce=opening.nonce + 3),
            replace(opening, path=bytes(path)),
            replace(other, index=index),
            replace(opening, path=opening.path[:-56]),
            replace(opening, path=opening.path + opening.path[:56]),
            other,
        )[number % 7]
        try:
            commitment.check_opening(forged, index=index)
            accepted.append((number, forged))
        except CommitmentBroken:
            pass
    assert accepted == []


def unchecked_node(records, places, lies):
    """The node above some places, of a tree that is built without checks; leaves may lie."""
    if len(places) == 1:
        record = records[places[0]]
        raw = struct.pack(">Q", record.nonce) + record.vector.tobytes()
        label = Label(1, record.nonce, record.nonce, hashlib.sha256(b"\x00" + raw).digest())
        return lies.get(places[0], lambda label: label)(label)
    half = 1 << ((len(places) - 1).bit_length() - 1)
    left, right = (unchecked_node(records, part, lies) for part in (places[:half], places[half:]))
    packed = b"".join(struct.pack(">QQQ32s", *label) for label in (left, right))
    digest = hashlib.sha256(b"\x01" + packed).digest()
    return Label(left.size + right.size, left.first, right.last, digest)


def unchecked_path(records, places, lies, index):
    """The nodes beside the way from that node to a place."""
    if len(places) == 1:
        return b""
    half = 1 << ((len(places) - 1).bit_length() - 1)
    left = places[:half]
    right = places[half:]
    if index in left:
        beside = struct.pack(">QQQ32s", *unchecked_node(records, right, lies))
        return unchecked_path(records, left, lies, index) + beside
    beside = struct.pack(">QQQ32s", *unchecked_node(records, left, lies))
    return beside + unchecked_path(records, right, lies, index)


def opened_nonces(commitment, records, lies):
    """The nonces of the places whose openings are accepted."""
    opened = []
    places = range(len(records))
    for index, record in enumerate(records):
        path = unchecked_path(records, places, lies, index)
        value = record.vector.tobytes()
        opening = Opening(index=index, nonce=record.nonce, value=value, path=path)
        with suppress(CommitmentBroken):
            commitment.check_opening(opening, index=index)
            opened.append(record.nonce)
    return opened


def test_a_nonce_that_is_counted_twice_is_refused_from_either_place(vectors):
    """A node that builds its tree without checks, and commits to every nonce twice."""
    proof = vectors(share(8))
    records = [record for record in proof.records for _ in range(2)]
    top = unchecked_node(records, range(len(records)), {})
    assert opened_nonces(replace(Commitment.of(proof), top=top), records, {}) == []


def test_a_leaf_that_lies_does_not_hide_nonces_that_are_counted_twice(vectors):
    """Its last nonce lies below its first, so what follows may begin anew."""
    proof = vectors([*share(16), 1 + 3 * 31])
    records = [*proof.records[:16], *proof.records[1:]]
    lies = {15: lambda label: label._replace(last=0)}
    top = unchecked_node(records, range(len(records)), lies)
    opened = opened_nonces(replace(Commitment.of(proof), top=top), records, lies)
    assert len(opened) == len(set(opened))


def test_a_nonce_of_another_share_is_refused(vectors):
    proof = vectors(share(5))
    commitment = replace(Commitment.of(proof), round=replace(proof.round, node_id=2))
    with pytest.raises(CommitmentBroken):
        commitment.check_opening(tree_of(proof).open(0), index=0)


@pytest.mark.parametrize("change", ["value", "shorter", "round", "path"])
def test_an_early_commitment_must_be_the_beginning_of_the_final_one(change, vectors):
    final = vectors(share(21))
    early = vectors(share(9), [record.vector for record in final.records[:9]])
    path = tree_of(final).prefix(9)
    commitment = Commitment.of(early)
    if change == "value":
        commitment = Commitment.of(vectors([*share(9)[:8], 28], [r.vector for r in early.records]))
    elif change == "shorter":
        path = tree_of(final).prefix(8)
    elif change == "round":
        commitment = replace(commitment, round=replace(final.round, block_hash="other"))
    else:
        path = path[:56] + bytes(56) + path[112:]
    with pytest.raises(CommitmentBroken):
        Commitment.of(final).check_prefix(commitment, path)


def test_an_early_commitment_has_no_more_nonces_than_the_final_one(vectors):
    longer = Commitment.of(vectors(share(22)))
    final = vectors(share(21))
    with pytest.raises(CommitmentBroken):
        Commitment.of(final).check_prefix(longer, tree_of(final).prefix(21))


VALUES = np.zeros((3, 4), np.uint8)


@pytest.mark.parametrize(
    ("nonces", "values"),
    [
        ([], VALUES[:0]),
        ([1, 1, 2], VALUES),
        ([2, 1, 3], VALUES),
        (np.array([3, 2, 1], np.uint64), VALUES),
        ([-1, 2, 3], VALUES),
        ([1, 2, 2**53], VALUES),
        ([1.0, 2.0, 3.0], VALUES),
        ([1, 2], VALUES),
        ([[1, 2, 3]], VALUES),
        ([1, 2, 3], VALUES.astype(np.int64)),
    ],
)
def test_no_tree_over_what_is_no_round(nonces, values):
    with pytest.raises(UsageError):
        CommitmentTree(nonces, values)


def test_a_file_reads_back_and_is_read_strictly(vectors, proof, tmp_path):
    path = tmp_path / "commitment.json"
    for committed in (vectors(share(7)), proof):
        commitment = Commitment.of(committed)
        commitment.save(path)
        assert Commitment.load(path) == commitment
        commitment.check(committed)
    text = path.read_text()
    for wrong in (
        "",
        text.rstrip("\n"),
        text + text,
        text.replace('"schema":1', '"schema":2'),
        text.replace('"count":40', '"count":41'),
        text.replace('"first":0', '"first":20'),
        text.replace('"block_alpha"', '"block_beta"'),
        text.replace('"root":"', '"root":"0'),
        text.replace(":", ": ", 1),
    ):
        path.write_text(wrong)
        with pytest.raises(ProofFormatError):
            Commitment.load(path)


def test_the_root_names_round_and_model(vectors):
    commitment = Commitment.of(vectors(share(7)))
    other = Commitment.of(vectors(share(7), block_hash="other"))
    model = replace(commitment.model, digest="0" * 64)
    roots = {commitment.root, other.root, replace(commitment, model=model).root}
    assert len(roots) == 3
    with pytest.raises(ProofMismatch):
        commitment.check(vectors(share(7), block_hash="other"))


@pytest.mark.parametrize(
    ("count", "place", "porous"), [(4, 399, False), (4, 400, True), (1, 99, False), (1, 100, True)]
)
def test_porosity_counts_places_of_the_share(count, place, porous, vectors):
    nonces = [*share(count - 1), 1 + 3 * place]
    proof = vectors(nonces)
    commitment = Commitment.of(proof)
    assert is_porous(proof.round, count, nonces[-1]) == porous
    assert commitment.porous == porous
    if porous:
        with pytest.raises(CommitmentBroken):
            commitment.check(proof)
    else:
        commitment.check(proof)


ASKED = {"validator_key": "val", "block_hash": "fresh"}


def drawn(vectors, count, size, *, height=7, model="m", **changed):
    commitment = Commitment.of(vectors(share(4)))
    round = replace(commitment.round, block_height=height, model=model)
    top = commitment.top._replace(size=count)
    return replace(commitment, round=round, top=top).draw_places(size, **(ASKED | changed))


def test_the_sample_is_the_same_for_all_and_for_no_other_question(vectors):
    places = drawn(vectors, 1000, 50)
    assert drawn(vectors, 1000, 50) == places
    assert len(places) == 50
    assert all(a < b for a, b in pairwise(places))
    assert places[0] >= 0
    assert places[-1] < 1000
    for other in ({"height": 8}, {"model": "n"}, {"validator_key": "x"}, {"block_hash": "x"}):
        assert drawn(vectors, 1000, 50, **other) != places
    assert drawn(vectors, 5, 9) == (0, 1, 2, 3, 4)


def test_the_sample_is_that_of_the_page(vectors):
    text = b"16:assay.poc/sample3:val5:fresh1:71:m"
    places = []
    counter = 0
    while len(places) < 10:
        number = int.from_bytes(hashlib.sha256(text + counter.to_bytes(8)).digest()[:8])
        counter += 1
        if number < 2**64 - 2**64 % 37 and number % 37 not in places:
            places.append(number % 37)
    assert drawn(vectors, 37, 10) == tuple(sorted(places))


def test_every_place_is_drawn_as_often(vectors):
    """Chi-squared over 40 places and 8000 draws; p = 1e-6 at 99.4 with 39 degrees of freedom."""
    counts = np.zeros(40)
    for height in range(800):
        counts[list(drawn(vectors, 40, 10, height=height))] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 99.4


@pytest.mark.parametrize("wrong", [{"validator_key": ""}, {"block_hash": "a\n"}])
def test_no_sample_of_a_question_that_is_none(wrong, vectors):
    with pytest.raises(UsageError):
        drawn(vectors, 10, 5, **wrong)


def test_rounds_are_shares_of_a_key():
    assert is_porous(Round(block_hash="b", public_key="k", node_count=8), 1, 800)
    assert not is_porous(Round(block_hash="b", public_key="k", node_count=8), 1, 799)


def test_a_line_that_is_no_text_is_refused():
    with pytest.raises(ProofFormatError):
        Opening.parse("\ud800")
