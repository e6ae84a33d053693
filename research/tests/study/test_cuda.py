"""On a GPU: a captured decoding step draws what a plain one draws."""

import pytest
import torch
from assay_research.study.model import Generator, StackedModel

from assay.models import load_model
from assay.vhack import weight_svd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_captured_step_draws_what_a_plain_one_does(monkeypatch):
    model = load_model("reference:llama", dtype="float32", device="cuda")
    stacked = StackedModel(model, 2, weight_svd(model), torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids_RPL = torch.randint(3, 4000, (2, 2, 12), generator=generator).cuda()
    lengths_RP = torch.tensor([[12, 7], [9, 12]]).cuda()
    found = []
    for captured in (True, False, True):
        if not captured:
            monkeypatch.setattr(Generator, "_capture", lambda self: None)
        made = Generator(stacked, (2, 3, 12, 24), 2)
        uniform = torch.rand(24, 2, 2, 3, generator=torch.Generator().manual_seed(1)).cuda()
        found += [made.sample(ids_RPL, lengths_RP, 201, uniform) for _ in range(2)]
        assert (made._graph is not None) is captured
        monkeypatch.undo()
    assert all(torch.equal(tokens, found[0]) for tokens in found)
