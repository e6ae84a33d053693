"""A serving vLLM that is killed has the receipt of every response that a client received whole."""

from _vllm_answers import SEEDED, mixed
from _vllm_forked import ForkedServer
from vllm_receipts_soak import kill_loop

from tests.vllm.conftest import SMALL


def test_no_receipt_of_a_whole_response_is_lost_by_sigkill(tmp_path, honest):
    with ForkedServer(tmp_path, options=SMALL, environment=SEEDED) as server:
        figures = kill_loop(server, mixed(24, honest.tokenizer, seed=7), kills=1, at_once=6)
    assert figures["choices_without_receipt"] == 0
    assert (figures["responses"], figures["kills"]) == (24, 1)
    assert figures["choices"] == 24 + 2 * 8
    assert figures["interrupted"] > 0
