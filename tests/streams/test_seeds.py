import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.streams import seed32, seeds


def test_seed_of_a_known_text():
    assert seed32("block_alpha_node_A_nonce0") == 0x0D11E7C0


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_words_of_the_digest(texts):
    strong = seeds(texts, strength=256)
    assert strong.shape == (len(texts), 8)
    assert strong.dtype == np.uint32
    for text, words in zip(texts, strong, strict=True):
        assert words.astype(">u4").tobytes() == hashlib.sha256(text.encode()).digest()
        assert words[0] == seed32(text)
    np.testing.assert_array_equal(seeds(texts), strong[:, :1])


@pytest.mark.parametrize("texts", ["one text", [b"bytes"], [1], ["\ud800"]])
def test_bad_texts(texts):
    with pytest.raises(UsageError, match="wanted"):
        seeds(texts)


@pytest.mark.parametrize("strength", [0, 8, 64, "32"])
def test_bad_strength(strength):
    with pytest.raises(UsageError, match="32 or 256"):
        seeds(["a"], strength=strength)
