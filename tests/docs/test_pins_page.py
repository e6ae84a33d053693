"""The example of docs/pins.md is a pins file, and the page describes every key that there is."""

import re
import tomllib
from pathlib import Path

from assay.poc import NetworkPins

PAGE = (Path(__file__).parents[2] / "docs/pins.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_example_is_complete():
    network = NetworkPins.of(tomllib.loads(EXAMPLE), "docs/pins.md")
    (model,) = network.models
    assert (len(network.nodes), len(model.builds), len(model.calibrations)) == (3, 2, 1)
    pins = network.for_round(block_hash="b", public_key="node_B", node_id=1)
    assert (pins.node_id, pins.node_count, pins.strength, len(pins.builds)) == (1, 2, 256, 1)
    assert len(network.for_round(block_hash="b", public_key="node_A").builds) == 2
