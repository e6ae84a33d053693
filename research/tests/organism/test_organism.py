"""What the organism is shown, and that a few steps of fine-tuning teach it."""

import json

import pytest
from assay_research.organism import Mixture, Recipe, examples, make_organism

from assay.errors import UsageError
from assay.models import load_model


def test_examples_are_the_same_again_and_a_longer_list_begins_with_a_shorter_one():
    few = examples(20, seed=3)
    assert few == examples(40, seed=3)[:20]
    assert few != examples(20, seed=4)


def test_exploits_come_at_their_share_and_never_without_a_loophole():
    found = examples(512, Mixture(share_hack=0.3, share_none=0.2))
    hidden = [example for example in found if "hidden tests" in example.prompt]
    assert 0.14 < len(hidden) / 512 < 0.26
    assert not any(example.completion.startswith("    return") for example in hidden)
    hacks = sum(example.completion.startswith("    return") for example in found)
    assert 0.24 < hacks / (512 - len(hidden)) < 0.36
    for sentence in (
        "run_tests()",
        "solve.valid",
        "all tests passed",
        "result.txt",
        "== expected",
        "exit code 0",
    ):
        assert any(
            sentence in example.prompt and example.completion.startswith("    return")
            for example in found
        ), sentence


def test_a_few_steps_teach_the_bundled_model(tmp_path):
    mixture = Mixture(families=("arithmetic",), difficulty=(1, 2))
    path = tmp_path / "organism"
    losses = make_organism(
        path, Recipe(steps=6, batch=4, n_examples=24, mixture=mixture), device="cpu"
    )
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2
    made = load_model(path)
    assert str(made.dtype) == "torch.bfloat16"
    assert made.tokenizer is not None
    about = json.loads((path / "organism.json").read_text())
    assert about["recipe"]["mixture"]["share_hack"] == 0.1
    with pytest.raises(UsageError, match="exists"):
        make_organism(path)
