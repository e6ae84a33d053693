"""The preset tokens-1: its formula, its frame, and what is refused of both."""

import json
from dataclasses import replace

import numpy as np
import pytest

from assay import streams
from assay.errors import DataError, ProofFormatError, ProofMismatch, UsageError
from assay.models import load_model
from assay.models.frame import Frame
from assay.poc import (
    PIPELINES,
    HFEngine,
    Pins,
    Proof,
    Round,
    calibrate,
    measure_frame,
    prove,
    verify,
)
from assay.poc.cheats import rounded
from assay.poc.engines.base import device_tokens, token_inputs
from tests.wordings import refuses

ROUND = Round(block_hash="block_alpha", public_key="node_A", seq_len=32, preset="tokens-1")


@pytest.fixture(scope="module")
def framed():
    model = load_model("reference:qwen3", dtype="float32", device="cpu")
    return model.with_frame(measure_frame(model))


@pytest.fixture(scope="module")
def halved(framed):
    """Load the same model in a format of 16 bits."""
    return load_model("reference:qwen3", dtype="bfloat16", device="cpu").with_frame(framed.frame)


@pytest.fixture(scope="module")
def proof(framed):
    return prove(framed, ROUND, range(64), batch_size=8)


def test_the_frame_is_that_of_random_tokens_without_special_ones(framed):
    frame = framed.frame
    tokenizer = framed.tokenizer
    assert set(tokenizer.all_special_ids) <= set(frame.left_out.tolist())
    inputs = ROUND.inputs([3, 2**40])
    ids = device_tokens(streams.get_backend("auto", "cpu"), inputs, frame, seq_len=64)
    assert ids.tolist() == token_inputs(inputs, frame, seq_len=64).ravel().tolist()
    drawn = frame.tokens(np.random.default_rng(0).integers(0, 2**32, (1, 40_000), np.uint32))
    assert len(set(drawn.ravel().tolist())) > 0.99 * frame.rows
    assert not set(drawn.ravel().tolist()) & set(frame.left_out.tolist())
    engine = HFEngine(framed, batch_size=8, seq_len=64)
    fresh = replace(ROUND, seq_len=64, block_hash="another block")
    states = (
        engine.states(engine.embeddings(fresh.inputs(range(8))))[:, 8:]
        .double()
        .numpy()
        .reshape(-1, framed.hidden_size)
    )
    seen = (states - frame.mean) / frame.scale
    unit = seen / np.linalg.norm(seen, axis=1, keepdims=True)
    energy = (unit**2).mean(axis=0)
    assert 1 / (energy**2).sum() > 0.8 * framed.hidden_size
    raw = states / np.linalg.norm(states, axis=1, keepdims=True)
    assert 1 / ((raw**2).mean(axis=0) ** 2).sum() < 0.4 * framed.hidden_size


@pytest.mark.slow
def test_a_proof_names_its_frame_and_is_judged_in_it(framed, halved, proof, tmp_path):
    proof.save(tmp_path / "proof.jsonl")
    read = Proof.load(tmp_path / "proof.jsonl")
    assert read.header.frame == framed.frame.sha256
    law = calibrate(proof, prove(halved, ROUND, range(64), batch_size=8))
    assert verify(read, halved, expect=Pins.of(ROUND), calibration=law).verdict != "fraud"
    moved = Frame(**{**{n: getattr(framed.frame, n) for n in ("digest", "weights", "rows", "left_out", "scale")},
                     "mean": framed.frame.mean + np.float32(0.01)})  # fmt: skip
    with refuses(ProofMismatch, "a proof names its frame and is judged in it"):
        verify(read, framed.with_frame(moved), expect=Pins.of(ROUND), calibration=law)
    with refuses(UsageError, "a proof names its frame and is judged in it, 2"):
        verify(read, framed.with_frame(None), expect=Pins.of(ROUND), calibration=law)
    lines = (tmp_path / "proof.jsonl").read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    del header["model"]["frame"]
    lines[0] = json.dumps(header, separators=(",", ":")) + "\n"
    (tmp_path / "proof.jsonl").write_text("".join(lines))
    with refuses(ProofFormatError, "a proof names its frame and is judged in it, 3"):
        Proof.load(tmp_path / "proof.jsonl")


def test_a_cheaper_model_is_far_from_an_honest_one(halved, proof):
    made = [prove(model, ROUND, range(16), batch_size=8) for model in (halved, rounded(halved, 4))]
    wanted = np.array([record.vector for record in proof.records[:16]], float)
    sizes = [
        np.linalg.norm(np.array([record.vector for record in one.records]) - wanted, axis=1)
        for one in made
    ]
    assert sizes[0].max() < np.median(sizes[1]) / 4


@pytest.mark.parametrize(
    "change",
    [
        {"scale": np.zeros(4, np.float32)},
        {"mean": np.full(4, np.nan, np.float32)},
        {"mean": np.zeros(3, np.float32)},
        {"left_out": np.array([3, 1], np.int32)},
        {"left_out": np.arange(8, dtype=np.int32)},
        {"left_out": np.array([8], np.int32)},
        # Their differences in 32 bits are all above 0.
        {"left_out": np.array([0, 2**31 - 1, -(2**31), -2, 3], np.int32)},
        {"left_out": np.array([[3], [1]], np.int32)},
        {"mean": np.ones((4, 1), np.float32), "scale": np.ones((4, 1), np.float32)},
        {"scale": np.full(4, 1e-45, np.float32)},  # whose inverse is infinite
        {"digest": "x"},
        {"rows": 0},
    ],
    ids=str,
)
def test_a_frame_that_cannot_be_is_refused(change):
    ones = np.ones(4, np.float32)
    good = {
        "digest": "0" * 64,
        "weights": "trained",
        "rows": 8,
        "left_out": np.array([1], np.int32),
    }
    assert Frame(**good, mean=ones, scale=ones).tokens(
        np.array([[0, 2**32 - 1]], np.uint32)
    ).tolist() == [[0, 7]]
    with refuses(UsageError, "a frame that cannot be is refused"):
        Frame(**{**good, "mean": ones, "scale": ones, **change})


def test_a_file_is_read_strictly(framed, tmp_path):
    content = framed.frame.to_bytes()
    path = tmp_path / "frame.safetensors"
    framed.frame.save(path)
    assert path.read_bytes() == content
    assert Frame.load(path) == framed.frame
    for wrong in (
        b"",
        content[:-1],
        content + b"\0",
        b"\xff" * 64,
        content.replace(b'\\"rows\\"', b'\\"rowz\\"'),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DataError):
            Frame.load(path)
    with refuses(UsageError, "a file is read strictly"):
        replace(framed, digest="1" * 64).with_frame(framed.frame)


def test_presets_of_before_say_nothing_of_frames():
    assert "inputs" not in PIPELINES["poc-2.0"].as_dict()
    assert PIPELINES["hardened"].as_dict()["read"] == {"count": 0, "scaled": True}
