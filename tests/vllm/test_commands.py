"""The documented way of a node on vLLM through the command line: prove, calibrate, verify on either
engine.
"""

import json
from pathlib import Path

import pytest

from assay import poc
from assay.cli import run
from assay.models import load_model
from assay.poc import Proof
from assay.poc.cheats import rounded
from tests.vllm.conftest import ON_GPU, SEQ_LEN, SMALL

pytestmark = pytest.mark.usefixtures("forked_engines")

NONCES = 96
AGREED = (
    "--model",
    "reference:qwen3",
    "--preset",
    "hardened",
    "--public-key",
    "node",
    "--seq-len",
    SEQ_LEN,
)
OPTIONS = SMALL | {
    "--enforce-eager": "",
    "--max-model-len": "512",
    "--max-num-batched-tokens": "1024",
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command; its exit code and what it printed as JSON."""
    monkeypatch.setenv(
        "ASSAY_VLLM_ARGS", " ".join(word for pair in OPTIONS.items() for word in pair if word)
    )

    def call(*words: object) -> tuple[int, dict]:
        code = run(["poc", *(str(word) for word in words), "--json"])
        return code, json.loads(capsys.readouterr().out or "{}")

    return call


def test_a_node_on_vllm_and_one_on_transformers_judge_each_other_as_documented(
    command, tmp_path: Path
):
    """One block for the law and the verdicts, since what is tested is that one command takes what
    the other wrote.
    """
    agreed = (*AGREED, "--block-hash", "block", "--nonces", f"0:{NONCES}")
    path = {name: tmp_path / f"{name}.jsonl" for name in ("vllm", "hf", "cheat")}
    for engine in ("vllm", "hf"):
        words = (
            "prove",
            *agreed,
            "--dtype",
            "bfloat16",
            "--engine",
            engine,
            "--output",
            path[engine],
        )
        assert command(*words)[0] == 0
    law = tmp_path / "noise.json"
    assert (
        command(
            "calibrate", path["vllm"], path["hf"], "--model", "reference:qwen3", "--output", law
        )[0]
        == 0
    )

    claimed = Proof.load(path["vllm"])
    model = load_model("reference:qwen3", dtype="bfloat16", device="cuda" if ON_GPU else "cpu")
    false = poc.prove(rounded(model, 4), claimed.round, range(NONCES), batch_size=8)
    Proof.build(claimed.header, false.records, 1.0).save(path["cheat"])

    for name, judge, code, verdict in (
        ("vllm", "hf", 0, "honest"),
        ("cheat", "hf", 1, "fraud"),
        ("hf", "vllm", 0, "honest"),
    ):
        words = (
            "verify",
            path[name],
            *agreed,
            "--prover-dtype",
            "bfloat16",
            "--calibration",
            law,
            "--engine",
            judge,
        )
        found = command(*words)
        assert (found[0], found[1]["verdict"]) == (code, verdict), (name, judge, found[1])
