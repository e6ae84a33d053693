"""``assay poc verify`` against provers who choose the header, the nonces or the calibration."""

import json
import os
from dataclasses import replace

import pytest

from assay.files.jsonl import dumps

from .conftest import KNOWN, made


def test_a_proof_that_is_believed_is_not_honest_to_the_shell(verify, small_model):
    """Block and key alone: any length and any nonces are the prover's word."""
    found = verify(made(small_model, range(24)), *KNOWN)
    assert found.code == 2
    said = json.loads(found.out)
    assert said["verdict"] == "honest"
    assert said["unpinned"] == ["seq_len", "nonces"]
    assert verify(made(small_model), *KNOWN, "--seq-len", 16).code == 0


@pytest.mark.parametrize(
    ("flags", "missing"),
    [((), "no --block-hash and --public-key"), (KNOWN[:2], "no --public-key")],
)
def test_a_proof_without_block_and_key_is_refused_before_the_model_is_loaded(
    flags, missing, refused, small_model, small_checkpoint, tmp_path, monkeypatch
):
    made(small_model).save(tmp_path / "proof.jsonl")
    monkeypatch.setattr(
        "assay.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    known = ("--model", small_checkpoint, *flags)
    assert missing in refused("poc", "verify", tmp_path / "proof.jsonl", *known)


ATTACKS = {
    "seq_len": ({"seq_len": 1}, range(32), ()),
    "nonces": ({}, range(4, 20), ("--seq-len", 16)),
    "nonces: chosen": ({}, [*range(31), 40], ("--seq-len", 16)),
    "preset": ({"preset": "artifact"}, range(32), ("--seq-len", 16)),
    "preset: hardened": ({"preset": "hardened"}, range(32), ("--seq-len", 16)),
    "r_target": ({"r_target": 2.0}, range(32), ("--seq-len", 16)),
    "strength": ({"strength": 256}, range(32), ("--seq-len", 16)),
    "node_id, node_count": ({"node_id": 1, "node_count": 2}, range(1, 65, 2), ("--seq-len", 16)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_the_prover_chose_is_named_and_never_code_0(name, verify, small_model):
    changed, nonces, flags = ATTACKS[name]
    found = verify(made(small_model, nonces, **changed), *KNOWN, *flags)
    said = json.loads(found.out)
    assert (found.code, said["verdict"]) == (2, "honest")
    assert ", ".join(said["unpinned"]) == name.split(":")[0]


@pytest.mark.slow
def test_the_published_round_needs_block_and_key_alone(verify, reference_model, assay, tmp_path):
    proof = made(reference_model, range(7, 39), seq_len=256)
    path = tmp_path / "published.jsonl"
    proof.save(path)
    model = ("--model", reference_model.reference, "--device", "cpu")
    assert assay("poc", "verify", path, *model, *KNOWN, "--sample", 12).code == 0
    text = assay("poc", "verify", path, *model, "--sample", 12, "--block-hash", "b")
    assert (text.code, "no --public-key" in text.err) == (2, True)


def test_a_share_is_pinned_by_its_positions(verify, small_model):
    share = made(small_model, range(1, 65, 2), node_id=1, node_count=2)
    pins = (*KNOWN, "--seq-len", 16, "--node-id", 1, "--node-count", 2)
    assert verify(share, *pins).code == 0
    assert verify(share, *pins, "--nonces", "0:32").code == 0
    assert verify(share, *pins, "--nonces", "1:33").code == 2


def edited(proof, path, **changed):
    """Write a proof whose header says something else than its prover wrote."""
    lines = "".join(f"{proof.header.line(record)}\n" for record in proof.records)
    header = replace(proof.header, **changed)
    path.write_text(f"{dumps(header.as_dict())}\n{lines}{proof.footer.line()}\n")
    return path


def test_refusals_come_before_the_model_is_loaded(refused, small_model, tmp_path):
    proof = made(small_model)
    long = {
        "round": replace(proof.round, seq_len=2**20),
        "fingerprint": replace(proof.header.fingerprint, seq_len=2**20, batch_size=10**9),
    }
    good = edited(proof, tmp_path / "good.jsonl")
    absent = ("--model", "no/model", *KNOWN)
    for path, flags, seen in (
        (good, ("--sample", 0), "a sample of 0"),
        (good, ("--sample", 33), "a sample of 33"),
        (good, ("--seq-len", 256), "seq_len 16"),
        (edited(proof, tmp_path / "long.jsonl", **long), (), "--seq-len 1048576"),
    ):
        assert seen in refused("poc", "verify", path, *absent, *flags)
    (tmp_path / "taken.jsonl").write_text("")
    for output, seen in (
        ("taken.jsonl", "--overwrite"),
        ("no/x.jsonl", "create the directory first"),
        (".", "Is a directory"),
        ("taken.jsonl/x.jsonl", "Not a directory"),
    ):
        assert seen in refused("poc", "prove", *absent, "-o", tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "good.jsonl",
        "long.jsonl",
        "taken.jsonl",
    ]


def test_files_that_are_no_files_are_refused(refused, small_model, tmp_path):
    good = edited(made(small_model), tmp_path / "good.jsonl")
    fifo = tmp_path / "fifo"
    sparse = tmp_path / "sparse"
    os.mkfifo(fifo)
    with sparse.open("wb") as file:
        file.truncate(2**32)
    for proof, calibration in (
        (fifo, None),
        (sparse, None),
        ("/dev/zero", None),
        (good, fifo),
        (good, sparse),
    ):
        flags = ("--calibration", calibration) if calibration else ()
        said = refused("poc", "verify", proof, "--model", "no/model", *flags)
        assert any(
            seen in said for seen in ("is a pipe or a device", "longer than 67108864 bytes")
        ), said
