"""Principal angles, against constructions whose angles are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vhack.angles import principal_angles


def rotated(angles, dimension=12):
    """Two orthonormal frames with exactly these angles between them."""
    k = len(angles)
    frame = torch.linalg.qr(torch.randn(dimension, 2 * k, generator=torch.Generator().manual_seed(3)).double()).Q.T
    turns = torch.tensor(angles, dtype=torch.float64)[:, None]
    return frame[:k], turns.cos() * frame[:k] + turns.sin() * frame[k:]


@given(st.lists(st.floats(0, math.pi / 2), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_known_angles_are_found(angles):
    found = principal_angles(*rotated(angles))
    assert torch.allclose(found.double(), torch.tensor(sorted(angles), dtype=torch.float64), atol=2e-7)


@pytest.mark.parametrize("angle", [1e-6, 1e-4, math.pi / 4, math.pi / 2 - 1e-6])
def test_small_angles_keep_their_digits(angle):
    assert principal_angles(*rotated([angle])).item() == pytest.approx(angle, rel=1e-5)


def test_the_basis_of_a_space_does_not_matter():
    first, second = rotated([0.3, 1.1])
    mixed = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64) @ second
    assert torch.allclose(principal_angles(first, mixed), torch.tensor([0.3, 1.1]), atol=1e-6)
    assert torch.allclose(principal_angles(mixed, first), torch.tensor([0.3, 1.1]), atol=1e-6)


def test_a_space_inside_another_has_angle_zero():
    first, _ = rotated([0.3, 1.1, 0.2])
    assert principal_angles(first[:1], first).tolist() == pytest.approx([0.0], abs=1e-7)
    assert len(principal_angles(first, first[:2])) == 2


def test_zero_rows_span_nothing():
    first, second = rotated([0.3])
    padded = torch.cat([first, torch.zeros_like(first)])
    assert principal_angles(padded, second).tolist() == pytest.approx([0.3])
    assert len(principal_angles(torch.zeros(2, 5), torch.eye(5))) == 0
