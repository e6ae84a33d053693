"""No law, no verdict: what is said of a model without a law of its own."""

from dataclasses import replace

import pytest

from assay.errors import ProofMismatch, UsageError
from assay.poc import Proof, Round, bundled_noise, cheats, prove, verify
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.service.distance_judge import HonestNoise
from assay.poc.service.service_settings import ServiceSettings
from assay.poc.verdict import Ledger, noise_for
from tests.laws import QWEN3
from tests.wordings import refuses

pytestmark = pytest.mark.no_law


@pytest.mark.parametrize("preset", ["poc-2.0", "artifact", "hardened"])
@pytest.mark.parametrize("node", ["honest", "cheat"])
def test_a_model_that_was_not_measured_is_undecided(
    small_model, round_: Round, preset: str, node: str
):
    """On 8580455f the first is honest and the second fraud, by the law of another model."""
    round = replace(round_, preset=preset)
    proof = prove(
        small_model if node == "honest" else cheats.rounded(small_model), round, range(64)
    )
    verdict = verify(proof, small_model, expect=round)
    assert (verdict.verdict, verdict.exit_code, verdict.checked) == ("undecided", 2, 32)
    assert (verdict.noise, verdict.sequential, verdict.places, verdict.power) == (
        None,
        None,
        None,
        None,
    )
    assert f"assay poc calibrate --model MODEL --preset {preset}" in verdict.reason
    assert verdict.as_dict()["noise"] is None


def test_what_needs_no_law_is_decided(small_model, proof: Proof, round_: Round):
    with pytest.raises(ProofMismatch):
        verify(proof, small_model, expect=replace(round_, public_key="another"))


def test_a_ledger_takes_no_verdict_without_a_law(
    small_model, proof: Proof, round_: Round, tmp_path
):
    verdict = verify(proof, small_model, expect=round_)
    with (
        Ledger(tmp_path / "ledger.jsonl") as ledger,
        refuses(UsageError, "a ledger takes no verdict without a law"),
    ):
        ledger.record(verdict)


def test_the_command_says_what_to_measure(proof: Proof, small_checkpoint, tmp_path, capsys):
    from assay.cli import run

    proof.save(tmp_path / "proof.jsonl")
    known = (
        "--block-hash",
        "block_alpha",
        "--public-key",
        "node_A",
        "--seq-len",
        "16",
        "--device",
        "cpu",
    )
    command = [
        "poc",
        "verify",
        str(tmp_path / "proof.jsonl"),
        "--model",
        str(small_checkpoint),
        *known,
    ]
    assert run(command) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "undecided" in said
    assert "assay poc calibrate --model" in said
    assert run([*command, "--ledger", str(tmp_path / "ledger.jsonl")]) == 2
    assert not (tmp_path / "ledger.jsonl").exists()


def test_the_service_knows_no_noise_of_a_model_that_was_not_measured(
    proof: Proof, small_model, round_: Round
):
    noise = HonestNoise(ServiceSettings())
    own = proof.header.fingerprint
    assert noise.of(get_pipeline("poc-2.0"), own, small_model.digest, round_) is None
    assert noise.of(get_pipeline("poc-2.0"), own, QWEN3, round_) is not None


def test_the_laws_that_come_with_assay_are_of_two_digests(proof: Proof):
    assert noise_for(proof.header, proof.header.fingerprint, None) is None
    assert bundled_noise(QWEN3, "distance", "float32", "bfloat16") == bundled_noise(
        QWEN3, "distance", "bfloat16", "float32"
    )
    assert bundled_noise(QWEN3, "distance", "float8", "float8") is None


def test_advice_has_the_flags_of_the_reader_and_no_word_of_the_prover(
    proof: Proof, small_checkpoint, tmp_path, capsys
):
    """On 0944c8c1 the prover's name of the model stands behind --model."""
    from assay.cli import run

    header = replace(proof.header, round=replace(proof.round, model="m; touch pwned"))
    Proof.build(header, proof.records, 1.0).save(tmp_path / "proof.jsonl")
    known = ["--block-hash", "block_alpha", "--public-key", "node_A", "--seq-len", "16"]
    reader = ["--model", str(small_checkpoint), "--dtype", "float32"]
    assert run(["poc", "verify", str(tmp_path / "proof.jsonl"), *reader, *known]) == 2
    said = " ".join(capsys.readouterr().out.split())
    advice = said[said.index("assay poc calibrate") : said.index("-o calibration.json")]
    assert f"--model {small_checkpoint}" in advice
    assert "--dtype float32" in advice
    assert "pwned" not in advice


def test_a_node_is_told_at_its_start_that_nobody_can_judge_it(small_checkpoint, tmp_path, capsys):
    from assay.cli import run

    shape = ["--seq-len", "16", "--nonces", "8", "--device", "cpu", "-o", str(tmp_path / "p.jsonl")]
    known = ["--block-hash", "b", "--public-key", "k"]
    assert run(["poc", "prove", "--model", str(small_checkpoint), *known, *shape]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: no law of checkpoint")
    assert f"assay poc calibrate --model {small_checkpoint} --quick" in first
    bundled = ["--model", "reference:qwen3", *known, *shape, "--overwrite"]
    assert run(["poc", "prove", *bundled]) == 0
    assert "no law" not in capsys.readouterr().err


def test_a_model_with_a_tokenizer_is_not_proved_without_what_its_network_agreed_on(
    small_checkpoint, tmp_path, capsys
):
    from assay.cli import run

    folder = tmp_path / "named"
    folder.mkdir()
    for path in small_checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.json").write_text("{}")
    known = ["--block-hash", "b", "--public-key", "k", "-o", str(tmp_path / "p.jsonl")]
    assert run(["poc", "prove", "--model", str(folder), *known]) == 2
    said = capsys.readouterr().err
    assert f"assay poc calibrate --model {folder} --quick --pins pins.toml" in said
    assert "--preset poc-2.0" in said
