"""Rotary positions against transformers and against what they are for: a score that sees distances alone."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from assay.models.decoder import rotate


def angles(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    turned = (positions[:, None] * frequencies).repeat(1, 2)
    return turned.cos(), turned.sin()


def test_the_bits_are_those_of_transformers():
    q, k = torch.randn(2, 3, 4, 7, 16)
    cos, sin = angles(torch.arange(7), 16)
    wanted = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    assert all(torch.equal(rotate(x, cos, sin), one) for x, one in zip((q, k), wanted, strict=True))


def test_a_score_depends_on_the_distance_alone():
    q, k = torch.randn(2, 16, dtype=torch.float64)
    tables = angles(torch.tensor([3, 5, 40, 42]).double(), 16)
    first, second, third, fourth = zip(*tables, strict=True)
    near = rotate(q, *second) @ rotate(k, *first)
    far = rotate(q, *fourth) @ rotate(k, *third)
    assert torch.allclose(near, far)
    assert not torch.allclose(near, rotate(q, *fourth) @ rotate(k, *first))
