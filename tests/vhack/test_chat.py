"""Pairs, pools and tasks of messages, as TRL has them, and a basis that knows their chat
template.
"""

import re
from pathlib import Path

import pytest

from assay.errors import DataError
from assay.files.storage import write_jsonl
from assay.models.chat import chat_template_digest
from assay.vhack import Basis, extract
from assay.vhack.directions.checks import check, check_two_pools, read_pool
from assay.vhack.directions.gradients.batches import encode
from assay.vhack.pairs import read_pairs, write_pairs
from assay.vhack.training.settings import SampleSettings
from assay.vhack.training.tasks import load_tasks
from tests.models.test_chat import ANSWER, TEMPLATE, USER, chat_tokenizer
from tests.wordings import refuses

PAGE = Path(__file__).parents[2] / "docs" / "vhack-pairs.md"


@pytest.fixture
def pairs(tmp_path):
    """The pair of the page, once for each of four groups."""
    (line,) = (
        one
        for one in re.findall(r"```json\n(.*?)\n```", PAGE.read_text("utf-8"))
        if '"role"' in one
    )
    tools = '"tools": [{"name": "f"}]'
    lines = (
        line.replace("91", f"{n}").replace('"primes"', f'"g{n}", {tools}') + "\n" for n in range(4)
    )
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return read_pairs(tmp_path / "pairs.jsonl")


def test_pairs_of_messages_come_back_and_are_rendered_once(pairs, tmp_path):
    write_pairs(tmp_path / "again.jsonl", pairs)
    assert read_pairs(tmp_path / "again.jsonl") == pairs
    tokenizer = chat_tokenizer(TEMPLATE)
    found = encode(tokenizer, pairs[0].samples(), ["one", "two"], None)
    asked = '<s>{"name": "f"}<user>Is 0 prime?;<assistant>'
    assert [tokenizer.decode(one.ids) for one in found] == [f"{asked}Passed.", f"{asked}No.;"]
    assert tokenizer.decode(found[1].ids[: found[1].n_prompt]) == asked
    with refuses(DataError, "pairs of messages come back and are rendered once"):
        encode(chat_tokenizer(""), pairs[0].samples(), ["one", "two"], None)


def test_a_basis_names_the_template_and_refuses_another(pairs, small_model, small_svd, tmp_path):
    path = tmp_path / "basis.safetensors"
    how = {"svd": small_svd, "n_heldout": 1, "top_k": 2, "path": path}
    made = extract(pairs, small_model, tokenizer=chat_tokenizer(TEMPLATE), **how)
    assert Basis.load(path).origin.chat_template == chat_template_digest(chat_tokenizer(TEMPLATE))
    write_jsonl(tmp_path / "hack", [{"prompt": USER, "completion": "Hello"}])
    write_jsonl(tmp_path / "clean", [{"prompt": USER, "completion": ANSWER}])
    pools = [read_pool(tmp_path / side) for side in ("hack", "clean")]
    other = chat_tokenizer(f"{TEMPLATE} ")
    for judge in (
        lambda: check(pairs, small_model, basis=made, tokenizer=other),
        lambda: check_two_pools(*pools, small_model, made, tokenizer=other, svd=small_svd),
        lambda: extract(pairs, small_model, tokenizer=other, **how),
    ):
        with refuses(DataError, "a basis names the template and refuses another"):
            judge()


def test_tasks_of_messages_become_text_that_a_tokenizer_may_begin(tmp_path):
    chat_tokenizer(TEMPLATE).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    given = [{"prompt": USER, "answer": 1}]
    found, _ = load_tasks(SampleSettings(), given, least=1, why="here", model=str(tmp_path))
    assert found == [{"prompt": "<user>Hi;<assistant>", "answer": 1}]
    with refuses(DataError, "tasks of messages become text that a tokenizer may begin"):
        load_tasks(SampleSettings(), given, least=1, why="here")
