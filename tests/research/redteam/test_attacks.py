import pytest
import torch

from assay.research.redteam._attacks import ATTACKS


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_every_attacker_runs_and_says_what_it_costs(attack, scene, inputs_btd):
    program = attack.make(scene)
    weights = torch.ones(inputs_btd.shape[:2])
    read = program.read(inputs_btd, weights)
    assert read.shape == (4, 64)
    assert torch.isfinite(read).all()
    assert 0 <= program.cost <= 1
    honest = scene.engine(scene.model).read(inputs_btd, weights)
    if "window" not in attack.name:  # 64 positions are more than there are here
        assert not torch.equal(read, honest), "it is not the honest result"
    assert attack.skips or attack.family in ("weights", "none")
    if not attack.last_unknown:
        assert torch.isfinite(program.read(inputs_btd, None)).all()


def test_names_are_different():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
