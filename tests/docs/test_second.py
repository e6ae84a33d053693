"""The second implementation of the pages stands alone, and agrees with assay in streams, values and
verdicts.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import assay
from assay.files.jsonl import read_json
from assay.models.frame import Frame
from assay.poc import Pins, Round, bundled_noise, measure_frame, prove, verify
from assay.poc.protocol.pipelines import FORWARD
from assay.poc.verdict.sample_plan import sequential_test
from tests.laws import QWEN3
from tests.streams.test_draws import DRAWS_PER_GROUP, Group
from tests.usual import enough

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors"
KNOWN = json.loads((VECTORS / "poc_kat.json").read_text(encoding="utf-8"))
GUMBELS = json.loads((VECTORS / "gumbels.json").read_text(encoding="utf-8"))
MODELS = ("qwen3", "llama")
LAWS = read_json(ROOT / "src" / "assay" / "poc" / "verdict" / "bundled_noise.json")["laws"]
sys.path.insert(0, str(ROOT / "docs"))

import second  # noqa: E402


def checkpoint(name):
    return ROOT / ("src/assay/models/reference" if name == "qwen3" else "tests/data/models") / name


def close(values, published, scale=1.0):
    """Within 8 ulp or 4e-6, as the page on streams says of the published normals."""
    wanted = np.asarray(published, np.float32)
    allowed = np.maximum(8 * np.spacing(np.abs(wanted)), 4e-6 * scale)
    return bool((np.abs(np.asarray(values, np.float64) - wanted) <= allowed).all())


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_integers_of_the_published_streams():
    assert [int(second.seed_words(row["text"])[0]) for row in KNOWN["seed32"]] == [
        r["seed"] for r in KNOWN["seed32"]
    ]
    for row in KNOWN["hash32"]:
        assert second.hashed(row["seed"], row["index"]).tolist() == row["hash"]
        assert (
            sha256(second.hashed(row["seed"], np.arange(65536))) == row["sha256_first_65536_le_u32"]
        )
    for row in KNOWN["uniform"]:
        assert sha256(second.uniforms(row["seed"], row["n"])) == row["sha256_le_f32"]


def test_normals_of_the_published_streams():
    for row in KNOWN["normal"]:
        values = second.normals([row["seed"]], row["n"]).numpy()
        assert close(values[: len(row["first"])], row["first"])
        assert close(values[-len(row["last"]) :], row["last"])


@pytest.mark.parametrize("number", [*range(21), *range(25, 500, 25)])
def test_normals_to_the_bit(number):
    group = Group(number)
    made = [
        second.normals(second.seed_words(f"draw_{number}_{i}")[: group.strength // 32], group.n)
        for i in range(DRAWS_PER_GROUP)
    ]
    rounded = torch.stack(made).to(getattr(torch, group.dtype))
    bits = rounded.view(torch.int16) if group.dtype == "bfloat16" else rounded
    wanted = {
        row[0]: row
        for row in json.loads((VECTORS / "draws_sha256.json").read_text())["rows"][
            number : number + 1
        ]
    }
    assert wanted[group.n] == [group.n, group.dtype, group.strength, sha256(bits.numpy())]


def test_noise_of_tokens_to_the_bit():
    for row in GUMBELS["streams"]:
        assert (
            sha256(second.gumbels(second.seed_words(row["text"])[0], row["n"]))
            == row["sha256_le_f32"]
        )
    for row in GUMBELS["step_seeds"]:
        words = second.seed_words(row["text"])
        assert [f"{word:08x}" for word in words] == row["words"]
        assert [f"{seed:08x}" for seed in second.step_seeds(words, np.array(row["steps"]))] == row[
            "seeds"
        ]


class Bare:
    """A checkpoint of which only the hidden size is asked."""

    def __init__(self, dim):
        self.config = SimpleNamespace(hidden_size=dim)
        self.dtype = torch.float32

    def eval(self):
        return self

    def get_output_embeddings(self):
        return SimpleNamespace(weight=None)


def without_model(monkeypatch, row, preset="poc-2.0"):
    loaded = SimpleNamespace(from_pretrained=lambda path, dtype: Bare(row["dim"]))
    monkeypatch.setattr(second, "AutoModelForCausalLM", loaded)
    round = {
        "block_hash": row["block_hash"],
        "public_key": row["public_key"],
        "preset": preset,
        "strength": 32,
    }
    return second.Recomputation("", {"round": round, "pipeline": {}}, "float32")


def test_known_answers_of_a_nonce(monkeypatch):
    for row in KNOWN["signs"]:
        engine = without_model(monkeypatch, row, "artifact")
        assert (
            sha256(second.signs(engine.words("signs", row["nonce"])[0], row["dim"]))
            == row["sha256_i8"]
        )
    for row in KNOWN["permutation"]:
        engine = without_model(monkeypatch, row | {"dim": 8}, "artifact")
        made = second.permutation(engine.words("permutation", row["nonce"])[0], row["size"])
        assert sha256(made.astype("<i8")) == row["sha256_le_i64"]
    for row in KNOWN["inputs"]:
        engine = without_model(monkeypatch, row, "artifact")
        made = second.normals(
            engine.words("inputs", row["nonce"]), row["seq_len"] * row["dim"]
        ).view(row["seq_len"], -1)
        assert close(made[0, :6], row["row0"])
        assert close(made[15, :6], row["row15"])
    for row in KNOWN["householder"]:
        engine = without_model(monkeypatch, row, "artifact")
        for index, field in ((0, "r0_first"), (7, "r7_first")):
            v = second.normals(engine.words("reflection", row["nonce"], index), row["dim"])
            assert close((v / v.norm())[:6], row[field])
    for row in KNOWN["target"]:
        v = second.normals(second.seed_words(f"{row['block_hash']}_target")[:1], row["dim"])
        assert close((v / v.norm())[:8], row["first"])


@pytest.mark.parametrize("name", MODELS)
def test_digests(name):
    assert (
        second.digest(checkpoint(name))
        == assay.load_model(f"reference:{name}", device="cpu").digest
    )


@pytest.mark.parametrize("family", LAWS)
def test_evidence_of_every_default_law(family):
    for pair, law in LAWS[family].items():
        noise = bundled_noise(QWEN3, family, *pair.split("/"))
        rng = np.random.default_rng(len(pair))
        seen = set()
        for n, size in ((1, 1.0), (20, 0.0), (40, 0.5), (40, 2.5), (300, 0.7), (60, 40.0)):
            values = noise.size * size * np.exp(0.3 * rng.normal(size=n))
            if (n, size) == (60, 40.0):
                values[3] = math.nan
            wanted = sequential_test(noise).update(values).result
            found = second.judged(values, law)
            assert found["verdict"] == wanted.verdict
            for number in ("log_e_value", "log_e_max", "log_evidence_honest"):
                assert found[number] == pytest.approx(
                    getattr(wanted, number), rel=1e-9, abs=1e-9
                ), (pair, n, number)
            seen.add(wanted.verdict)
        assert seen >= {"honest", "fraud"}


@pytest.mark.parametrize("name", enough(MODELS, "qwen3"))
@pytest.mark.parametrize("preset", [*FORWARD, "decode-64"])
def test_every_preset_is_recomputed(preset, name, tmp_path):
    model = assay.load_model(f"reference:{name}", dtype="float32", device="cpu")
    round = Round(
        block_hash="block_alpha", public_key="node_A", preset=preset, seq_len=16, strength=256
    )
    proof = prove(model, round, range(6))
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    given = {"block_hash": "block_alpha", "public_key": "node_A", "seed": 1}
    found = second.verify(path, checkpoint(name), **given)
    law = bundled_noise(QWEN3, proof.header.pipeline.noise, "float32", "float32")
    assert max(map(abs, found["residuals"])) < law.size * 4
    # Values of other nonces are far off, so the bound above tells something.
    header, records = second.read(path)
    engine = second.Recomputation(checkpoint(name), header, "float32")
    shifted = [engine.residual(record | {"nonce": record["nonce"] + 1}) for record in records]
    assert max(map(abs, shifted)) > law.size * 300


@pytest.mark.parametrize("name", MODELS)
def test_nonces_of_tokens_are_recomputed_in_the_frame(name, tmp_path):
    model = assay.load_model(f"reference:{name}", dtype="float32", device="cpu")
    model = model.with_frame(measure_frame(model))
    model.frame.save(tmp_path / "frame")
    prove(
        model,
        Round(block_hash="b", public_key="k", preset="tokens-1", seq_len=24),
        range(6),
        output=tmp_path / "proof",
    )
    header, records = second.read(tmp_path / "proof")
    engine = second.Recomputation(checkpoint(name), header, "float32", tmp_path / "frame")
    assert max(engine.residual(record) for record in records) < 1e-2
    assert min(engine.residual(record | {"nonce": record["nonce"] + 1}) for record in records) > 0.5


def test_known_answers_of_nonces_of_tokens():
    known = read_json(VECTORS / "tokens.json")
    path = VECTORS / "frame_qwen3.safetensors"
    about = {name: known[name] for name in ("block_hash", "public_key", "seq_len")} | {
        "preset": "tokens-1"
    }
    header = {"round": about, "pipeline": {}, "model": {"frame": known["frame_sha256"]}}
    engine = second.Recomputation(checkpoint("qwen3"), header, "float32", path)
    assert close(engine.frame["mean"][:4], known["first_mean"])
    assert close(engine.frame["scale"][:4], known["first_scale"])
    for row in known["nonces"]:
        nonce = row["nonce"]
        assert [engine.ids(nonce).tolist(), engine.weights(nonce).tolist()] == [
            row["ids"],
            row["weights"],
        ]
        words = engine.words("projection", nonce, count=32)
        assert f"{words[0]:08x}" == row["projection_seed"]
        assert (
            sha256(second.normals(words, 32 * known["hidden_size"]).numpy())
            == row["projection_sha256_le_f32"]
        )
        np.testing.assert_allclose(engine.value(nonce).astype(float), row["vector"], atol=2e-3)


@pytest.mark.parametrize(("name", "wanted"), [("distance", "honest"), ("vector", "undecided")])
def test_proofs_of_the_vectors_are_read_and_verified(name, wanted, tmp_path):
    path = VECTORS / f"proof_{name}.jsonl"
    frame = VECTORS / "frame_qwen3.safetensors"
    model = assay.load_model("reference:qwen3", dtype="float32").with_frame(Frame.load(frame))
    found = second.verify(
        path,
        checkpoint("qwen3"),
        block_hash="block_alpha",
        public_key="node_A",
        seed=0,
        frame=frame,
    )
    assert (
        found["verdict"] == verify(assay.poc.Proof.load(path), model).verdict == wanted
    )  # tokens-1 has no law here
    assert max(found["residuals"]) < 1e-2
    with pytest.raises(second.Refused, match="without --frame"):
        second.read_frame(None, {})
    lines = path.read_bytes().split(b"\n")
    for damaged in (
        lines[:-2],
        [*lines[:2], *lines[3:]],
        [line + b" " for line in lines],
        [*lines, lines[1]],
    ):
        (tmp_path / "damaged").write_bytes(b"\n".join(damaged))
        with pytest.raises((second.Refused, json.JSONDecodeError)):
            second.read(tmp_path / "damaged")


def test_verdicts_of_the_vectors():
    for row in read_json(VECTORS / "verdicts.json")["rows"]:
        found = second.judged(row["residuals"], LAWS[row["family"]][row["dtypes"]])
        assert found == pytest.approx({name: row[name] for name in found})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["poc-2.0", "artifact", "hardened", "decode-32"])
@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "honest"), ("bfloat16", "fraud")])
def test_the_verdict_is_that_of_verify(preset, dtype, wanted, tmp_path):
    """A proof in float32, and one that was made in bfloat16 and says float32."""
    round = Round(block_hash="block_alpha", public_key="node_A", preset=preset, seq_len=16)
    proof = prove(assay.load_model("reference:qwen3", dtype=dtype, device="cpu"), round, range(40))
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    path.write_bytes(path.read_bytes().replace(b'"dtype":"bfloat16"', b'"dtype":"float32"', 1))
    model = assay.load_model("reference:qwen3", dtype="float32", device="cpu")
    pins = Pins(block_hash="block_alpha", public_key="node_A", preset=preset)
    verdict = verify(assay.poc.Proof.load(path), model, expect=pins, seed=5, sample=32)
    found = second.verify(
        path, checkpoint("qwen3"), block_hash="block_alpha", public_key="node_A", seed=5, sample=32
    )
    assert found["verdict"] == verdict.verdict == wanted
    np.testing.assert_allclose(found["residuals"], verdict.residuals, atol=5 * bundled_noise(QWEN3,
        proof.header.pipeline.noise, "float32", "float32").size)  # fmt: skip
    assert found["log_e_max"] == pytest.approx(verdict.sequential.log_e_max, rel=0.05, abs=0.5)
    judged = second.judged(verdict.residuals, LAWS[proof.header.pipeline.noise]["float32/float32"])
    assert judged["log_e_max"] == pytest.approx(verdict.sequential.log_e_max, rel=1e-9)
