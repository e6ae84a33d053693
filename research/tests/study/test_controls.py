"""Control axes, and the direction of activations that advantage modification looks along."""

import pytest
import torch
from assay_research.advantage import HackActivation
from assay_research.control_axes import BASIS_KINDS, make_basis

from assay.errors import DataError, UsageError
from assay.vhack import Basis, PairGradients
from tests.vhack.conftest import byte_tokenizer as byte_tokenizer
from tests.vhack.conftest import small_pairs as small_pairs
from tests.vhack.delta.conftest import module as module


@pytest.fixture(scope="module")
def gradients():
    """Twelve pairs in four groups: a common direction of the hacks, one of the groups, and
    noise.
    """
    generator = torch.Generator().manual_seed(2)
    hackward, groups = torch.linalg.qr(torch.randn(40, 5, generator=generator))[0].T.split([1, 4])
    clean = 2 * groups.repeat(3, 1) + 0.1 * torch.randn(12, 40, generator=generator)
    hack = clean + 3 * hackward + 0.2 * torch.randn(12, 40, generator=generator)
    return PairGradients(
        {"a": hack, "b": 2 * hack}, {"a": clean, "b": 2 * clean}, groups=[*"0123"] * 3
    ), hackward[0]


def share(direction, basis):
    """How much of a unit vector lies in the axes of module a."""
    return float((basis.axes["a"] @ direction).norm())


@pytest.mark.parametrize("method", ["svd", "lda"])
def test_which_axes_know_the_hack(gradients, method):
    pairs, hackward = gradients
    found = {kind: make_basis(kind, pairs, top_k=2, method=method) for kind in BASIS_KINDS}
    assert share(hackward, found["true"]) > 0.9
    assert (share(hackward, found["shuffled"]) > 0.85) == (method == "svd")  # which keeps the plane
    assert all(share(hackward, found[kind]) < 0.5 for kind in ("random", "clean-clean"))
    votes = {kind: found[kind].votes["a"][0].tolist() for kind in ("true", "shuffled")}
    assert votes["true"] == [12, 0]
    assert max(votes["shuffled"]) < 12  # the direction is lost
    for basis in found.values():
        assert isinstance(basis, Basis)
        axes = basis.axes["a"]
        assert axes.shape == (2, 40)
        torch.testing.assert_close(axes @ axes.T, torch.eye(2), atol=1e-5, rtol=0)


def test_controls_follow_their_seed(gradients):
    pairs, _ = gradients
    for kind in ("random", "shuffled", "clean-clean"):
        one, again, other = (make_basis(kind, pairs, seed=seed).axes["a"] for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_random_axes_point_both_ways(gradients):
    pairs, _ = gradients
    signs = [
        make_basis("random", pairs, top_k=1, seed=seed).axes["a"][0, 0] > 0 for seed in range(64)
    ]
    assert 16 < sum(signs) < 48


def test_controls_that_cannot_be_made(gradients):
    pairs, _ = gradients
    with pytest.raises(UsageError, match="other axes"):
        make_basis("other", pairs)
    single = PairGradients({"a": torch.ones(1, 3)}, {"a": torch.eye(3)[:1]})
    with pytest.raises(UsageError, match="1 pair"):
        make_basis("clean-clean", single, method="svd")


def encoded(tokenizer, pairs, side):
    return [
        (tokenizer(p.prompt)["input_ids"], tokenizer(getattr(p, side))["input_ids"]) for p in pairs
    ]


def test_the_scale_is_that_of_the_pairs(small_model, byte_tokenizer, small_pairs):
    shortcut = HackActivation.fit(small_model, byte_tokenizer, small_pairs)
    assert shortcut.layer == 1  # behind two of three layers
    hack, clean = (
        shortcut.z(small_model, encoded(byte_tokenizer, small_pairs, side))
        for side in ("hack", "clean")
    )
    assert float(hack.mean() + clean.mean()) == pytest.approx(0, abs=1e-3)
    assert float((hack.var() + clean.var()) / 2) == pytest.approx(1, rel=1e-3)
    assert hack.mean() > 0 > clean.mean()


def test_activations_are_means_over_the_completion_behind_the_layer(
    small_model, module, byte_tokenizer, small_pairs
):
    shortcut = HackActivation.fit(small_model, byte_tokenizer, small_pairs)
    prompt, completion = encoded(byte_tokenizer, small_pairs, "hack")[0]
    with torch.no_grad():
        states = (
            module(  # a copy: transformers leaves hooks behind when it is asked for hidden states
                input_ids=torch.tensor([prompt + completion]),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        )
    mean = states[shortcut.layer + 1][0, len(prompt) :].mean(dim=0)
    wanted = (mean @ shortcut.direction - shortcut.middle) / shortcut.spread
    found = shortcut.z(small_model, encoded(byte_tokenizer, small_pairs, "hack"))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_only_what_is_on_the_side_of_the_hack_is_paid_less():
    z = torch.tensor([-3.0, 0.0, 1e-6, 2.0, 50.0])
    assert HackActivation.modify(torch.ones(5), z, 2.0).tolist() == pytest.approx(
        [1, 1, 0, 1 - 2 / (1 + 2.718281828**-2), -1], abs=1e-5
    )
    assert HackActivation.modify(torch.zeros(5), z, 2.0).tolist() == [0] * 5


def test_one_pair_is_no_scale(small_model, byte_tokenizer, small_pairs):
    with pytest.raises(DataError, match="1 pairs"):
        HackActivation.fit(small_model, byte_tokenizer, small_pairs[:1])
