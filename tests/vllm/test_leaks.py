"""A server whose clients hang up, whose rounds are stopped and whose cache is too small: nothing of it stays."""

import time
from pathlib import Path

import pytest

from tests.vllm.conftest import ON_GPU
from tests.vllm.leaks import left_behind, look, measured, rounds, strained

pytestmark = pytest.mark.skipif(ON_GPU, reason="the cache is too small for the blocks of a GPU's kernels")


def test_no_row_no_block_and_no_descriptor_is_left_and_chat_goes_on(tmp_path: Path):
    deadline = time.monotonic() + 600
    with strained(tmp_path) as server:
        number, done, first = rounds(server, 20, 0, 200, deadline)
        before = look(server)
        _, later, rest = rounds(server, 21, number, 400, deadline)
        after, preempted = look(server), measured(server, "num_preemptions_total")
    assert left_behind(before, after) == {}
    assert min(done, later) >= 200
    assert min(first.fullest, rest.fullest) > 0  # blocks in use are seen
    assert preempted > 0
    clients = first.seen + rest.seen
    assert min(clients["left"], clients["answered"]) > 0
    assert set(clients) == {"left", "answered"}
