"""Published sets of vectors: read as they are, refused in three parts when something is wrong, and
measured.
"""

import base64
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from assay_research.vector_sets import calibrate_vectors, machine_kind, read_vector_sets

from assay.errors import DataError, ProofMismatch
from assay.poc import Calibration
from assay.poc.verdict.sample_plan import sequential_test
from research.tests import published

DEEP = b'{"set": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize("name", ["sets.jsonl", "sets.jsonl.gz"])
def test_sets_are_read_as_they_were_published(tmp_path: Path, name: str):
    rows = [
        published.machine("2026-05__a-4xh100", gpu="NVIDIA H100 80GB HBM3"),
        published.machine("b", config={}),
    ]
    one, other = read_vector_sets(published.write(tmp_path / name, rows))
    assert (one.name, one.kind, one.model, one.batch_size) == (
        "2026-05__a-4xh100",
        "h100",
        "owner/Model-A",
        16,
    )
    assert (other.kind, other.model, other.batch_size) == ("", "", None)
    assert one.round == other.round == ("block", "key", 1024, 12)
    first = np.frombuffer(base64.b64decode(rows[0]["vectors"][7]), "<f2")
    assert np.array_equal(one.vectors[7], first)
    distances = one.distances(other)
    assert distances.shape == (400,)
    assert 0.1 < np.median(distances) < 0.2
    assert list(one.positions([5, 3])) == [5, 3]


@pytest.mark.parametrize(
    ("gpu", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("A100-SXM4-80GB", "a100"),
        ("B300_SXM6", "b300"),
        ("RTX_PRO_6000_Blackwell_SE", "rtxpro6000"),
        ("2026-05__minimax_m27_4xa100_sxm4_marlin_host2", "a100"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA H20", "h20"),
        ("2026-05__kimi-k26-int4", ""),
        ("", ""),
    ],
)
def test_the_kind_of_a_machine(gpu: str, kind: str):
    assert machine_kind(gpu) == kind


def changed(**values: object) -> bytes:
    return json.dumps(published.machine("a", nonces=40) | values).encode()


def vectors_of(value: float) -> list[str]:
    return [base64.b64encode(np.full(12, value, "<f2").tobytes()).decode()] * 40


HOSTILE = {
    "nothing": b"",
    "no object": b"7\n",
    "deep": DEEP,
    "no JSON": b"{",
    "no UTF-8": b'{"set": "\xff"}',
    "constant": b'{"set": NaN}',
    "key twice": b'{"set": "a", "set": "b"}',
    "config": changed(config=[1]),
    "batch": changed(config={"batch_size": 10**30}),
    "gpu": changed(config={"gpu": 7}),
    "name": changed(set="\u202e"),
    "long name": changed(set="x" * 1000),
    "huge k": changed(k_dim=10**12),
    "no k": changed(k_dim=None),
    "k is a float": changed(k_dim=12.0),
    "seq_len": changed(seq_len=True),
    "no nonces": changed(nonces=[], vectors=[]),
    "nonce twice": changed(nonces=[1] * 40),
    "nonce is a float": changed(nonces=[0.5] * 40),
    "negative nonce": changed(nonces=list(range(-1, 39))),
    "huge nonce": changed(nonces=[2**63, *range(39)]),
    "fewer vectors": changed(vectors=vectors_of(0.2)[1:]),
    "other length": changed(vectors=["AAAA"] * 40),
    "no base64": changed(vectors=["*" * 32] * 40),
    "padding in the middle": changed(vectors=["=" * 32] * 40),
    "vector is a number": changed(vectors=[7] * 40),
    "not a number": changed(vectors=vectors_of(float("nan"))),
    "infinite": changed(vectors=vectors_of(float("inf"))),
    "set twice": changed() + b"\n" + changed(),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_hostile_files_are_refused_in_three_parts(tmp_path: Path, content: bytes, packed: bool):
    path = tmp_path / ("sets.jsonl.gz" if packed else "sets.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError) as refused:
        read_vector_sets(path)
    assert "sets.jsonl" in refused.value.seen
    assert refused.value.wanted
    assert refused.value.do


def test_hostile_gzip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sets.jsonl.gz"
    good = gzip.compress(changed())
    for content in (b"", b"plain", good[:-9], good + good, good + b"x"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="gzip"):
            read_vector_sets(path)
    monkeypatch.setattr("assay_research.vector_sets.LARGEST_CONTENT", 1000)
    path.write_bytes(gzip.compress(b" " * 10**6))  # a thousand times larger than it is stored
    with pytest.raises(DataError, match="longer than 1000 bytes when unpacked"):
        read_vector_sets(path)
    with pytest.raises(DataError):
        read_vector_sets(tmp_path / "missing.jsonl.gz")


def test_a_law_of_vectors(tmp_path: Path):
    rows = [*published.network(4, nonces=120), published.machine("cheat-1", noise=0.5, nonces=120)]
    *honest, cheat = read_vector_sets(published.write(tmp_path / "sets.jsonl", rows))
    measured = calibrate_vectors(honest, digest="a" * 64)
    (build,) = measured.builds
    assert (build.preset, build.output, build.digest, build.n) == (
        "artifact",
        "vector",
        "a" * 64,
        120,
    )
    assert [one.kind for one in build.machines] == ["b200", "h100", "h200", "a100"]
    assert build.effect == 1.25
    assert build.left_out is not None
    assert build.left_out.holds
    noise = build.noise_between("", None)
    assert sequential_test(noise).update(honest[0].distances(cheat)).verdict == "fraud"
    assert sequential_test(noise).update(honest[0].distances(honest[1])).verdict != "fraud"
    measured.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == measured


def test_vectors_of_different_rounds_are_refused(tmp_path: Path):
    rows = [published.machine("a"), published.machine("b", block="other")]
    sets = read_vector_sets(published.write(tmp_path / "sets.jsonl", rows))
    with pytest.raises(ProofMismatch, match="different rounds"):
        calibrate_vectors(sets)
