"""Pairs, pools and tasks of messages, as TRL has them, and a basis that knows their chat template."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from assay.errors import DataError
from assay.files.storage import write_jsonl
from assay.models.chat import chat_template_digest
from assay.vhack import Basis, Sample, extract
from assay.vhack.checks import CheckSettings, check, check_two_pools, read_pool
from assay.vhack.gradients.batches import encode
from assay.vhack.pairs import read_pairs, write_pairs
from assay.vhack.training.rewards import load_tasks
from assay.vhack.training.settings import SampleSettings
from tests.models.test_chat import TEMPLATE, USER, chat_tokenizer
from tests.vhack.conftest import bytewise

PAGE = Path(__file__).parents[2] / "docs" / "vhack-pairs.md"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The pair of the page, once for each of four groups."""
    path = tmp_path_factory.mktemp("chat") / "pairs.jsonl"
    (line,) = (one for one in re.findall(r"```json\n(.*?)\n```", PAGE.read_text("utf-8")) if '"role"' in one)
    path.write_text("".join(line.replace("91", f"{n}").replace("primes", f"g{n}") + "\n" for n in range(4)))
    return read_pairs(path)


@pytest.fixture(scope="module")
def basis(pairs, small_model, small_svd):
    return extract(pairs, small_model, tokenizer=chat_tokenizer(TEMPLATE), svd=small_svd, n_heldout=1, top_k=2)


def test_pairs_of_messages_come_back(pairs, tmp_path):
    tools = replace(pairs[0], prompt=replace(pairs[0].prompt, json=pairs[0].prompt.json[:-1] + ',"tools":[{"a":1}]}'))
    write_pairs(tmp_path / "again.jsonl", [*pairs[1:], tools])
    assert read_pairs(tmp_path / "again.jsonl") == [*pairs[1:], tools]


def test_both_sides_are_rendered_once(pairs):
    tokenizer = chat_tokenizer(TEMPLATE)
    (found,) = encode(tokenizer, [pairs[0].samples()[1]], ["one"], None)
    assert tokenizer.decode(found.ids[: found.n_prompt]) == "<s><user>Is 0 a prime?;<assistant>"
    assert tokenizer.decode(found.ids[found.n_prompt :]) == "No: 7 times 13.;"
    (text,) = encode(tokenizer, [Sample(pairs[0].prompt, "No")], ["one"], None)
    assert tokenizer.decode(text.ids[text.n_prompt :]) == "No"
    with pytest.raises(DataError, match="one: messages for a model without a chat template"):
        encode(bytewise(), [pairs[0].samples()[1]], ["one"], None)


def test_a_basis_names_the_template_and_refuses_another(pairs, basis, small_model, small_svd, tmp_path):
    digest = chat_template_digest(chat_tokenizer(TEMPLATE))
    basis.save(tmp_path / "basis.safetensors")
    with safe_open(tmp_path / "basis.safetensors", framework="pt") as reader:
        assert reader.metadata()["chat_template_sha256"] == digest
    assert Basis.load(tmp_path / "basis.safetensors").origin == basis.origin
    other = chat_tokenizer(f"{TEMPLATE} ")
    sides = ("hack", "clean")
    for side in sides:
        rows = [{"prompt": USER, "completion": text} for text in (f"{side} one", f"{side} two")]
        write_jsonl(tmp_path / side, rows)
    pools = [read_pool(tmp_path / side) for side in sides]
    for judge in (
        lambda: check(pairs, small_model, basis=basis, tokenizer=other, settings=CheckSettings(method="svd")),
        lambda: check_two_pools(*pools, small_model, basis, tokenizer=other, svd=small_svd),
        lambda: extract(pairs, small_model, path=tmp_path / "basis.safetensors", tokenizer=other, svd=small_svd,
                        n_heldout=1, top_k=2),
    ):  # fmt: skip
        with pytest.raises(DataError, match="made for other chat"):
            judge()


def test_tasks_of_messages_become_text(tmp_path):
    path = tmp_path / "model"
    chat_tokenizer(TEMPLATE).save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "qwen3"}')
    given = [{"prompt": USER, "answer": 1}]
    # The sampler's tokenizer begins a text by itself.
    found, _ = load_tasks(SampleSettings(), given, least=1, why="here", model=str(path))
    assert found == [{"prompt": "<user>Hi;<assistant>", "answer": 1}]
    with pytest.raises(DataError, match="task 0: messages for a model without a chat template"):
        load_tasks(SampleSettings(), given, least=1, why="here")
