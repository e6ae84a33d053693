"""Proof files: a round trip, and every way in which a file can be wrong."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from assay.errors import ProofFormatError
from assay.files.jsonl import dumps
from assay.poc import Proof, Round, prove
from tests.poc.lines import edited, put
from tests.wordings import refuses


@pytest.fixture(scope="module")
def vectors(small_model, round_) -> Proof:
    round = Round(
        block_hash="b", public_key="k", seq_len=16, preset="artifact", node_id=2, node_count=5
    )
    return prove(small_model, round, round.nonces(3, 9), batch_size=4)


def test_a_proof_reads_back_as_it_was(proof: Proof, vectors: Proof, tmp_path: Path):
    for made in (proof, vectors):
        path = tmp_path / f"{made.round.preset}.jsonl"
        made.save(path)
        read = Proof.load(path)
        assert read.header == made.header
        assert read.footer == made.footer
        assert [r.nonce for r in read.records] == [r.nonce for r in made.records]
    np.testing.assert_array_equal(Proof.load(tmp_path / "poc-2.0.jsonl").distances, proof.distances)
    for a, b in zip(Proof.load(tmp_path / "artifact.jsonl").records, vectors.records, strict=True):
        assert a.vector.dtype == np.float16
        np.testing.assert_array_equal(a.vector, b.vector)


@pytest.mark.parametrize("nonces", [[4], [4, 9, 19], [4, 9, 14, 24, 34, 39], range(4, 9, 5)])
def test_any_nonces_of_a_share_read_back(nonces, small_model, tmp_path: Path):
    round = Round(block_hash="b", public_key="k", seq_len=16, node_id=4, node_count=5)
    prove(small_model, round, nonces, batch_size=4, output=tmp_path / "proof.jsonl")
    assert [record.nonce for record in Proof.load(tmp_path / "proof.jsonl").records] == list(nonces)


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        (b'"nonces":[', b"[]," * 2**23),
        (b'"nonces":[', b"{}," * 2**23),
        (b'"nonces":[', b"0," * 2**23),
        (b"{", b'"":0,' * 2**15),  # each unknown key takes a thousand times its room
    ],
    ids=["lists", "objects", "numbers", "keys"],
)
def test_a_line_of_too_many_parts_is_refused_before_it_is_parsed(
    place, parts, proof: Proof, tmp_path: Path, monkeypatch
):
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    header, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header.replace(place, place + parts, 1) + b"".join(rest))
    monkeypatch.setattr(
        "assay.poc.protocol.proof.read_as", lambda *_: pytest.fail("the line was parsed")
    )
    with refuses(ProofFormatError, "a line of too many parts is refused before it is parsed"):
        Proof.load(path)


def reordered(line: str) -> str:
    return dumps(dict(reversed(json.loads(line).items())))


BREAKS = {
    "empty file": (lambda lines: [], 1),
    "no header": (lambda lines: lines[1:], 1),
    "boolean schema": (edited(0, schema=True), 1),
    "strength with a point": (edited(0, round__strength=32.0), 1),
    "endless r_target": (edited(0, round__r_target=10**400), 1),
    "preset of null": (edited(0, round__preset=None), 1),
    "preset is a list": (edited(0, round__preset=["poc-2.0"]), 1),
    "model is a number": (edited(0, round__model=7, model__reference=7), 1),
    "empty batches": (edited(0, fingerprint__batch_size=0), 1),
    "negative threads": (edited(0, fingerprint__threads=-1), 1),
    "spaces in the header": (lambda lines: [lines[0].replace(":", ": "), *lines[1:]], 1),
    "round without key": (edited(0, round={"block_hash": "b"}), 1),
    "r_target out of range": (edited(0, round__r_target=3.0), 1),
    "unknown preset": (edited(0, round__preset="poc-9"), 1),
    "preset and pipeline differ": (edited(0, round__preset="artifact"), 1),
    "digest is a number": (edited(0, model__digest=7), 1),
    "digest that moves the cursor": (edited(0, model__digest="\x1b[2J"), 1),
    "device that names the window": (edited(0, fingerprint__device="\x1b]0;x\x07"), 1),
    "batch size is text": (edited(0, fingerprint__batch_size="8"), 1),
    "no nonces": (edited(0, nonces=[]), 1),
    "runs overlap": (edited(0, nonces=[[0, 30, 1], [20, 50, 1]]), 1),
    "endless run": (edited(0, nonces=[[0, 2**60, 1]]), 1),
    "nonce beyond all others": (edited(0, nonces=[[5, 2**80 + 10, 2**80]]), 1),
    "zero step": (edited(0, nonces=[[0, 40, 0]]), 1),
    "foreign share": (edited(0, round__node_count=2), 1),
    "record missing": (lambda lines: lines[:5] + lines[6:], 6),
    "record doubled": (lambda lines: [*lines[:6], lines[5], *lines[6:]], 7),
    "records swapped": (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], 6),
    "foreign nonce": (edited(5, nonce=4000), 6),
    "negative nonce": (edited(1, nonce=-0.0), 2),
    "boolean nonce": (edited(2, nonce=True), 3),
    "distance of text": (edited(5, distance="1.4"), 6),
    "distance of null": (edited(5, distance=None), 6),
    "distance too large": (edited(5, distance=2.1), 6),
    "endless distance": (edited(5, distance=10**400), 6),
    "carriage return": (lambda lines: [*lines[:5], lines[5] + "\r", *lines[6:]], 6),
    "zero behind the distance": (
        lambda lines: [*lines[:5], lines[5].replace(',"valid"', '0,"valid"'), *lines[6:]],
        6,
    ),
    "other order of keys": (lambda lines: [*lines[:5], reordered(lines[5]), *lines[6:]], 6),
    "byte order mark": (lambda lines: ["\ufeff" + lines[0], *lines[1:]], 1),
    "negative distance": (edited(5, distance=-1.0), 6),
    "wrong validity": (edited(5, distance=1.999, valid=True), 6),
    "validity of text": (edited(5, valid="yes"), 6),
    "extra field": (edited(5, note="x"), 6),
    "vector among distances": (put(5, '{"nonce":4,"vector":"AAAA"}'), 6),
    "NaN": (put(5, '{"nonce":4,"distance":NaN,"valid":false}'), 6),
    "infinity": (put(5, '{"nonce":4,"distance":1e999,"valid":false}'), 6),
    "doubled key": (put(5, '{"nonce":4,"nonce":4,"distance":1.4,"valid":true}'), 6),
    "not JSON": (put(5, "{"), 6),
    "not an object": (put(5, "[1]"), 6),
    "truncated": (lambda lines: lines[:20], 21),
    "no footer": (lambda lines: lines[:-1], 42),
    "value edited": (edited(5, distance=1.4, valid=True), 42),
    "footer seconds": (edited(-1, footer__seconds=-1), 42),
    "line after the end": (lambda lines: [*lines, lines[1]], 43),
}


WORDS = {  # of refusals that the comparison with the canonical line would make, less plainly
    "carriage return": "CRLF",
    "preset and pipeline differ": "another pipeline",
    "truncated": "the end of the records",
    "record missing": "nonce 5",
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_refused_with_its_line(name: str, proof: Proof, tmp_path: Path):
    good = tmp_path / "good.jsonl"
    proof.save(good)
    change, line = BREAKS[name]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(text + "\n" for text in change(good.read_text().splitlines())))
    with pytest.raises(ProofFormatError, match=f"line {line}: .*{WORDS.get(name, '')}"):
        Proof.load(bad)


@pytest.mark.parametrize(
    "vector",
    ["", "AAAA", "not base64!", "A" * 31, 7, None, base64.b64encode(np.full(12, np.nan, "<f2").tobytes()).decode(),
     base64.b64encode(np.full(12, np.inf, "<f2").tobytes()).decode(), base64.b64encode(b"\0" * 26).decode(),
     " " + base64.b64encode(b"\0" * 24).decode()],
)  # fmt: skip
def test_a_bad_vector_is_refused(vector, vectors: Proof, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    vectors.save(path)
    lines = edited(1, vector=vector)(path.read_text().splitlines())
    path.write_text("\n".join(lines) + "\n")
    with refuses(ProofFormatError, "a bad vector is refused"):
        Proof.load(path)


@pytest.mark.parametrize("cut", [1, 2, 30, 700, 1500, 3000])
def test_a_file_cut_at_any_byte_is_refused(cut: int, proof: Proof, tmp_path: Path):
    path = tmp_path / "cut.jsonl"
    proof.save(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with refuses(ProofFormatError, "a file cut at any byte is refused"):
        Proof.load(path)


def test_binary_junk_and_missing_files_are_refused(tmp_path: Path):
    path = tmp_path / "junk"
    path.write_bytes(bytes(range(256)))
    for wrong in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(ProofFormatError):
            Proof.load(wrong)
