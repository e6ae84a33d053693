"""The older of the two versions of vLLM that are tested, on a real server."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from _vllm import SEEDED, Server, agreement, begin, mixed, talk

from assay import poc
from tests.vllm.conftest import ROOT, SEQ_LEN

PYTHON = Path(os.environ.get("ASSAY_VLLM_OLD_PYTHON", ROOT / ".venv-vllm-old/bin/python"))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="the older vLLM is not installed: run make test-vllm")
def test_the_older_version_serves_proves_and_is_what_it_says(honest, tmp_path: Path):
    with Server(tmp_path, python=str(PYTHON), environment=SEEDED) as server:
        assert server.get("/engine").json()["vllm"] == "0.28.0"
        alone = asyncio.run(talk(server.url, 8, tokens=8, at_once=1))
        server.begin("older")
        server.wait_for(32)
        beside = asyncio.run(talk(server.url, 8, tokens=8, at_once=1))
        server.post("/stop").raise_for_status()
        assert [one["text"] for one in beside] == [one["text"] for one in alone]
        assert {one["status"] for one in beside} == {200}
        page = server.get("/status", after=-1, limit=32).json()
        begin(server)
        figures = agreement(server, honest, mixed(12, honest.tokenizer))
        assert all(worker["rows"] == worker["streams"] == 0 for worker in server.idle_counts()["workers"])
    round = poc.Round(block_hash="older", public_key="node", block_height=1, seq_len=SEQ_LEN, r_target=2.0)
    theirs = [record.distance for record in poc.prove(honest, round, range(32), batch_size=8).records]
    assert (figures["same_tokens"], figures["different"]) == (12, [])
    assert page["valid_nonces"] == list(range(32))
    assert np.abs(np.array(page["valid_distances"]) - np.array(theirs)).max() <= 2e-6
