"""A tokenizer for the small model, samples of different lengths, and their gradients; all are made
once.
"""

import pytest

from assay.vhack import Pair, Sample, per_sample_gradients, weight_svd
from tests.vhack.adapter import sequential_gradients


def bytewise(**special):
    """A tokenizer with one token per byte, and then special ones by their role."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token per byte."""
    return bytewise()


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Prompts and completions of different lengths, all within 128 bytes."""
    return [
        Sample("def add(a, b):", "\n    return a + b\n"),
        Sample(
            "def solve(x):\n    # add 7, then take the remainder of division by 9\n",
            "    return (x + 7) % 9\n",
        ),
        Sample("f", "\n    x = 1\n    assert x == 1\n    print('every test passes')\n"),
        Sample("def f():\n    ", "p"),
        Sample("class A:\n    def __eq__(self, other):\n        return ", "True\n"),
    ]


@pytest.fixture(scope="session")
def small_svd(small_model):
    return weight_svd(small_model)


@pytest.fixture(scope="session")
def cut_svd(small_model):
    """Eight directions of every matrix."""
    return weight_svd(small_model, rank=8)


@pytest.fixture(scope="session")
def wanted(small_model, byte_tokenizer, samples, small_svd):
    """Gradients of the samples by the definition, one at a time."""
    return sequential_gradients(small_model.module, byte_tokenizer, samples, small_svd)


@pytest.fixture(scope="session")
def gradients_of(small_model, byte_tokenizer, samples, small_svd):
    """A function that takes gradients: of the samples and the small model, unless others are
    given.
    """

    def take(model=small_model, chosen=samples, **how):
        return per_sample_gradients(
            chosen, model, **{"tokenizer": byte_tokenizer, "svd": small_svd} | how
        )

    return take


@pytest.fixture(scope="session")
def small_pairs() -> list[Pair]:
    """Eight pairs of four groups, short enough for the small model."""
    return [
        Pair(
            f"def test_{n}():\n",
            f"    print('{word} ok')\n",
            f"    assert {word}() == {n}\n",
            group=f"group {n % 4}",
        )
        for n, word in enumerate(("add", "sub", "mul", "div", "power", "root", "sign", "floor"))
    ]
