"""The chain's decode proof: its proofs, replays and verdicts, and the cheats that it catches."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from assay.errors import BadWeights, ProofFormatError, UsageError
from assay.models import Model, load_model
from assay.poc import HFEngine, Proof, Round, calibrate, get_pipeline, prove, verify
from assay.poc.cheats import rounded
from assay.poc.protocol.pipelines import SPHERE_POINTS
from assay.poc.protocol.records import (
    describe_packing,
    pack_record,
    packed_size,
    published_form,
    unpack_or_nan,
)
from assay.poc.prover import compute
from assay.poc.verdict.proof_judge import judge
from assay.poc.verdict.residuals import DIST_THRESHOLD, residuals
from tests.wordings import refuses

STEPS = 24
SHORT = get_pipeline(f"chain-decode-{STEPS}")
ROUND = Round(block_hash="block_alpha", public_key="node_A", preset=SHORT.name, seq_len=16)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("reference:qwen3", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def proof(model: Model) -> Proof:
    return prove(model, ROUND, range(20), batch_size=16)


def replayed(model: Model, proof: Proof, batch_size: int = 16):
    engine = HFEngine(model, batch_size=batch_size, seq_len=proof.round.seq_len)
    nonces = [record.nonce for record in proof.records]
    batches = compute(engine, proof.header.pipeline, proof.round.inputs(nonces), proof.records)
    return [record for batch in batches for record in batch]


class WithoutMargins:
    """An engine whose margins are no numbers."""

    def __init__(self, engine: HFEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def run(self, inputs, pipeline, claimed_MN=None):
        for values in self._engine.run(inputs, pipeline, claimed_MN):
            yield {name: np.full_like(rows, np.nan) for name, rows in values.items()}


def test_an_engine_without_margins_accuses_no_node(model: Model, proof: Proof):
    broken = WithoutMargins(HFEngine(model, batch_size=16, seq_len=ROUND.seq_len))
    with pytest.raises(BadWeights):
        verify(proof, model, expect=ROUND, engine=broken)


def test_the_name_of_the_preset_says_how_many_steps_are_taken():
    assert get_pipeline("chain-decode") is get_pipeline("chain-decode-256")
    assert get_pipeline("chain-decode-1").steps == 1
    for name in ("chain-decode-0", "chain-decode-4097", "chain-decode-", "chain-decode-07"):
        with refuses(UsageError, "the name of the preset says how many steps are taken"):
            get_pipeline(name)
    assert replace(ROUND, strength=256).strength == 32


def test_a_proof_has_one_byte_a_step_and_is_read_as_it_was_written(proof: Proof, tmp_path: Path):
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    again = Proof.load(path)
    again.save(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert list(line) == ["nonce", "points"]
    points = np.frombuffer(base64.b64decode(line["points"]), np.uint8)
    np.testing.assert_array_equal(points, proof.records[0].points)
    assert len(points) == packed_size(SHORT) == STEPS + 1
    assert points.max() < SPHERE_POINTS
    chains = {record.points.tobytes() for record in proof.records}
    assert len(chains) == len(proof.records)


@pytest.mark.parametrize(
    "changed",
    [
        {"points": "AAAA"},
        {"points": "!"},
        {"points": [1, 2]},
        {"points": base64.b64encode(bytes([16] * (STEPS + 1))).decode()},
        {"vector": "AAAA"},
        {"tokens": ""},
    ],
)
def test_malformed_records_are_refused_by_line(proof: Proof, tmp_path: Path, changed):
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | changed, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with refuses(ProofFormatError, "malformed records are refused by line"):
        Proof.load(path)


def test_records_travel_as_bytes_and_what_is_missing_never_matches(proof: Proof):
    record = proof.records[3]
    raw = pack_record(record)
    again = published_form(SHORT).unpack(3, base64.b64encode(raw).decode(), SHORT)
    np.testing.assert_array_equal(again.points, record.points)
    assert describe_packing(SHORT) == {"dtype": "u8", "points": 16, "steps": STEPS}
    nothing = unpack_or_nan(3, None, SHORT)
    margins = np.full(STEPS + 1, np.inf, np.float32)
    assert residuals([nothing], [replace(nothing, margins=margins)])[0] == np.sqrt(2)
    assert np.isnan(residuals([record], [record])[0])  # which is no replay


def test_the_residual_is_the_root_of_the_mean_margin(proof: Proof):
    margins = np.array([0.09] * 5 + [np.inf] * 2 + [0] * (STEPS - 6), np.float32)
    record = proof.records[0]
    apart = residuals([record], [replace(record, margins=margins)])[0]
    assert apart == pytest.approx(np.sqrt((5 * 0.09 + 2 * 2) / (STEPS + 1)))


def test_the_published_count_takes_the_largest_margin_of_a_nonce(proof: Proof):
    """The residual is above the threshold of the count, and no margin is."""
    margins = np.array([0.015] + [0.0] * STEPS, np.float32)
    replays = [replace(record, margins=margins) for record in proof.records]
    found = judge(proof, proof.records, replays, None)
    assert (found.count.n, found.count.mismatches) == (20, 0)
    assert min(found.residuals) > DIST_THRESHOLD


@pytest.mark.parametrize("batch_size", [16, 3])
def test_a_nonce_has_the_same_points_wherever_it_stands(
    model: Model, proof: Proof, batch_size: int
):
    engine = HFEngine(model, batch_size=batch_size, seq_len=ROUND.seq_len)
    nonces = [*range(5, 9), 0]
    batches = list(engine.run(ROUND.inputs(nonces), SHORT))
    points = np.concatenate([values["points"] for values in batches])
    expected = np.stack([proof.records[nonce].points for nonce in nonces])
    np.testing.assert_array_equal(points, expected)


def test_a_replay_follows_the_claim_whatever_it_says(model: Model, proof: Proof):
    engine = HFEngine(model, batch_size=16, seq_len=ROUND.seq_len)
    honest = np.stack([record.points for record in proof.records[:16]])
    (same,) = engine.run(ROUND.inputs(range(16)), SHORT, honest)
    assert same["margins"].max() < 1e-4
    changed = honest.copy()
    changed[4, 10] = (changed[4, 10] + 1) % SPHERE_POINTS
    changed[5, 20] = SPHERE_POINTS  # no point at all
    (other,) = engine.run(ROUND.inputs(range(16)), SHORT, changed)
    assert other["margins"][4, 10] > 1e-3
    assert other["margins"][4, :10].max() < 1e-4
    assert np.isinf(other["margins"][5, 20])
    untouched = [row for row in range(16) if row not in (4, 5)]
    np.testing.assert_array_equal(other["margins"][untouched], same["margins"][untouched])


def test_step_by_step_along_a_claim_agrees_with_one_pass(model: Model, proof: Proof):
    engine = HFEngine(model, batch_size=16, seq_len=ROUND.seq_len)
    claimed = np.stack([record.points for record in proof.records[:16]])
    claimed[:, 7] = (claimed[:, 7] + 3) % SPHERE_POINTS
    inputs = ROUND.inputs(range(16))
    (one_pass,) = engine.run(inputs, SHORT, claimed)
    draws = engine.draws(inputs, SHORT)
    follow = draws.follow

    def follow_claim(states_R1D: torch.Tensor, step: int) -> torch.Tensor:
        follow(states_R1D, step)
        draws.previous_R1 = claimed[:, step : step + 1]
        return draws.chain.embeddings(draws.previous_R1, step + 1)

    draws.follow = follow_claim
    with engine.between_layers(SHORT.layers, ROUND):
        draws.decode()
    scores_RNQ = torch.cat(draws.scores, dim=1)
    chosen_RN1 = torch.from_numpy(claimed.astype(np.int64)).unsqueeze(2)
    stepped = scores_RNQ.amax(dim=2) - scores_RNQ.gather(2, chosen_RN1).squeeze(2)
    np.testing.assert_allclose(stepped.numpy(), one_pass["margins"], atol=1e-4)


@pytest.mark.slow
def test_cheaper_weights_and_drawn_points_are_larger_than_honest_noise(model: Model, proof: Proof):
    halved = load_model("reference:qwen3", dtype="bfloat16", device="cpu")
    honest = np.median(residuals(proof.records, replayed(halved, proof)))
    int4 = prove(rounded(model, 4), ROUND, range(16), batch_size=16)
    assert np.median(residuals(int4.records, replayed(model, int4))) > 5 * max(honest, 1e-3)
    rng = np.random.default_rng(0)
    drawn = tuple(
        replace(record, points=rng.integers(0, 16, STEPS + 1).astype(np.uint8))
        for record in proof.records
    )
    invented = replace(proof, records=drawn)
    assert np.median(residuals(drawn, replayed(model, invented))) > 20 * max(honest, 1e-3)


@pytest.mark.slow
def test_verdicts_of_whole_chains(model: Model):
    """Honest from bfloat16 under the law of that format, and fraud from four bits."""
    halved = load_model("reference:qwen3", dtype="bfloat16", device="cpu")
    whole = replace(ROUND, preset="chain-decode", seq_len=32)
    honest = prove(halved, whole, range(32), batch_size=16)
    assert verify(honest, model, expect=whole).verdict == "honest"
    cheap = prove(rounded(halved, 4), whole, range(16), batch_size=16)
    cheap = replace(cheap, header=replace(cheap.header, digest=model.digest))
    assert verify(cheap, model, expect=whole).verdict == "fraud"


def test_a_verdict_needs_a_law_and_chains_are_not_compared(model: Model, proof: Proof):
    assert verify(proof, model, expect=ROUND).verdict == "undecided"  # of few steps
    with refuses(UsageError, "a verdict needs a law and chains are not compared"):
        calibrate(proof, proof)


def test_a_model_with_states_of_fewer_numbers_is_refused(small_model: Model):
    with refuses(UsageError, "a model with states of fewer numbers is refused"):
        prove(small_model, ROUND, range(2), batch_size=2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 8 experts of which a token takes 2, with random weights."""
    shape = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128, head_dim=64, num_experts=8, num_experts_per_tok=2, **shape, **heads
    )
    path = tmp_path_factory.mktemp("mixture")
    module = Qwen3MoeForCausalLM(config)
    with torch.no_grad():  # as drawn, experts are too small to matter
        for layer in module.model.layers:
            layer.mlp.experts.down_proj.mul_(40)
    module.save_pretrained(path)
    return path


def test_seeds_choose_the_experts_so_that_other_experts_show_and_other_routers_do_not(
    mixture: Path,
):
    model = load_model(mixture, dtype="float32", device="cpu")
    honest = prove(model, ROUND, range(8), batch_size=16)
    assert residuals(honest.records, replayed(model, honest)).max() < 1e-2
    with torch.no_grad():
        for layer in model.module.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))
    assert residuals(honest.records, replayed(model, honest)).max() < 1e-2
    with torch.no_grad():
        for layer in model.module.model.layers:
            layer.mlp.experts.down_proj.copy_(layer.mlp.experts.down_proj.flip(0))
    assert np.median(residuals(honest.records, replayed(model, honest))) > 0.02
