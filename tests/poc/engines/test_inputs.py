"""The inputs of a batch, and the seed texts of many nonces at once."""

from dataclasses import replace

import numpy as np
import pytest

from assay import streams
from assay.poc import Round
from assay.poc.engines.base import noise_inputs
from assay.poc.protocol.round import MAX_NONCE, NONCE_TEXTS

NONCES = [0, 9, 10, 123_456_789, MAX_NONCE]
# What a text is made of may stand in a name.
NAMES = [("block_alpha", "node_A"), ("{nonce}", "{block}"), ("{", "}{index}"), ("a_b", "c"), ("é中", "%s{0}")]


@pytest.mark.parametrize("preset", ["poc-2.0", "hardened"])
@pytest.mark.parametrize(("block_hash", "public_key"), NAMES)
def test_texts_of_many_nonces_are_those_of_each(block_hash: str, public_key: str, preset: str):
    round = Round(block_hash=block_hash, public_key=public_key, preset=preset)
    for stream in NONCE_TEXTS:
        for k in (0, 12):
            texts = round.texts(stream, NONCES, count=3, k=k)
            assert texts == [round.text(stream, n, index=i, k=k) for n in NONCES for i in range(3)]
            assert round.texts(stream, iter(NONCES), k=k) == texts[::3]


@pytest.mark.parametrize(("block_hash", "public_key"), NAMES)
def test_every_published_text_is_its_template(block_hash: str, public_key: str):
    round = Round(block_hash=block_hash, public_key=public_key)
    for stream, template in NONCE_TEXTS.items():
        for nonce in NONCES:
            filled = template.format(block=block_hash, key=public_key, nonce=nonce, index=4, k=12)
            assert round.text(stream, nonce, index=4, k=12) == filled


def test_every_versioned_text_says_how_long_its_parts_are():
    round = Round(block_hash="é中", public_key="k", preset="hardened")
    assert round.texts("inputs", [7, 10], count=2) == [
        "11:assay.poc/26:inputs5:é中1:k1:71:01:0",
        "11:assay.poc/26:inputs5:é中1:k1:71:11:0",
        "11:assay.poc/26:inputs5:é中1:k2:101:01:0",
        "11:assay.poc/26:inputs5:é中1:k2:101:11:0",
    ]


def test_no_nonces_have_no_texts():
    assert Round(block_hash="b", public_key="k").texts("signs", [], count=8) == []


@pytest.mark.parametrize("strength", [32, 256])
def test_inputs_of_a_batch_are_the_streams_of_its_nonces(strength: int, round_: Round):
    round = replace(round_, strength=strength)
    backend = streams.get_backend("numpy")
    made = noise_inputs(backend, round, NONCES, seq_len=3, hidden_size=8, dtype="float32")
    for row, nonce in zip(made.numpy(), NONCES, strict=True):
        alone = backend.normals(streams.seeds([round.text("inputs", nonce)], strength), 24)
        np.testing.assert_array_equal(row, np.asarray(alone).reshape(3, 8))
