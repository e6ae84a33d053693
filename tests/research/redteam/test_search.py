import pytest

from assay.research.redteam._partial import PartialForward
from assay.research.redteam._run import strategies
from assay.research.redteam._tables import SAVED


@pytest.mark.parametrize("read", [[31], [3, 9, 20, 28], list(range(32))])
def test_every_strategy_saves_what_it_must(read, small_model, guesses):
    found = dict(strategies(read, 32, small_model.num_layers))
    costs = {name: PartialForward(small_model, shortcut, guesses).cost for name, shortcut in found.items()}
    # The small model has three layers and the guesses are a larger part of it: the margin is theirs.
    assert costs["least useful dropped"] <= 1 - SAVED + 0.02
    assert costs["last dropped"] <= 1 - SAVED + 0.02
    assert len(found) >= 7


def test_unread_positions_go_first():
    depths = dict(strategies([5, 20], 32, 3))["least useful dropped"].depth
    gone = [t for t, depth in enumerate(depths) if depth == 0]
    assert min(gone) > 20, "nothing after the last read position is of use"
    later = dict(strategies([5, 31], 32, 3))["least useful dropped"].depth
    assert [t for t, depth in enumerate(later) if depth == 0] == list(range(6, 15)), "then the farthest from a read one"
