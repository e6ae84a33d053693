"""The example of docs/pins.md is a pins file, and the page describes every key that there is."""

import re
import tomllib
from pathlib import Path

import pytest

from assay.poc import Build, Fingerprint, NetworkPins
from assay.poc.protocol.pins_file import BUILD_FIELDS, ModelPins, NodePins, PinnedFile, RoundPins

PAGE = (Path(__file__).parents[2] / "docs/pins.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_example_is_complete():
    network = NetworkPins.of(tomllib.loads(EXAMPLE), "docs/pins.md")
    (model,) = network.models
    assert (len(network.nodes), len(model.builds), len(model.calibrations)) == (3, 2, 1)
    pins = network.for_round(block_hash="b", public_key="node_B", node_id=1)
    assert (pins.node_id, pins.node_count, pins.strength, len(pins.builds)) == (1, 2, 256, 1)
    assert len(network.for_round(block_hash="b", public_key="node_A").builds) == 2


@pytest.mark.parametrize("kind", [RoundPins, NodePins, ModelPins, Build, PinnedFile])
def test_every_key_is_described(kind):
    for name in kind.model_fields:
        assert f"`{name}`" in PAGE or (name == "name" and '\nname = "' in EXAMPLE) or f"[[models.{name}]]" in PAGE, name


def test_the_build_of_the_example_takes_what_it_says():
    build = NetworkPins.of(tomllib.loads(EXAMPLE), "docs/pins.md").models[0].builds[0]
    stated = {name: values[0] for name in BUILD_FIELDS if (values := getattr(build, name))}
    stated |= {"torch": "2.13.0", "kernels": tuple(stated["kernels"].split(", "))}
    fingerprint = Fingerprint(**stated, seq_len=256)
    assert build.differing(fingerprint) == ()
    assert build.differing(Fingerprint(**stated | {"torch": "2.12.0", "device": "NVIDIA A100"}, seq_len=8)) == (
        "device",
        "torch",
    )
