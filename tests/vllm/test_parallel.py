"""From the command line: a cheater on two workers, caught on transformers."""

import json
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
from tests.wordings import refuses

ARGUMENTS = (
    "--enforce-eager --max-model-len 256 --max-num-batched-tokens 160 --tensor-parallel-size 2"
)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_four_bits_on_two_workers_are_what_they_are_and_fraud_under_the_honest_name(
    honest, int4_checkpoint: Path, tmp_path: Path
):
    output = tmp_path / "proof.jsonl"
    words = [
        "--model",
        str(int4_checkpoint),
        "--block-hash",
        "block",
        "--public-key",
        "node",
        "--preset",
        "hardened",
    ]
    words += [
        "--seq-len",
        str(SEQ_LEN),
        "--batch-size",
        "8",
        "--nonces",
        "0:64",
        "--dtype",
        "float32",
    ]
    command = [
        sys.executable,
        "-m",
        "assay",
        "poc",
        "prove",
        "--engine",
        "vllm",
        *words,
        "-o",
        str(output),
        "--json",
    ]
    # One core each, as the CPU build of vLLM wants to be told.
    environment = os.environ | {"ASSAY_VLLM_ARGS": ARGUMENTS, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=1000, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["records"] == 64
    proof = poc.Proof.load(output)
    assert "tp 2" in proof.header.fingerprint.kernels
    four_bits = load_model(int4_checkpoint, dtype="float32", device="cpu")
    theirs = poc.prove(four_bits, proof.round, range(64), batch_size=8)
    difference = [a.vector - b.vector for a, b in zip(proof.records, theirs.records, strict=True)]
    assert np.abs(difference).max() <= 2e-3
    assert poc.verify(proof, four_bits, seed=1).verdict == "honest"
    forged = poc.Proof.build(
        replace(proof.header, digest=honest.digest), proof.records, proof.footer.seconds
    )
    assert poc.verify(forged, honest, seed=1).verdict == "fraud"


def test_options_that_vllm_does_not_have_or_that_are_not_the_operators_are_refused_in_words():
    from assay.poc.launch import vllm_options

    wrong = {
        "no-such-option": "3",
        "tensor-parallel-size": "many",
        "max-model-len": "'",
        "worker-extension-cls": "a.B",
    }
    for name, value in (
        wrong | {"model": "another", "dtype": "float32", "revision": "main"}
    ).items():
        with refuses(
            UsageError,
            "options that vllm does not have or that are not the operators are refused in words",
        ):
            vllm_options(f"--{name} {value}")
    assert vllm_options("--max-model-len 256") == {"max_model_len": 256}
