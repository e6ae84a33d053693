import pytest
import torch

from assay.errors import DataError
from assay.vhack.delta.advantage import Shortcut, modify_rewards


def encoded(tokenizer, pairs, side):
    return [(tokenizer(p.prompt)["input_ids"], tokenizer(getattr(p, side))["input_ids"]) for p in pairs]


def test_the_scale_is_that_of_the_pairs(small_model, byte_tokenizer, small_pairs):
    shortcut = Shortcut.fit(small_model, byte_tokenizer, small_pairs)
    assert shortcut.layer == 1  # behind two of three layers
    hack, clean = (shortcut.z(small_model, encoded(byte_tokenizer, small_pairs, side)) for side in ("hack", "clean"))
    assert float(hack.mean() + clean.mean()) == pytest.approx(0, abs=1e-3)
    assert float((hack.var() + clean.var()) / 2) == pytest.approx(1, rel=1e-3)
    assert hack.mean() > 0 > clean.mean()


def test_activations_are_means_over_the_completion_behind_the_layer(small_model, module, byte_tokenizer, small_pairs):
    shortcut = Shortcut.fit(small_model, byte_tokenizer, small_pairs)
    prompt, completion = encoded(byte_tokenizer, small_pairs, "hack")[0]
    with torch.no_grad():
        states = module(  # a copy: transformers leaves hooks behind when it is asked for hidden states
            input_ids=torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False
        ).hidden_states
    mean = states[shortcut.layer + 1][0, len(prompt) :].mean(dim=0)
    wanted = (mean @ shortcut.direction - shortcut.middle) / shortcut.spread
    found = shortcut.z(small_model, encoded(byte_tokenizer, small_pairs, "hack"))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_only_what_is_on_the_side_of_the_hack_is_paid_less():
    z = torch.tensor([-3.0, 0.0, 1e-6, 2.0, 50.0])
    assert modify_rewards(torch.ones(5), z, 2.0).tolist() == pytest.approx(
        [1, 1, 0, 1 - 2 / (1 + 2.718281828**-2), -1], abs=1e-5
    )
    assert modify_rewards(torch.zeros(5), z, 2.0).tolist() == [0] * 5


def test_one_pair_is_no_scale(small_model, byte_tokenizer, small_pairs):
    with pytest.raises(DataError, match="1 pairs"):
        Shortcut.fit(small_model, byte_tokenizer, small_pairs[:1])
