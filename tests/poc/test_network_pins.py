"""Pins files in use: what a node is asked to prove."""

from pathlib import Path

import pytest

from assay.files.references import CATALOGUE
from assay.poc.launch import Proving
from assay.poc.network_pins import asked

REFERENCES = ("reference:qwen3", "reference:llama")
ROUND = """
schema = 1
[round]
preset = "poc-2.0"
seq_len = 16
strength = 32
r_target = 1.416
node_count = 1
fewest_nonces = 32
"""
FREE = ("device", "attention", "batch_size", "threads", "torch", "library", "kernels")


def model_table(reference: str) -> str:
    """A model of a pins file, on any machine in float32."""
    lines = [f'[[models]]\nreference = "{reference}"\ndigest = "{CATALOGUE[reference]["digest"]}"']
    lines += ['[[models.builds]]\nengine = "hf"\ndtype = "float32"']
    return "\n".join([*lines, *(f'{name} = "*"' for name in FREE)])


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("by_digest", [False, True])
def test_a_model_of_the_file_is_named_by_reference_or_digest(
    tmp_path: Path, reference: str, by_digest: bool
):
    path = tmp_path / "pins.toml"
    path.write_text("\n".join([ROUND, *map(model_table, REFERENCES)]))
    name = CATALOGUE[reference]["digest"] if by_digest else reference
    stated = {"block_hash": "b", "public_key": "k"}
    task = asked(path, Proving(model=name, preset="poc-2.0", seq_len=16), stated, None)
    assert task.pins is not None
    assert task.pins.digest == CATALOGUE[reference]["digest"]
    assert task.proving.model == reference
