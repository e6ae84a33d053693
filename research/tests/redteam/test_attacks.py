import pytest
import torch
from assay_research.redteam.attacks import ATTACKS

RUNS = [(attack, dtype) for attack in ATTACKS for dtype in ("float32", "float8") if attack.serves(dtype)]
# 64 positions are more than there are here, and a CPU has no short sums.
HONEST_HERE = ("sliding window of 64", "short sums")


@pytest.mark.parametrize(("attack", "dtype"), RUNS, ids=[f"{attack.name}-{dtype}" for attack, dtype in RUNS])
def test_every_attacker_runs_and_says_what_it_costs(attack, dtype, scene, float8_scene, inputs_btd):
    scene = scene if dtype == "float32" else float8_scene
    inputs_btd = inputs_btd.to(scene.model.dtype)
    program = attack.make(scene)
    weights = torch.ones(inputs_btd.shape[:2])
    read = program.read(inputs_btd, weights)
    assert read.shape == (4, 64)
    assert torch.isfinite(read).all()
    assert 0 <= program.cost <= 1
    honest = scene.engine(scene.model).read(inputs_btd, weights)
    if attack.name not in HONEST_HERE:
        assert not torch.equal(read, honest), "it is not the honest result"
    assert attack.skips or attack.family in ("weights", "none")
    if not attack.last_unknown:
        assert torch.isfinite(program.read(inputs_btd, None)).all()


def test_fewer_bits_save_over_the_format_that_honest_provers_have(scene, float8_scene):
    made = {attack.name: attack.make for attack in ATTACKS}
    costs = {
        name: [made[f"{name} weights"](where).cost for where in (scene, float8_scene)] for name in ("int8", "int4")
    }
    assert costs == {"int8": [0.5, 1.0], "int4": [0.25, 0.5]}
