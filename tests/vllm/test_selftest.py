"""The self-test of vLLM: one engine for each of its switches, on a small mixture of experts."""

from pathlib import Path

import pytest
import torch

from assay.poc import Round
from assay.poc.launch import Launch
from assay.poc.selftest import DIVISIONS, run_selftest
from tests.models.storing import make_mixture
from tests.vllm.conftest import ON_GPU

SWITCHES = ("as requests", "prefix cache", "chunked prefill", "speculative decoding")
ORDERS = ("again", "other neighbours", "alone in the batch", "other places in the batch")


@pytest.mark.slow
def test_every_switch_is_tried_and_named(tmp_path: Path, forked_engines):
    sizes = {"head_dim": 64} if ON_GPU else {}  # GPUs have no kernels for heads of 32
    path = make_mixture("qwen3-moe", tmp_path / "mixture", **sizes)
    round = Round(block_hash="b", public_key="k", preset="artifact", seq_len=32)
    launch = Launch(model=str(path), engine="vllm", dtype="bfloat16")
    result = run_selftest(launch, round, batch_size=8, nonces=16)
    rows = {row.setting: row for row in result.comparisons}
    devices = torch.cuda.device_count()
    divided = {f"divided over {count} devices" for count in DIVISIONS if count <= devices}
    assert rows.keys() == {*ORDERS, "batches of 2", *SWITCHES} | divided
    assert rows["again"].outcome == "same bits"
    for row in result.comparisons:
        # A setting that this build does not run says why, and any other was compared.
        assert bool(row.reason) == (row.outcome in ("not run", "no law")), row
        assert row.outcome == "not run" or row.nonces > 0
    assert result.engine["engine"] == "vllm"
