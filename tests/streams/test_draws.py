"""Ten thousand random draws, the same bits on every backend: the list was made by the numpy definition."""

import json

import pytest

from assay.streams import DTYPES

from .draws import DRAWS_PER_GROUP, GROUPS, MAX_N, PATH, Group

ROWS = json.loads(PATH.read_text())["rows"]
PARTS = 5


def test_the_list_covers_the_space():
    assert len(ROWS) == GROUPS
    assert GROUPS * DRAWS_PER_GROUP == 10_000
    lengths = {row[0] for row in ROWS}
    assert min(lengths) == 1
    assert max(lengths) == MAX_N
    assert len(lengths) > 300
    assert {tuple(row[1:3]) for row in ROWS if row[0] > 10_000} == {(d, s) for d in DTYPES for s in (32, 256)}


@pytest.mark.parametrize("part", range(PARTS))
def test_draws(backend, part):
    for number in range(part, GROUPS, PARTS):
        group = Group(number)
        assert [group.n, group.dtype, group.strength, group.draw(backend)] == ROWS[number]
