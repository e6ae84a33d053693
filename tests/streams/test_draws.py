"""Ten thousand random draws, the same bits on every backend: the list of SHA-256 was made by the
numpy definition.

Every choice comes from the digest of a text, so the draws are the same everywhere and for ever.
"""

import json
from dataclasses import dataclass

import pytest

from assay.streams import DTYPES, seed32, seeds
from assay.streams.arrays import digest

from .inverse import VECTORS

ROWS = json.loads((VECTORS / "draws_sha256.json").read_text())["rows"]
GROUPS = 500
DRAWS_PER_GROUP = 20
MAX_N = 70_000
PARTS = 5


@dataclass(frozen=True)
class Group:
    """Draws with one length, dtype and strength and different seeds."""

    number: int

    @property
    def n(self):
        """1 to 70 000. The first groups take the smallest lengths; a third of the rest are uniform,
        others smaller.
        """
        if self.number < 20:
            return self.number + 1
        if self.number == 20:
            return MAX_N
        return 1 + ((self._choice("n") % MAX_N) >> max(0, self._choice("scale") % 18 - 5))

    @property
    def dtype(self):
        return DTYPES[self._choice("dtype") % 3]

    @property
    def strength(self):
        return (32, 256)[self._choice("strength") % 2]

    def draw(self, backend):
        texts = [f"draw_{self.number}_{i}" for i in range(DRAWS_PER_GROUP)]
        return digest(backend.normals(seeds(texts, self.strength), self.n, self.dtype))

    def _choice(self, what):
        return seed32(f"draw_{self.number}_{what}")


def test_the_list_covers_the_space():
    assert len(ROWS) == GROUPS
    assert GROUPS * DRAWS_PER_GROUP == 10_000
    lengths = {row[0] for row in ROWS}
    assert min(lengths) == 1
    assert max(lengths) == MAX_N
    assert len(lengths) > 300
    assert {tuple(row[1:3]) for row in ROWS if row[0] > 10_000} == {
        (d, s) for d in DTYPES for s in (32, 256)
    }


@pytest.mark.parametrize("part", range(PARTS))
def test_draws(backend, part):
    for number in range(part, GROUPS, PARTS):
        group = Group(number)
        assert [group.n, group.dtype, group.strength, group.draw(backend)] == ROWS[number]
