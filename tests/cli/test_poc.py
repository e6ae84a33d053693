"""``assay poc``: the main job, its exit codes, and its errors."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from assay.models import precision
from assay.poc import Commitment, Proof, calibrate, cheats

PINS = (
    "--block-hash",
    "b",
    "--public-key",
    "k",
    "--seq-len",
    16,
    "--nonces",
    "0:24",
)  # what `prove` proves


@pytest.fixture
def prove(assay, proving):
    """Run the words that prove."""
    return lambda *extra, **flags: assay(*proving(*extra, **flags))


def test_prove_and_verify(prove, assay, told, small_checkpoint, tmp_path):
    made = prove("proof.jsonl", "--json")
    assert made.code == 0, made.err
    summary = json.loads(made.out)
    assert summary["schema"] == "assay.poc.prove/1"
    assert summary["records"] == 24
    options = ("--model", small_checkpoint, "--device", "cpu", *PINS)
    verdict = told("poc", "verify", tmp_path / "proof.jsonl", *options)
    assert verdict["schema"] == "assay.poc.verdict/1"
    assert (verdict["verdict"], verdict["checked"]) == ("honest", 24)
    stated = {
        name: verdict[name] for name in ("block_hash", "public_key", "model", "dtype", "preset")
    }
    assert list(stated.values()) == ["b", "k", str(small_checkpoint), "float32", "poc-2.0"]
    assert (verdict["pinned"], verdict["unpinned"]) == (
        ["block_hash", "public_key", "seq_len", "nonces"],
        [],
    )
    text = assay("poc", "verify", tmp_path / "proof.jsonl", *options)
    assert text.code == 0
    assert "honest" in text.out


def test_fraud_is_code_1_and_too_little_is_code_2(prove, assay, small_checkpoint, tmp_path):
    prove()
    path = tmp_path / "proof.jsonl"
    cheats.invented(Proof.load(path)).save(tmp_path / "fake.jsonl")
    options = ("--model", small_checkpoint, "--device", "cpu")
    assert assay("poc", "verify", tmp_path / "fake.jsonl", *options, *PINS).code == 1
    few = assay("poc", "verify", path, *options, *PINS, "--sample", 1)
    assert few.code == 2
    assert "undecided" in few.out


def test_hardened_is_proved_in_float16(prove, assay, refused, small_checkpoint, tmp_path):
    assert prove(preset="hardened").code == 0
    options = ("--model", small_checkpoint, "--device", "cpu", "--preset", "hardened", *PINS)
    assert Proof.load(tmp_path / "proof.jsonl").header.fingerprint.dtype == "float16"
    assert assay("poc", "verify", tmp_path / "proof.jsonl", *options).code == 0
    assert prove("wider.jsonl", preset="hardened", dtype="bfloat16").code == 0
    assert "pin bfloat16 (--prover-dtype)" in refused(
        "poc", "verify", tmp_path / "wider.jsonl", *options
    )
    assert (
        assay(
            "poc", "verify", tmp_path / "wider.jsonl", *options, "--prover-dtype", "bfloat16"
        ).code
        == 0
    )


def test_a_proof_in_another_number_format_is_refused(
    prove, assay, refused, small_checkpoint, tmp_path
):
    prove(dtype="bfloat16")
    options = (
        "--model",
        small_checkpoint,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        *PINS,
        "--prover-dtype",
    )
    assert "made in bfloat16" in refused(
        "poc", "verify", tmp_path / "proof.jsonl", *options, "float16"
    )
    for unknown in ("half", ""):
        refused("poc", "verify", tmp_path / "proof.jsonl", *options, unknown)
    assert assay("poc", "verify", tmp_path / "proof.jsonl", *options, "bfloat16").code == 0


def test_calibrate_from_two_proofs_and_use_it(prove, told, small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        precision, "has_fast_products", lambda dtype: True
    )  # else some CPUs differ in their products as well
    assert prove("a.jsonl", nonces="0:32").code == 0
    assert prove("b.jsonl", nonces="0:32", dtype="bfloat16").code == 0
    path = tmp_path / "calibration.json"
    said = told("poc", "calibrate", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "-o", path)
    assert said["engines_differ_in"] == "dtype float32 / bfloat16"
    assert (said["n"], said["machines"]) == (32, 2)
    assert said["typical_residual"] > 0
    judge = (
        "--model",
        small_checkpoint,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--calibration",
        path,
    )
    found = told("poc", "verify", tmp_path / "b.jsonl", *judge, *PINS[:6])
    assert found["noise"]["source"] == "calibration on 32 nonces"


def test_a_calibration_with_another_kind_of_engine_is_refused_before_a_model_is_loaded(
    prove, refused, small_checkpoint, tmp_path, monkeypatch
):
    assert prove("hf.jsonl", nonces="0:32").code == 0
    proof = Proof.load(tmp_path / "hf.jsonl")
    path = tmp_path / "calibration.json"
    records = [
        replace(one, distance=one.distance + (-1) ** one.nonce * 1e-5) for one in proof.records
    ]
    header = replace(proof.header, fingerprint=replace(proof.header.fingerprint, engine="vllm"))
    (made := calibrate(proof, beside := Proof.build(header, records, 1.0))).save(path)
    half = replace(
        one := made.builds[0],
        machines=(one.machines[0], replace(one.machines[1], fingerprint=None)),
    )
    assert (half.judges(half.engines[0]), half.judges(one.engines[1])) == ([], half.engines)
    beside.save(tmp_path / "vllm.jsonl")
    monkeypatch.setattr(
        "assay.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    for prover, judge in (("hf", "vllm"), ("vllm", "hf")):  # of a pair, only the other one judges
        options = (
            "--model",
            small_checkpoint,
            "--calibration",
            path,
            "--engine",
            prover,
            *PINS[:6],
        )
        said = refused("poc", "verify", tmp_path / f"{prover}.jsonl", *options)
        assert f"a calibration for validators on {judge}" in said
        assert f"pass --engine {judge}, or measure" in said


@pytest.mark.slow
def test_the_real_command(small_checkpoint, tmp_path):
    """One run in a process of its own: stdout holds the result alone, even with warnings as
    errors.
    """
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "assay",
        "poc",
        "prove",
        "--model",
        str(small_checkpoint),
    ]
    command += [
        "--block-hash",
        "b",
        "--public-key",
        "k",
        "--nonces",
        "0:8",
        "--seq-len",
        "16",
        "--json",
    ]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "p.jsonl")],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"] == 8
    said = done.stderr.splitlines()  # on a slow machine
    assert all(line.startswith(("proving: ", "warning: ")) for line in said), said


@pytest.mark.parametrize(
    ("preset", "said"), [("artifact", "of 24 mismatches"), ("hardened", "none for this preset")]
)
def test_the_published_rule_is_held_against_published_presets(
    preset, said, prove, assay, small_checkpoint, tmp_path
):
    assert prove("proof.jsonl", preset=preset).code == 0
    seen = assay(
        "poc",
        "verify",
        tmp_path / "proof.jsonl",
        "--model",
        small_checkpoint,
        "--preset",
        preset,
        *PINS,
    )
    assert said in next(line for line in seen.out.splitlines() if "published rule" in line)


def test_the_round_comes_from_the_pins(
    prove, proving, assay, refused, small_checkpoint, tmp_path, monkeypatch
):
    assert prove("first.jsonl", nonces="0:32").code == 0
    pins = tmp_path / "pins.toml"
    new = (
        "poc",
        "pins",
        "new",
        "--model",
        small_checkpoint,
        "--from-proof",
        tmp_path / "first.jsonl",
        "-o",
        pins,
    )
    assert assay(*new, "--strength", 32).code == 0
    base = (
        "poc",
        "prove",
        "--pins",
        pins,
        "--block-hash",
        "next",
        "--public-key",
        "k",
        "--device",
        "cpu",
    )
    made = assay(*base, "--nonces", "0:32", "-o", tmp_path / "second.jsonl")
    assert made.code == 0, made.err
    header = Proof.load(tmp_path / "second.jsonl").header
    assert (header.round.seq_len, header.round.block_hash, header.fingerprint.batch_size) == (
        16,
        "next",
        8,
    )
    known = (
        "--pins",
        pins,
        "--block-hash",
        "next",
        "--public-key",
        "k",
        "--device",
        "cpu",
        "--model",
    )
    assert assay("poc", "verify", tmp_path / "second.jsonl", *known, small_checkpoint).code == 0
    begun = (
        tmp_path / "third.jsonl.partial"
    )  # under pins, and continued without them: only as the header says
    begun.write_text("\n".join((tmp_path / "second.jsonl").read_text().splitlines()[:20]) + "\n")
    assert "repeat that command with all its flags" in refused(
        *proving(begun.stem, nonces="0:32", block_hash="next", seq_len=8)
    )
    begun.unlink()
    monkeypatch.setattr(
        "assay.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    wrong = {
        "--seq-len": 17,
        "--strength": 256,
        "--batch-size": 16,
        "--dtype": "bfloat16",
        "--nonces": "0:8",
    }
    for flag, value in (wrong | {"--preset": "artifact"}).items():
        said = refused(*base, flag, value, "-o", tmp_path / "third.jsonl")
        assert f"beside {pins}" in said
        # A setting that is no option is named by its key in the file.
        assert flag in said or f"`{flag[2:].replace('-', '_')}`" in said
    assert not (tmp_path / "third.jsonl").exists()


def test_one_number_is_the_end_of_a_range_and_a_verdict_begins_with_a_sentence(
    assay, proving, small_checkpoint
):
    made = proving(nonces="8", seq_len=16)
    assert assay(*made).code == 0
    assert Proof.load(made[-1]).header.nonces == ((0, 8, 1),)
    known = ("--block-hash", "b", "--public-key", "k", "--seq-len", "16")
    said = assay("poc", "verify", made[-1], "--model", small_checkpoint, *known).out.splitlines()
    assert "8 nonces" in said[0], "what was done, before the table"
    assert all(len(line.rstrip()) <= 160 for line in said)


def test_a_proof_is_held_to_its_commitments(prove, assay, small_checkpoint, tmp_path):
    """0 as committed, 1 where the node changed its mind, 2 for the commitment of another round."""
    made = prove("proof.jsonl", "--json", commit=tmp_path / "all.json")
    assert made.code == 0, made.err
    root = Commitment.load(tmp_path / "all.json").root
    assert json.loads(made.out)["commitment"] == root
    proof = Proof.load(tmp_path / "proof.jsonl")
    early = Proof.build(
        replace(proof.header, nonces=((0, 8, 1),)), proof.records[:8], proof.footer.seconds
    )
    Commitment.of(early).save(tmp_path / "early.json")
    options = ("--model", small_checkpoint, "--device", "cpu", *PINS)
    words = ("poc", "verify", tmp_path / "proof.jsonl", *options)
    both = ("--commitment", tmp_path / "early.json", "--commitment", tmp_path / "all.json")
    assert assay(*words, *both).code == 0
    alone = assay(*words, "--commitment", tmp_path / "early.json", "--json")
    assert alone.code == 1
    verdict = json.loads(alone.out)
    assert (verdict["verdict"], verdict["checked"], verdict["proved"]) == ("fraud", 0, 24)
    order = [*range(22), 23, 22]
    swapped = [replace(proof.records[at], nonce=nonce) for nonce, at in enumerate(order)]
    Proof.build(proof.header, swapped, 1.0).save(tmp_path / "proof.jsonl", overwrite=True)
    broken = assay(*words, *both)
    assert broken.code == 1
    assert "nothing was recomputed" in broken.out
    other = replace(
        Commitment.load(tmp_path / "all.json"), round=replace(proof.round, public_key="x")
    )
    other.save(tmp_path / "other.json")
    assert assay(*words, "--commitment", tmp_path / "other.json").code == 2


def test_a_commitment_that_cannot_be_written_leaves_a_proof_that_continues(
    prove, monkeypatch, tmp_path
):
    """The proof had its name by then, and the same command was refused."""
    save = Commitment.save
    monkeypatch.setattr(Commitment, "save", lambda self, path: save(self, tmp_path))
    assert prove("proof.jsonl", commit=tmp_path / "all.json").code == 2
    assert not (tmp_path / "proof.jsonl").exists()
    monkeypatch.undo()
    again = prove("proof.jsonl", "--json", commit=tmp_path / "all.json")
    assert (again.code, json.loads(again.out)["resumed"]) == (0, 24)
    assert Commitment.load(tmp_path / "all.json").top.size == 24


def test_a_round_that_would_be_porous_is_not_committed_to(refused, proving, tmp_path):
    words = proving("proof.jsonl", "--commit", tmp_path / "all.json", nonces="2400:2424")
    assert "--commit" in refused(*words)
    assert list(tmp_path.glob("proof*")) == []


def test_the_self_test_says_what_changes_and_ends_with_its_code(
    assay, refused, told, small_checkpoint
):
    words = ("poc", "selftest", "--model", small_checkpoint, "--device", "cpu")
    words += ("--seq-len", 16, "--batch-size", 8, "--nonces", 8)
    document = told(*words, "--preset", "artifact", "--dtype", "float32")
    assert document["schema"] == "assay.poc.selftest/1"
    assert document["exit_code"] == 0
    assert document["engine"]["batch_size"] == 8
    names = {row["setting"] for row in document["comparisons"]}
    assert names >= {"again", "other neighbours", "alone in the batch", "batches of 2"}
    shown = assay(*words, "--preset", "artifact", "--dtype", "float32")
    assert shown.code == 0
    assert "other neighbours" in shown.out
    assert "decode" in refused(*words, "--preset", "decode")
    assert "--frame" in refused(*words, "--preset", "tokens-1")


def test_tables_are_for_people_and_name_the_next_command(assay, proving, prove, tmp_path):
    """Three digits, no empty row, 120 columns; on 0944c8c1 a law has 17 digits and empty rows."""
    shown = [
        prove(f"{number}.jsonl", nonces="0:32", dtype=dtype)
        for number, dtype in enumerate(("float32", "bfloat16", "float16"))
    ]
    law = ("-o", tmp_path / "law.json")
    shown.append(assay("poc", "calibrate", *sorted(tmp_path.glob("*.jsonl")), *law))
    for done in shown:
        assert done.code == 0, done.err
        _, *rows = done.out.splitlines()
        assert all(len(row.split()) > 1 for row in rows), "an empty row"
        assert max(len(row.rstrip()) for row in rows) <= 120
        assert not re.search(r"\d\.\d{7,}|\w\(\w+=", done.out)
    assert "may be accused" in shown[-1].out
    assert "two number formats are two builds" in shown[-1].err
    assert "--dtype" in shown[-1].err
    assert "next: assay poc verify" in shown[0].err
    vectors = prove("vectors.jsonl", preset="artifact")
    assert "valid" not in vectors.out, "this preset has no target"
    assert "first batch" not in vectors.out


def test_the_next_command_leaves_nothing_on_the_provers_word(assay, prove):
    """It named neither seeds of 256 bits nor the share, so that pasted it ended with code 2."""
    shown = prove("a share.jsonl", nonces="0:32", strength=256, node_id=1, node_count=3)
    line = shown.err.splitlines()[-1]
    words = shlex.split(line.removeprefix("next: assay "))
    assert json.loads(assay(*words, "--json").out)["unpinned"] == []
