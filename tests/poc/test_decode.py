"""The preset that decodes: its proofs, its verdicts, and the cheats that it catches."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from assay_research.decoding import drafted, forgetful, recycled, repeated

from assay.errors import ProofFormatError, ProofMismatch, UsageError
from assay.models import Model, load_model
from assay.poc import (
    PIPELINES,
    HFEngine,
    Pins,
    Proof,
    Round,
    calibrate,
    get_pipeline,
    prove,
    verify,
)
from assay.poc.cheats import rounded, without_last_layers
from assay.poc.protocol.records import (
    describe_packing,
    pack_record,
    packed_size,
    published_form,
    unpack_or_nan,
)
from assay.poc.verdict.residuals import residuals
from assay.streams import DTYPES
from tests.wordings import refuses

ROUND = Round(
    block_hash="block_alpha", public_key="node_A", preset="decode-32", seq_len=16, model="small"
)
SHORT = get_pipeline("decode-32")


@pytest.fixture(scope="module")
def proof(small_model: Model) -> Proof:
    return prove(small_model, ROUND, range(40), batch_size=16)


@pytest.fixture(
    scope="module",
    params=["reference:qwen3", pytest.param("reference:llama", marks=pytest.mark.slow)],
)
def bundled(request: pytest.FixtureRequest) -> tuple[Model, Proof]:
    model = load_model(request.param, dtype="float32", device="cpu")
    return model, prove(model, replace(ROUND, model="", seq_len=32), range(32), batch_size=16)


def test_the_name_of_the_preset_says_how_much_is_decoded():
    assert get_pipeline("decode") is get_pipeline("decode-256")
    assert get_pipeline("decode-4096").steps == 4096
    for name in ("decode-31", "decode-4097", "decode-064", "decode-", "decode--64", "decode-٦٤"):
        with refuses(UsageError, "the name of the preset says how much is decoded"):
            get_pipeline(name)
    assert replace(ROUND, preset="decode").text("tokens", 7) == replace(
        ROUND, preset="decode-64"
    ).text("tokens", 7)
    assert ROUND.strength == 256
    few, many = (get_pipeline(name).noise for name in ("decode-224", "decode-4096"))
    assert (few, many) == ("few tokens", "tokens") == (few, get_pipeline("decode").noise)


def test_a_proof_is_read_as_it_was_written(proof: Proof, tmp_path: Path):
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    again = Proof.load(path)
    again.save(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert list(line) == ["nonce", "tokens", "sketches"]
    tokens = np.frombuffer(base64.b64decode(line["tokens"]), dtype="<u4")
    np.testing.assert_array_equal(tokens, proof.records[0].tokens)
    assert len(base64.b64decode(line["sketches"])) == 24
    assert again.footer.valid == 40
    assert np.isnan(again.distances).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": "AAAA"}, "a vector that is 3 bytes"),
        ({"tokens": "!"}, "a vector that is"),
        ({"tokens": [1, 2]}, "tokens holds [1, 2]"),
        ({"sketches": base64.b64encode(b"\x00\x7e" * 12).decode()}, "NaN or infinity"),
        ({"sketches": ""}, "a vector that is 0 bytes"),
        ({"vector": "AAAA"}, "in another form"),
        ({"distance": 1.0}, "in another form"),
    ],
)
def test_malformed_records_are_refused_by_line(
    proof: Proof, tmp_path: Path, changed: dict[str, object], words: str
):
    path = tmp_path / "proof.jsonl"
    proof.save(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | changed, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with refuses(ProofFormatError, "malformed records are refused by line") as raised:
        Proof.load(path)
    assert words in raised.value.seen


def test_records_travel_as_bytes(proof: Proof):
    record = proof.records[3]
    raw = pack_record(record)
    assert len(raw) == packed_size(SHORT) == 4 * 32 + 24
    again = published_form(SHORT).unpack(3, base64.b64encode(raw).decode(), SHORT)
    assert again.nonce == 3
    np.testing.assert_array_equal(again.tokens, record.tokens)
    np.testing.assert_array_equal(again.sketches, record.sketches)
    assert describe_packing(SHORT) == {
        "dtype": "u32+f16",
        "k_dim": 12,
        "endian": "le",
        "tokens": 32,
    }
    assert describe_packing(PIPELINES["artifact"]) == {"dtype": "f16", "k_dim": 12, "endian": "le"}
    for text in ("", "AAAA", None, "?", base64.b64encode(raw[:-2] + b"\x00\x7c").decode()):
        with pytest.raises(ProofFormatError):
            published_form(SHORT).unpack(3, text, SHORT)
        nothing = unpack_or_nan(3, text, SHORT)
        assert np.isnan(residuals([nothing], [replace(record, margins=np.zeros(32))])).all()


def test_the_residual_joins_sketches_and_margins(proof: Proof):
    record = proof.records[0]
    replay = replace(record, margins=np.zeros(32, dtype=np.float32))
    assert residuals([record], [replay])[0] == 0
    assert np.isnan(residuals([record], [record]))[
        0
    ]  # a record that is no replay says nothing of the tokens
    margins = np.array([0.09] * 8 + [np.inf] * 8 + [0] * 16, dtype=np.float32)
    moved = replace(record, sketches=record.sketches + np.float16(0.125), margins=margins)
    apart = np.square(moved.sketches.astype(float) - record.sketches).sum()
    np.testing.assert_allclose(
        residuals([record], [moved]), np.sqrt(apart + (8 * 0.09 + 8 * 4) / 32), rtol=1e-6
    )
    worst = residuals(
        [record], [replace(replay, sketches=-record.sketches, margins=np.full(32, np.inf))]
    )
    assert np.sqrt(2) * 2 == pytest.approx(worst[0], rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_honest_proof_is_honest_in_every_number_format(
    small_checkpoint: Path, proof: Proof, dtype: str
):
    model = load_model(small_checkpoint, dtype=dtype, device="cpu")
    verdict = verify(
        replace(proof, header=replace(proof.header, digest=model.digest)), model, expect=proof.round
    )
    assert (verdict.verdict, verdict.exit_code) == ("honest", 0)


def test_what_nothing_pins_is_named_and_the_work_of_a_header_is_bounded(
    small_model: Model, proof: Proof
):
    verdict = verify(proof, small_model, expect=Pins(block_hash="block_alpha", public_key="node_A"))
    assert (verdict.verdict, verdict.unpinned, verdict.exit_code) == (
        "honest",
        ("preset", "seq_len"),
        2,
    )
    with refuses(ProofMismatch, "what nothing pins is named and the work of a header is bounded"):
        verify(proof, small_model, expect=replace(proof.round, preset="decode"))
    long = replace(ROUND, preset="decode-4096")
    header = replace(proof.header, round=long, pipeline=get_pipeline("decode-4096"))
    with refuses(
        ProofMismatch, "what nothing pins is named and the work of a header is bounded, 2"
    ):
        verify(replace(proof, header=header), small_model, expect=Pins(preset="decode-4096"))


def test_proofs_are_not_compared_with_each_other(proof: Proof):
    with refuses(UsageError, "proofs are not compared with each other"):
        calibrate(proof, proof)


@pytest.mark.slow
def test_every_cheat_is_caught_on_both_bundled_models(bundled: tuple[Model, Proof]):
    model, honest = bundled
    expect = honest.round
    assert verify(honest, model, expect=expect).exit_code == 0
    cheats = {
        "4-bit draft": drafted(honest, model, rounded(model, 4)),
        "shallow draft": drafted(honest, model, without_last_layers(model, model.num_layers // 2)),
        "half of the prompt": forgetful(honest, model),
        "half of the steps": repeated(honest),
        "half of the nonces": recycled(honest),
    }
    verdicts = {name: verify(cheat, model, expect=expect) for name, cheat in cheats.items()}
    assert {name: verdict.verdict for name, verdict in verdicts.items()} == dict.fromkeys(
        cheats, "fraud"
    )


@pytest.mark.slow
def test_sketches_do_not_excuse_tokens_nor_tokens_sketches(bundled: tuple[Model, Proof]):
    """A draft with an honest forward pass shows in the tokens alone; right tokens with invented
    sketches in these.
    """
    model, honest = bundled
    guessed = drafted(honest, model, rounded(model, 4))
    engine = HFEngine(model, batch_size=16, seq_len=honest.round.seq_len)
    tokens = np.stack([record.tokens for record in guessed.records])
    first, _ = engine.run(honest.round.inputs(range(32)), SHORT, tokens)
    mine = np.stack([record.sketches for record in guessed.records[:16]])
    assert np.abs(first["sketches"].astype(float) - mine).max() < 2e-3
    assert first["margins"].mean() > 1e-3
    turned = [
        replace(record, sketches=record.sketches[..., ::-1].copy()) for record in honest.records
    ]
    invented = Proof.build(honest.header, turned, 1.0)
    assert verify(invented, model, expect=honest.round).fraud
