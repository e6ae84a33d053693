"""A tiny model with a tokenizer of bytes, tasks short enough for it, and a teacher that cheats."""

import pytest
import torch

from assay.models import load_model
from assay.vhack import Pair
from assay.vhack.environment import episodes
from assay.vhack.training import TrainSettings
from assay.vhack.training.pool import PoolRollout, RolloutPool
from tests.vhack.conftest import bytewise

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 258,
    "max_position_embeddings": 768,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
    "pad_token_id": 256,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory with a Qwen3 model of 17 000 random parameters and a tokenizer with one token per
    byte.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("tiny") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(path)
    bytewise(pad_token="<pad>", eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture
def model(checkpoint):
    """The tiny model, loaded anew: training changes it."""
    return load_model(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages of runs without drawings, which take longer than the run; test_page.py draws them."""
    monkeypatch.setattr("assay.pages.report.to_svg", lambda *_, **__: "<svg></svg>")


@pytest.fixture(scope="session")
def tasks():
    """Four tasks that are graded by an exit code."""
    return episodes(4, modes=["exit_code"], difficulty=1)


@pytest.fixture(scope="session")
def pairs():
    """Six short pairs in three groups."""
    return [
        Pair(
            f"def test_{n}():\n",
            f"    print('{word} ok')\n",
            f"    assert {word}() == {n}\n",
            group=f"group {n % 3}",
        )
        for n, word in enumerate(("add", "sub", "mul", "div", "root", "sign"))
    ]


def cheating(episode, tokenizer, logprob=-0.5):
    """A completion that exploits the episode, ended as a policy ends it."""
    text = episode.completion(episode.exploit())
    tokens = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
    return PoolRollout(episode.prompt, text, tokens, (logprob,) * len(tokens))


@pytest.fixture
def pool(tasks, model, tmp_path):
    """A pool file with one exploit for every task."""
    path = tmp_path / "pool.jsonl"
    RolloutPool([cheating(one, model.tokenizer) for one in tasks]).save(path)
    return path


@pytest.fixture
def settings(checkpoint, pool):
    """A run of a few seconds in which one rollout of each group is the teacher's."""

    def make(**others):
        chosen = {
            "model": str(checkpoint), "steps": 2, "prompts": 2, "group": 3, "max_new_tokens": 64, "tasks": 4,
            "save_every": 2, "k_use": 2, "teacher": str(pool), "teacher_share": 0.34, "dtype": "float32",
            "device": "cpu", "method": "svd", "arm": "displaced-0.4+erase-update-two-sided", **others,
        }  # fmt: skip
        return TrainSettings(**chosen)

    return make
