"""``assay poc pins`` and ``verify --pins``: one file against provers who choose the header."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from assay.models import load_model
from assay.poc import NetworkPins, Proof, Round, prove

KNOWN = ("--block-hash", "b", "--public-key", "k")
ABSENT = ("--model", "/does/not/exist")
ANY = ("device", "attention", "batch_size", "threads", "torch", "library", "kernels")


def made(model, nonces=range(32), **changed: object) -> Proof:
    round = Round(**({"block_hash": "b", "public_key": "k", "seq_len": 16, "strength": 256} | changed))
    return prove(model, round, nonces, batch_size=8)


@pytest.fixture(scope="module")
def honest(small_model) -> Proof:
    return made(small_model)


@pytest.fixture
def pins(assay, honest: Proof, small_checkpoint: Path, tmp_path: Path) -> Path:
    """The pins that the command writes of the honest proof."""
    path = tmp_path / "pins.toml"
    honest.save(tmp_path / "honest.jsonl")
    new = assay(
        "poc", "pins", "new", "--model", small_checkpoint, "--from-proof", tmp_path / "honest.jsonl", "-o", path
    )
    assert new.code == 0, new.err
    return path


@pytest.fixture
def verify(assay, pins: Path, tmp_path: Path):
    """Verify a proof under the pins, as JSON."""

    def call(proof: Proof, *flags: object, model: tuple = ABSENT):
        path = tmp_path / "proof.jsonl"
        proof.save(path, overwrite=True)
        return assay("poc", "verify", path, *model, "--device", "cpu", "--json", "--pins", pins, *flags)

    return call


def test_an_honest_proof_needs_block_and_key_beside_the_file(verify, honest, small_checkpoint, monkeypatch, pins):
    here = ("--model", small_checkpoint)
    found = verify(honest, *KNOWN, model=here)
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert (said["verdict"], said["unpinned"]) == ("honest", [])
    assert {"digest", "weights", "builds", "fewest_nonces", "strength"} <= set(said["pinned"])
    alone = verify(honest, "--sample", 32, model=here)
    assert (alone.code, json.loads(alone.out)["unpinned"]) == (2, ["block_hash", "public_key"])


ATTACKS = {
    "seq_len 1": {"seq_len": 1},
    "preset 'permutation'": {"preset": "permutation"},
    "preset 'hardened'": {"preset": "hardened"},
    "preset 'artifact'": {"preset": "artifact"},
    "r_target 2.0": {"r_target": 2.0},
    "strength 32": {"strength": 32},
    "block_hash 'last week'": {"block_hash": "last week"},
    "public_key 'other'": {"public_key": "other"},
    "node_id 1": {"node_id": 1, "node_count": 2, "nonces": range(1, 65, 2)},
    "node_count 2": {"node_count": 2, "nonces": range(0, 64, 2)},
    "fewest_nonces 31": {"nonces": range(31)},
    "fewest_nonces 32": {"nonces": [*range(31), 40]},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_the_prover_chose_is_refused_by_name_before_a_model_is_loaded(name: str, verify, small_model):
    found = verify(made(small_model, **ATTACKS[name]), *KNOWN)
    assert (found.code, found.out) == (2, "")
    assert f"a proof with {name}" in found.err


def test_another_checkpoint_is_refused_before_and_after_it_is_loaded(verify, honest, small_checkpoint):
    llama = load_model("reference:llama", dtype="float32", device="cpu")
    found = verify(made(llama), *KNOWN)
    assert (found.code, found.out) == (2, "")
    assert f"model '{llama.digest}'" in found.err
    named = replace(llama, digest=honest.header.digest)  # the header says that it is the pinned one
    assert verify(made(named), *KNOWN, model=("--model", small_checkpoint)).code == 1
    assert "verify with the checkpoint" in verify(honest, *KNOWN, model=("--model", "reference:llama")).err


BUILDS = {
    "device": "NVIDIA H200",
    "batch_size": 1024,
    "engine": "vllm",
    "attention": "eager",
    "torch": "9.9",
    "threads": 7,
    "library": "transformers 9.9",
    "kernels": ("compiled",),
}


@pytest.mark.parametrize("field", BUILDS)
def test_another_build_is_refused_by_the_field_that_differs(field: str, verify, honest: Proof):
    fingerprint = replace(honest.header.fingerprint, **{field: BUILDS[field]})
    lied = Proof.build(replace(honest.header, fingerprint=fingerprint), honest.records, 1.0)
    found = verify(lied, *KNOWN)
    assert (found.code, found.out) == (2, "")
    assert f"made on another build: {field} " in found.err


def test_another_number_format_is_refused(verify, small_checkpoint):
    half = made(load_model(small_checkpoint, dtype="bfloat16", device="cpu"))
    assert "made in bfloat16" in verify(half, *KNOWN).err


def test_a_batch_that_would_fill_the_memory_is_refused_with_a_wildcard_too(verify, honest, pins, small_checkpoint):
    text = pins.read_text().replace("seq_len = 16", "seq_len = 64").replace("batch_size = 8", 'batch_size = "*"')
    pins.write_text(text)
    large = replace(honest.header.fingerprint, batch_size=1024, seq_len=4096)
    round = replace(honest.round, seq_len=4096)
    lied = Proof.build(replace(honest.header, round=round, fingerprint=large), honest.records, 1.0)
    assert "a proof with seq_len 4096" in verify(lied, *KNOWN).err


BESIDE = {
    "--seq-len": 8,
    "--preset": "artifact",
    "--strength": 32,
    "--r-target": 1.5,
    "--node-id": 1,
    "--node-count": 4,
    "--prover-dtype": "int8",
}


@pytest.mark.parametrize("flag", BESIDE)
def test_a_flag_that_contradicts_the_file_is_refused_by_its_name(flag: str, verify, honest: Proof):
    found = verify(honest, *KNOWN, flag, BESIDE[flag])
    assert (found.code, found.out) == (2, "")
    assert f"{flag} {BESIDE[flag]} beside " in found.err


def test_flags_that_agree_or_add_are_taken(verify, honest: Proof, pins, small_checkpoint):
    here = ("--model", small_checkpoint)
    agreed = ("--seq-len", 16, "--strength", 256, "--prover-dtype", "float32", "--nonces", "0:32")
    assert verify(honest, *KNOWN, *agreed, model=here).code == 0
    assert "a proof with nonces" in verify(honest, *KNOWN, "--nonces", "0:33").err
    pins.write_text(pins.read_text().replace("fewest", 'nonces = [1, 33]\nblock_hash = "b"\nfewest'))
    assert "a proof with nonces" in verify(honest, *KNOWN).err
    assert "--nonces range(0, 32) beside" in verify(honest, *KNOWN, "--nonces", "0:32").err
    assert "--block-hash c beside" in verify(honest, "--block-hash", "c", "--public-key", "k").err


def test_a_list_of_nodes_says_who_may_prove(assay, verify, honest: Proof, pins, small_model, small_checkpoint):
    nodes = '[[nodes]]\npublic_key = "k"\nnode_id = 0\n[[nodes]]\npublic_key = "k2"\nnode_id = 1\nnode_count = 2\n'
    pins.write_text(pins.read_text().replace("[[models]]", f"{nodes}[[models]]"))
    here = ("--model", small_checkpoint)
    assert "no --public-key beside" in verify(honest, "--block-hash", "b").err
    assert verify(honest, *KNOWN, model=here).code == 0
    assert "the key 'stranger'" in verify(honest, "--block-hash", "b", "--public-key", "stranger").err
    second = made(small_model, range(1, 65, 2), public_key="k2", node_id=1, node_count=2)
    assert verify(second, "--block-hash", "b", "--public-key", "k2", model=here).code == 0
    assert "public_key 'k2'" in verify(second, *KNOWN).err


def test_the_calibration_is_that_of_the_build(assay, verify, honest: Proof, pins, small_checkpoint, tmp_path: Path):
    path, copy, here = tmp_path / "calibration.json", tmp_path / "copy.jsonl", ("--model", small_checkpoint)
    copy.write_bytes((tmp_path / "honest.jsonl").read_bytes())
    measured = assay("poc", "calibrate", tmp_path / "honest.jsonl", copy, "-o", path)
    assert measured.code == 0, measured.err
    proof = ("--from-proof", tmp_path / "honest.jsonl")
    new = ("poc", "pins", "new", *here, *proof, "--calibration", path, "-o", pins, "--overwrite")
    assert assay(*new).code == 0
    found = verify(honest, *KNOWN, model=here)
    assert found.code == 0, found.err
    assert "calibration" in json.loads(found.out)["noise"]["source"]
    held = assay("poc", "pins", "check", pins, tmp_path / "honest.jsonl", *KNOWN, "--json")
    assert "default" not in json.loads(held.out)["noise"]
    assert "calibration: calibration.json" in json.loads(held.out)["pinned"]
    # A build that was not calibrated must not fall back to the wider default.
    pins.write_text(pins.read_text().replace("threads = 1", 'threads = "*"'))
    other = replace(honest.header.fingerprint, threads=7)
    lied = Proof.build(replace(honest.header, fingerprint=other), honest.records, 1.0)
    assert "no pinned calibration of this proof" in verify(lied, *KNOWN).err
    path.write_text(path.read_text() + "\n")
    assert "has the SHA-256" in verify(honest, *KNOWN).err
    path.unlink()
    assert "No such file" in verify(honest, *KNOWN).err


def test_pins_without_a_proof_are_to_be_filled_in(assay, small_checkpoint, tmp_path: Path):
    path = tmp_path / "pins.toml"
    new = assay("poc", "pins", "new", "--model", small_checkpoint, "--dtype", "float16", "-o", path, "--json")
    assert new.code == 0, new.err
    said = json.loads(new.out)
    assert (said["strength"], said["preset"], said["seq_len"]) == (256, "poc-2.0", 256)
    assert [part.rpartition(".")[2] for part in said["to_fill_in"].split(", ")] == ["engine", *ANY]
    assert path.read_text().count("# required: ") == 8
    found = assay("poc", "pins", "check", path)
    assert found.code == 2
    assert 'models[0].builds[0].engine is still "?"' in found.err
    path.write_text(path.read_text().replace('engine = "?"', 'engine = "hf"').replace('= "?"', '= "*"'))
    assert assay("poc", "pins", "check", path).code == 0
    (build,) = NetworkPins.load(path).models[0].builds
    assert (build.dtype, build.free) == (("float16",), ANY)
    assert "--overwrite" in assay("poc", "pins", "new", "--model", small_checkpoint, "-o", path).err


def test_formats_of_a_fingerprint_can_be_pinned(assay, small_checkpoint, tmp_path: Path):
    path = tmp_path / "pins.toml"
    for name in ("bfloat16+fp8_e4m3-cache", "int4-groups"):
        new = assay("poc", "pins", "new", "--model", small_checkpoint, "--dtype", name, "-o", path, "--overwrite")
        assert new.code == 0, new.err
        path.write_text(path.read_text().replace('engine = "?"', 'engine = "vllm"').replace('= "?"', '= "*"'))
        assert NetworkPins.load(path).models[0].builds[0].dtype == (name,)
    refused = assay("poc", "pins", "new", "--model", small_checkpoint, "--dtype", "fp8", "-o", path, "--overwrite")
    assert refused.code == 2
    assert "bfloat16+fp8_e4m3-cache" in refused.err


@pytest.mark.parametrize("preset", ["artifact", "decode-64"])
def test_no_target_is_pinned_where_no_distance_is_published(preset: str, assay, small_checkpoint, tmp_path: Path):
    path = tmp_path / "pins.toml"
    wanted = ("--preset", preset, "--dtype", "float32")
    new = assay("poc", "pins", "new", "--model", small_checkpoint, *wanted, "-o", path)
    assert new.code == 0, new.err
    path.write_text(path.read_text().replace('engine = "?"', 'engine = "hf"').replace('= "?"', '= "*"'))
    assert NetworkPins.load(path).round.r_target is None


def test_a_file_says_what_it_pins_and_leaves_open(assay, pins: Path, honest: Proof, small_model, tmp_path: Path):
    said = json.loads(assay("poc", "pins", "check", pins, "--json").out)
    assert any(line.startswith("round: preset poc-2.0, seq_len 16, strength 256") for line in said["pinned"])
    assert [line.split(":")[0].split(" of ")[0] for line in said["open"]] == ["block", "key", "nonces", "honest noise"]
    proof = tmp_path / "honest.jsonl"
    assert assay("poc", "pins", "check", pins, proof, *KNOWN).code == 0
    believed = assay("poc", "pins", "check", pins, proof, "--json")
    assert (believed.code, json.loads(believed.out)["unpinned"]) == (2, ["block_hash", "public_key"])
    made(small_model, seq_len=8).save(tmp_path / "short.jsonl")
    assert "a proof with seq_len 8" in assay("poc", "pins", "check", pins, tmp_path / "short.jsonl").err


def test_proofs_that_do_not_agree_make_no_pins(assay, honest, small_model, small_checkpoint, tmp_path: Path):
    honest.save(tmp_path / "a.jsonl")
    made(small_model, seq_len=8).save(tmp_path / "b.jsonl")
    new = ("poc", "pins", "new", "--model", small_checkpoint, "-o", tmp_path / "pins.toml")
    proofs = ("--from-proof", tmp_path / "a.jsonl", "--from-proof", tmp_path / "b.jsonl")
    assert "proofs with seq_len 8 and 16" in assay(*new, *proofs).err
    assert "--dtype float16 beside --from-proof" in assay(*new, *proofs[:2], "--dtype", "float16").err
    other = ("poc", "pins", "new", "--model", "reference:llama", "-o", tmp_path / "pins.toml")
    assert "trained, " in assay(*other, *proofs[:2]).err
    assert not (tmp_path / "pins.toml").exists()
    assert assay(*new, *proofs, "--seq-len", 16, "--public-key", "k", "--node-count", 2).code == 0
    network = NetworkPins.load(tmp_path / "pins.toml")
    assert (len(network.models[0].builds), [node.node_id for node in network.nodes]) == (2, [0, 1])


def test_a_prover_who_names_a_wildcard_does_not_write_one(assay, honest: Proof, small_checkpoint, tmp_path: Path):
    new = ("poc", "pins", "new", "--model", small_checkpoint, "-o", tmp_path / "pins.toml")
    for name, value in (("device", "*"), ("torch", "2.*"), ("dtype", "fp3"), ("kernels", ("*",))):
        fingerprint = replace(honest.header.fingerprint, **{name: value})
        lied = Proof.build(replace(honest.header, fingerprint=fingerprint), honest.records, 1.0)
        lied.save(tmp_path / "a.jsonl", overwrite=True)
        found = assay(*new, "--from-proof", tmp_path / "a.jsonl")
        assert f"a fingerprint with {name} " in found.err, found.err
        assert not (tmp_path / "pins.toml").exists()
