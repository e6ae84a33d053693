"""Provers: an honest one is exact, and every cheat is what its name says."""

import numpy as np
import pytest
import torch
from assay_research.responses.cheats import CHEATS, DROPPED, EOS, HONEST, STOPPED, Scene, honest
from assay_research.responses.field import check
from assay_research.responses.provers import Requests, Served, open_model, tuned

from assay.models import Model

BY_NAME = {cheat.name: cheat for cheat in CHEATS}
SILENT = {
    "cached answer, honest prefill",
    "int4 tokens, honest prefill",
    "noise of its own",
    "stops early",
}
"""Cheats whose sketches are honest."""

SAFE = "int4 tokens that lead by"


@pytest.fixture(scope="module")
def served(scene: Scene, requests: Requests) -> Served:
    return honest(scene, requests)


def margins(requests: Requests, served: Served, model: Model) -> tuple[float, float]:
    """The share of tokens that are not the verifier's, and the median residual."""
    found = check(requests, served, model, model)
    others = np.concatenate([one.replayed.margins > 0 for one in found])
    return float(others.mean()), float(
        np.median(np.concatenate([one.replayed.residuals for one in found]))
    )


def test_an_honest_prover_in_float32_is_exact(requests, served, small_model):
    different, residual = margins(requests, served, small_model)
    assert different == 0
    assert residual < 1e-3


@pytest.mark.parametrize("serve", HONEST.values(), ids=HONEST)
def test_other_honest_ways_give_the_same_tokens(serve, scene, requests, served):
    other = serve(scene, requests)
    assert torch.equal(other.tokens, served.tokens)
    torch.testing.assert_close(other.states, served.states, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "cheat", [cheat for cheat in CHEATS if not cheat.reads_text], ids=lambda cheat: cheat.name
)
def test_every_cheat_leaves_a_trace(cheat, scene, requests, small_model):
    handed_in = cheat.serve(scene, requests)
    different, residual = margins(requests, handed_in, small_model)
    assert 0 <= handed_in.asked <= 1
    if cheat.name.startswith(SAFE):  # a model this small has hardly a token that leads wrongly
        assert residual < 1e-3
        return
    assert different > 0 or residual > 2e-3, cheat.name
    if cheat.name in SILENT:
        assert residual < 1e-3
        assert different > 0


def test_answers_are_cut_where_it_is_said(scene, requests, served):
    stopped = BY_NAME["stops early"].serve(scene, requests)
    assert stopped.tokens.shape[1] == STOPPED + 1
    assert (stopped.tokens[:, -1] == EOS).all()
    shortened = BY_NAME["one token left out"].serve(scene, requests)
    assert torch.equal(shortened.tokens[:, DROPPED:], served.tokens[:, DROPPED + 1 :])


def test_tuning_moves_a_model_that_reads_text():
    model = open_model("reference:qwen3", "bfloat16", "cpu")
    moved = tuned(model, 1)
    name, before = next(iter(model.module.named_parameters()))
    assert not torch.equal(dict(moved.module.named_parameters())[name], before)
    assert moved.dtype == model.dtype
    assert moved.digest == model.digest, "that is the lie"
