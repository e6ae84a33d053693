"""``assay poc pins`` and ``verify --pins``: one file against provers who choose the header."""

import json
import re
from dataclasses import replace

import pytest

from assay.poc import NetworkPins, Proof
from assay.poc.verdict import Ledger

from .conftest import KNOWN, made

ANY = ("device", "attention", "batch_size", "threads", "torch", "library", "kernels")
STRONG = {"strength": 256}


@pytest.fixture(scope="module")
def honest(small_model):
    return made(small_model, **STRONG)


@pytest.fixture
def new(small_checkpoint, tmp_path):
    """Words that write pins for the small checkpoint."""
    return "poc", "pins", "new", "--model", small_checkpoint, "-o", tmp_path / "pins.toml"


@pytest.fixture
def pins(told, new, honest, tmp_path):
    """The pins that the command writes of the honest proof."""
    honest.save(tmp_path / "honest.jsonl")
    told(*new, "--from-proof", tmp_path / "honest.jsonl")
    return tmp_path / "pins.toml"


@pytest.fixture
def verify(verify, pins):
    """Verify a proof under the pins, as JSON."""
    return lambda proof, *flags, model="no/model": verify(
        proof, "--pins", pins, *flags, model=model
    )


def test_an_honest_proof_needs_block_and_key_beside_the_file(
    verify, honest, small_checkpoint, monkeypatch, pins
):
    found = verify(honest, *KNOWN, model=small_checkpoint)
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert (said["verdict"], said["unpinned"]) == ("honest", [])
    assert {"digest", "weights", "builds", "fewest_nonces", "strength"} <= set(said["pinned"])
    alone = verify(honest, "--sample", 32, model=small_checkpoint)
    assert (alone.code, alone.out) == (2, "")
    assert "no --block-hash and --public-key" in alone.err


BESIDE = {
    "--seq-len": 8,
    "--preset": "artifact",
    "--strength": 32,
    "--r-target": 1.5,
    "--node-count": 4,
    "--prover-dtype": "float8",
}


@pytest.mark.parametrize("flag", BESIDE)
def test_a_flag_that_contradicts_the_file_is_refused_by_its_name(flag, verify, honest):
    found = verify(honest, *KNOWN, flag, BESIDE[flag])
    assert (found.code, found.out) == (2, "")
    assert f"{flag} {BESIDE[flag]} beside " in found.err


def test_a_machine_that_the_proof_is_not_of_is_refused_by_its_name(verify, honest):
    """Pins of one machine allow both ways of counting, 0 of 1 and 1 of 1; the proof says one."""
    found = verify(honest, *KNOWN, "--node-id", 1)
    assert (found.code, found.out) == (2, "")
    assert "node_id 0" in found.err
    assert "--node-id" in found.err


def test_flags_that_agree_or_add_are_taken(verify, honest, pins, small_checkpoint):
    agreed = ("--seq-len", 16, "--strength", 256, "--prover-dtype", "float32", "--nonces", "0:32")
    assert verify(honest, *KNOWN, *agreed, model=small_checkpoint).code == 0
    assert "a proof with nonces" in verify(honest, *KNOWN, "--nonces", "0:33").err
    pins.write_text(
        pins.read_text().replace("fewest", 'nonces = [1, 33]\nblock_hash = "b"\nfewest')
    )
    assert "a proof with nonces" in verify(honest, *KNOWN).err
    assert "--nonces range(0, 32) beside" in verify(honest, *KNOWN, "--nonces", "0:32").err
    assert "--block-hash c beside" in verify(honest, "--block-hash", "c", "--public-key", "k").err


def test_the_calibration_is_that_of_the_build(
    told, refused, verify, new, honest, pins, small_checkpoint, tmp_path
):
    path = tmp_path / "calibration.json"
    copy = tmp_path / "copy.jsonl"
    copy.write_text(
        re.sub(r'"seconds":[ .\d]+', '"seconds":9.5', (tmp_path / "honest.jsonl").read_text())
    )
    told("poc", "calibrate", tmp_path / "honest.jsonl", copy, "-o", path)
    told(*new, "--from-proof", tmp_path / "honest.jsonl", "--calibration", path, "--overwrite")
    found = verify(honest, *KNOWN, model=small_checkpoint)
    assert found.code == 0, found.err
    assert "calibration" in json.loads(found.out)["noise"]["source"]
    fresh = (*new[:-1], tmp_path / "other.toml", "--calibration", path)
    assert "of another checkpoint or preset" in refused(*fresh, "--preset", "artifact")
    assert not (tmp_path / "other.toml").exists()
    held = told("poc", "pins", "check", pins, tmp_path / "honest.jsonl", *KNOWN)
    assert "default" not in held["noise"]
    assert "calibration: calibration.json" in held["pinned"]
    # A build that was not calibrated must not fall back to the wider default.
    pins.write_text(pins.read_text().replace("threads = 1", 'threads = "*"'))
    other = replace(honest.header.fingerprint, threads=7)
    lied = Proof.build(replace(honest.header, fingerprint=other), honest.records, 1.0)
    assert "no pinned calibration of this proof" in verify(lied, *KNOWN).err
    path.write_text(path.read_text() + "\n")
    assert "has the SHA-256" in verify(honest, *KNOWN).err
    path.unlink()
    assert "No such file" in verify(honest, *KNOWN).err


def filled_in(path, engine):
    """The pins of a file, in which everything but the engine is left open."""
    path.write_text(
        path.read_text().replace('engine = "?"', f'engine = "{engine}"').replace('= "?"', '= "*"')
    )
    return NetworkPins.load(path)


def test_pins_without_a_proof_are_to_be_filled_in(assay, told, refused, new, tmp_path):
    path = tmp_path / "pins.toml"
    said = told(*new, "--dtype", "float16")
    assert (said["strength"], said["preset"], said["seq_len"]) == (256, "poc-2.0", 256)
    assert [part.rpartition(".")[2] for part in said["to_fill_in"].split(", ")] == ["engine", *ANY]
    assert path.read_text().count("# required: ") == 8
    assert 'models[0].builds[0].engine is still "?"' in refused("poc", "pins", "check", path)
    (build,) = filled_in(path, "hf").models[0].builds
    assert assay("poc", "pins", "check", path).code == 0
    assert (build.dtype, build.free) == (("float16",), ANY)
    assert "--overwrite" in refused(*new)
    for name in ("bfloat16+fp8_e4m3-cache", "int4-groups"):  # formats that a fingerprint alone has
        told(*new, "--dtype", name, "--overwrite")
        assert filled_in(path, "vllm").models[0].builds[0].dtype == (name,)
    assert "bfloat16+fp8_e4m3-cache" in refused(*new, "--dtype", "fp8", "--overwrite")
    for preset in ("artifact", "decode-64"):  # of which no distance is published
        told(*new, "--preset", preset, "--dtype", "float32", "--overwrite")
        assert filled_in(path, "hf").round.r_target is None


def test_a_file_says_what_it_pins_and_leaves_open(
    assay, told, refused, pins, honest, small_model, tmp_path
):
    said = told("poc", "pins", "check", pins)
    assert any(
        line.startswith("round: preset poc-2.0, seq_len 16, strength 256")
        for line in said["pinned"]
    )
    assert [line.split(":")[0].split(" of ")[0] for line in said["open"]] == [
        "block",
        "key",
        "nonces",
        "honest noise",
    ]
    proof = tmp_path / "honest.jsonl"
    assert assay("poc", "pins", "check", pins, proof, *KNOWN).code == 0
    assert "a round without a proof" in refused("poc", "pins", "check", pins, "--node-id", 5)
    believed = assay("poc", "pins", "check", pins, proof, "--json")
    assert (believed.code, json.loads(believed.out)["unpinned"]) == (
        2,
        ["block_hash", "public_key"],
    )
    made(small_model, seq_len=8, **STRONG).save(tmp_path / "short.jsonl")
    other = refused("poc", "pins", "check", pins, tmp_path / "short.jsonl")
    assert "a proof with seq_len 8" in other
    assert "or correct the pinned seq_len\n" in other
    flagged = refused("poc", "pins", "check", pins, proof, "--block-hash", "block_beta")
    assert "or correct the pinned block_hash (--block-hash)\n" in flagged


def test_proofs_that_do_not_agree_make_no_pins(told, refused, new, honest, small_model, tmp_path):
    honest.save(tmp_path / "a.jsonl")
    made(small_model, seq_len=8, **STRONG).save(tmp_path / "b.jsonl")
    proofs = ("--from-proof", tmp_path / "a.jsonl", "--from-proof", tmp_path / "b.jsonl")
    assert "proofs with seq_len 8 and 16" in refused(*new, *proofs)
    assert "`dtype` float16 beside --from-proof" in refused(*new, *proofs[:2], "--dtype", "float16")
    said = refused(*new, *proofs[:2], "--model", "reference:llama")
    assert re.search("^warning: --model is given more than once(.|\n)*trained, ", said)
    assert not (tmp_path / "pins.toml").exists()
    told(*new, *proofs, "--seq-len", 16, "--public-key", "k", "--node-count", 2)
    network = NetworkPins.load(tmp_path / "pins.toml")
    assert (len(network.models[0].builds), [node.node_id for node in network.nodes]) == (2, [0, 1])


def test_a_prover_who_names_a_wildcard_does_not_write_one(refused, new, honest, tmp_path):
    for name, value in (("device", "*"), ("torch", "2.*"), ("dtype", "fp3"), ("kernels", ("*",))):
        fingerprint = replace(honest.header.fingerprint, **{name: value})
        lied = Proof.build(replace(honest.header, fingerprint=fingerprint), honest.records, 1.0)
        lied.save(tmp_path / "a.jsonl", overwrite=True)
        assert f"a fingerprint with {name} " in refused(*new, "--from-proof", tmp_path / "a.jsonl")
        assert not (tmp_path / "pins.toml").exists()


def test_pins_that_would_not_be_read_are_not_written(refused, new, honest, pins, tmp_path):
    before = pins.read_text()
    words = (*new, "--from-proof", tmp_path / "honest.jsonl", "--overwrite", "--public-key", "k")
    assert "node 'k' with 0, 2 times" in refused(*words, "--public-key", "k")
    assert "4194304 at most" in refused(*words, "--node-count", 2**52)
    assert pins.read_text() == before


@pytest.mark.slow
def test_alpha_of_an_account_is_that_of_the_network(
    assay, told, refused, verify, new, honest, pins, small_checkpoint
):
    folder = pins.parent
    ledger = ("--ledger", folder / "ledger.sqlite3")
    proof = ("--from-proof", folder / "honest.jsonl", "--overwrite")
    assert verify(honest, *KNOWN, *ledger, model=small_checkpoint).code == 0
    for wrong in ("1", "5/5", "0/10", "x/10", "1/2.5", "nan/10"):
        assert "false-convictions" in refused(*new, *proof, "--false-convictions", wrong)
    told(*new, *proof, "--false-convictions", "2/1000")
    held = NetworkPins.load(pins).network
    assert (held.nodes, held.false_convictions, held.alpha) == (1000, 2.0, 0.002)
    said = told("poc", "pins", "check", pins)["network"]
    assert (said["nodes"], said["alpha"], said["expected"]) == (1000, 0.002, None)
    assert said["law_error"].startswith("unknown beyond alpha")
    found = verify(honest, *KNOWN, *ledger, model=small_checkpoint)
    assert found.code == 2
    assert "alpha 0.002 for the ledger" in found.err, "it was begun at .001"
    other = ("--ledger", folder / "other.sqlite3")
    assert "alpha 0.001" in verify(honest, *KNOWN, *other, "--alpha", 0.001).err
    assert not (folder / "other.sqlite3").exists()
    assert verify(honest, *KNOWN, *other, model=small_checkpoint).code == 0
    with Ledger(other[1], read_only=True) as opened:
        assert opened.genesis.alpha == 0.002
    pins.write_text(pins.read_text().replace("nodes = 1000", "nodes = 2"))
    assert "fewer false convictions than nodes" in refused("poc", "pins", "check", pins)
    pins.write_text(pins.read_text().replace("nodes = 2", "node = 2"))
    assert "unknown key network.node" in refused("poc", "pins", "check", pins)
