"""The attackers of ``make redteam``, each once, and readers of files for a moment."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research" / "benchmarks"))

import redteam_surface as redteam

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.mark.parametrize("hold", redteam.ATTACKS, ids=lambda hold: hold.__name__)
def test_what_one_address_holds_keeps_no_node_out(server, hold):
    found = redteam.attack(server, hold, redteam.own_address() or "127.0.0.1")
    assert found["refused"] <= 1, found
    assert found["mib_after"] - found["mib_before"] < 256


@pytest.fixture(scope="module")
def server(tmp_path_factory, small_model, small_checkpoint):
    with redteam.network(
        tmp_path_factory.mktemp("redteam"), small_model, small_checkpoint
    ) as server:
        yield server


# All files lie in one folder, and those that are not the model's are named.
@pytest.mark.filterwarnings("ignore:.*looks like weights")
def test_a_changed_file_is_read_or_refused(tmp_path, small_model):
    for seed, (name, (whole, read)) in enumerate(redteam.samples(tmp_path, small_model).items()):
        found = redteam.read_changed(name, whole, read, 1.0, seed, tmp_path)
        assert found["held"], found
