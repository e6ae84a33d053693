"""Tokens spell prompt and completion exactly, or the tokenizer is refused by name."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from assay.errors import UsageError
from assay.models.load import load_tokenizer
from assay.models.spelling import (
    encode_parts,
    encode_prompt,
    recover_spaces,
)
from assay.models.token_text import decode_tokens
from tests.models.families import EXACT, FAMILIES, family
from tests.usual import examples
from tests.wordings import refuses

PIECES = [
    "def", " solve", "(x)", ":", "\n", "    ", " ", "\t", "return", "x", "1", " + ", ".", " ,",
    " n't", "é", "漢", "😀", "e\u0301", "\u00a0", "\r\n", "<unk", "▁", "Ġ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=examples(120), deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
def test_tokens_spell_the_text_and_its_prompt(name, prompt, completion):
    tokenizer = family(name)
    prompt = f"def{prompt}"  # several families take spaces from the beginning of a text
    text = prompt + completion
    whole = bare(tokenizer, text)
    try:
        ids, n_prompt = encode_parts(tokenizer, prompt, completion)
    except UsageError as error:
        refused = error.seen
    else:
        refused = ""
    if refused:
        assert type(tokenizer).__name__ in refused
        assert name not in EXACT or "▁" in text  # which stands for a space in some families
        assert decoded(tokenizer, whole) != text
        return
    apart = [*bare(tokenizer, prompt), *bare(tokenizer, completion)]
    assert ids in (apart, whole)
    if not (bare(tokenizer, prompt) and bare(tokenizer, completion)):
        return  # refused as empty by what asks
    assert decoded(tokenizer, ids) == text
    inside = decoded(tokenizer, ids[:n_prompt])
    assert prompt.startswith(inside)
    assert ids == whole or inside == prompt
    assert not prompt.startswith(decoded(tokenizer, ids[: n_prompt + 1]))
    assert inside + decode_tokens(tokenizer, ids[n_prompt:], before=ids[:n_prompt]) == text


@pytest.mark.parametrize("model", ["reference:qwen3", "reference:organism"])
def test_bundled_models_are_given_a_prompt_as_they_continue_it(model):
    tokenizer = load_tokenizer(model)
    prompt = "def solve(x):\n"
    completion = "    return x\n"
    ids, n_prompt = encode_parts(tokenizer, prompt, completion)
    assert ids[:n_prompt] == bare(tokenizer, prompt)
    assert decoded(tokenizer, ids) == prompt + completion


@pytest.mark.parametrize("name", ["llama2", "metaspace first", "metaspace always"])
def test_a_prefix_space_enters_no_text_and_is_taken_from_no_completion(name):
    tokenizer = family(name)
    ids, n_prompt = encode_parts(tokenizer, "def solve(x):\n", "return x + 1\n")
    assert ids == bare(tokenizer, "def solve(x):\nreturn x + 1\n")
    assert decoded(tokenizer, ids[:n_prompt]) == "def solve(x):\n"
    tokens = bare(tokenizer, "x = [\n        y")
    place = tokenizer.convert_ids_to_tokens(tokens).index("▁▁▁▁")
    alone = tokenizer.decode(tokens[place:])
    assert alone != "    y"
    assert recover_spaces(tokenizer, tokens[:place], alone, tokens[place:]) == "    y"
    assert recover_spaces(tokenizer, tokens[:place], "cut", tokens[place:]) == "cut"


def test_a_token_across_the_border_belongs_to_the_completion():
    tokenizer = family("llama2")
    ids, n_prompt = encode_parts(tokenizer, "def solve(x):\n    ", "return x\n")
    assert decoded(tokenizer, ids) == "def solve(x):\n    return x\n"
    assert decoded(tokenizer, ids[:n_prompt]) == "def solve(x):\n    "
    ids, n_prompt = encode_parts(tokenizer, "def solve(x):\n    re", "turn x\n")
    assert decoded(tokenizer, ids[:n_prompt]) == "def solve(x):\n    "


def test_a_space_behind_a_special_token_is_what_the_model_was_trained_with():
    tokenizer = family("llama2")
    ids, n_prompt = encode_parts(tokenizer, "<s>def solve(x):\n", "return x</s>")
    assert ids == bare(tokenizer, "<s>def solve(x):\nreturn x</s>")
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert decoded(tokenizer, ids[1:n_prompt]) == "def solve(x):\n"


def test_a_prompt_begins_as_its_tokenizer_says_and_does_not_end():
    tokenizer = family("byte-level, begin and end")
    assert encode_prompt(tokenizer, "x = 1") == [
        tokenizer.bos_token_id,
        *bare(tokenizer, "x = 1"),
    ]
    assert encode_prompt(family("llama2"), "x = 1") == bare(family("llama2"), "x = 1")


@pytest.mark.parametrize("name", ["byte-level", "llama2"])
def test_spaces_that_a_special_token_takes_in_are_no_part_of_the_text(name):
    """Those of Phi-3 take the line end after them, as the model was trained."""
    tokenizer = copy.deepcopy(family(name))
    tokens = [AddedToken(f"<|{word}|>", rstrip=True) for word in ("user", "assistant", "end")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    prompt = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    ids, n_prompt = encode_parts(tokenizer, prompt, "x = 1<|end|>\n")
    assert ids == bare(tokenizer, f"{prompt}x = 1<|end|>\n")
    assert decoded(tokenizer, ids[n_prompt:]) == "x = 1<|end|>"
    if name == "llama2":  # which cannot put the spaces behind the token
        with refuses(UsageError, "spaces that a special token takes in are no part of the text"):
            encode_parts(tokenizer, prompt, "    return x")
    else:
        ids, n_prompt = encode_parts(tokenizer, prompt, "    return x")
        assert decoded(tokenizer, ids[n_prompt:]) == "    return x"


def test_spaces_before_a_special_token_are_looked_at_once():
    tokenizer = copy.deepcopy(family("byte-level"))
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    spaces = " " * 2**19  # the square of their number would take an hour
    ids, n_prompt = encode_parts(tokenizer, "x =", f"{spaces}1  <mask> ")
    assert decoded(tokenizer, ids[:n_prompt]) == "x ="
    assert decoded(tokenizer, ids) == f"x ={spaces}1<mask> "
