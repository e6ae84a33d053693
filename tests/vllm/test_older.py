"""The older of the two versions of vLLM that are tested, on a real server."""

import os
from pathlib import Path

import numpy as np
import pytest
from _vllm import SEEDED, Server, agreement, begin, mixed

from tests.vllm.conftest import ROOT
from tests.vllm.test_server import check_chat, make

PYTHON = Path(os.environ.get("ASSAY_VLLM_OLD_PYTHON", ROOT / ".venv-vllm-old/bin/python"))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="the older vLLM is not installed: run make test-vllm")
def test_the_older_version_serves_proves_and_is_what_it_says(honest, tmp_path: Path):
    with Server(tmp_path, python=str(PYTHON), environment=SEEDED) as server:
        assert server.get("/engine").json()["vllm"] == "0.28.0"
        check_chat(server, 8, tokens=8, at_once=1)
        page = server.get("/status", after=-1, limit=32).json()
        begin(server)
        figures = agreement(server, honest, mixed(12, honest.tokenizer))
        assert all(worker["rows"] == worker["streams"] == 0 for worker in server.idle_counts()["workers"])
    assert (figures["same_tokens"], figures["different"]) == (12, [])
    assert page["valid_nonces"] == list(range(32))
    assert np.abs(np.array(page["valid_distances"]) - np.array(make(honest, "beside", 32))).max() <= 2e-6
