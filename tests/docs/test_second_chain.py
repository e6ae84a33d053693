"""The chain's decode proof: the numbers of the vectors, in assay and in the page's second program."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import assay
from assay.files.jsonl import read_json
from assay.poc import HFEngine, Round, get_pipeline, prove
from assay.poc.protocol.sphere import Chain, sphere_points

ROOT = Path(__file__).parents[2]
KNOWN = read_json(ROOT / "tests" / "vectors" / "chain_decode.json")
CHECKPOINT = ROOT / "src/assay/models/reference/qwen3"
sys.path.insert(0, str(ROOT / "docs"))

import second_chain  # noqa: E402

ROUND = Round(
    block_hash=KNOWN["block_hash"],
    public_key=KNOWN["public_key"],
    preset=f"chain-decode-{KNOWN['steps']}",
    seq_len=KNOWN["seq_len"],
)


@pytest.fixture(scope="module")
def ours():
    model = assay.load_model("reference:qwen3", dtype="float32", device="cpu")
    return HFEngine(model, batch_size=16, seq_len=ROUND.seq_len)


@pytest.fixture(scope="module")
def theirs():
    return second_chain.Chains(CHECKPOINT, ROUND.as_dict())


def sha256(array, dtype="<f4"):
    return hashlib.sha256(np.ascontiguousarray(array, dtype).tobytes()).hexdigest()


def test_the_points_are_the_file_of_the_page():
    assert hashlib.sha256(second_chain.FILE.read_bytes()).hexdigest() == KNOWN["points_sha256"]
    assert sha256(sphere_points()) == KNOWN["points_sha256"]
    np.testing.assert_allclose(np.linalg.norm(sphere_points(), axis=1), 1, atol=1e-6)


def test_inputs_and_coordinates_of_steps(theirs):
    for row in KNOWN["draws"]:
        place = (row["nonce"], row["step"], row["previous"])
        made = theirs.input(*place)
        assert sha256(made.numpy()) == row["input_sha256_le_f32"]
        assert sha256(theirs.picked(*place), "<i8") == row["picked_sha256_le_i64"]
        if row["step"]:
            inputs = ROUND.inputs([row["nonce"]])
            shape = {"hidden_size": 256, "device": torch.device("cpu"), "dtype": torch.float32}
            previous = np.array([[row["previous"]]], np.uint8)
            chain = Chain(inputs, **shape)
            assert torch.equal(chain.embeddings(previous, row["step"]), made)


def test_chains_and_margins_are_those_of_the_vectors(ours, theirs):
    stated_MN = np.array([row["stated"] for row in KNOWN["chains"]], np.uint8)
    nonces = [row["nonce"] for row in KNOWN["chains"]]
    pipeline = get_pipeline(ROUND.preset)
    (replay,) = ours.run(ROUND.inputs(nonces), pipeline, stated_MN)
    (made,) = ours.run(ROUND.inputs(nonces), pipeline)
    for place, row in enumerate(KNOWN["chains"]):
        points, _ = theirs.run(row["nonce"], KNOWN["steps"])
        assert points.tolist() == made["points"][place].tolist() == row["points"]
        _, margins = theirs.run(row["nonce"], KNOWN["steps"], row["stated"])
        np.testing.assert_allclose(margins, row["margins"], atol=2e-5)
        np.testing.assert_allclose(replay["margins"][place], row["margins"], atol=2e-5)


def test_a_proof_is_read_and_run_again(ours, theirs, tmp_path, capsys, monkeypatch):
    path = tmp_path / "proof.jsonl"
    prove(ours.model, ROUND, range(3), engine=ours, output=path)
    monkeypatch.setattr(sys, "argv", ["second_chain.py", str(path), str(CHECKPOINT)])
    second_chain.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["0", "0"], ["1", "0"], ["2", "0"]]
    assert max(float(line[2]) for line in lines) < 1e-4
