"""Every command line that a page shows is one that its program takes: all flags are known, and all
values are read.
"""

import re
import subprocess
import tomllib

import pytest

from assay.cli import app
from assay.framework.groups import leaves
from assay.poc import NetworkPins
from tests.cli.test_app import FROZEN
from tests.docs.command_lines import VARIABLES, refused, shown
from tests.docs.shell import ROOT
from tests.poc.validator.conftest import pins_text

PAGES = sorted(
    path
    for folder in (".", "docs", "research/pages", "examples", "deploy")
    for path in (ROOT / folder).glob("*.md")
    if any(shown(path.read_text(encoding="utf-8")))
)
NO_PARSER = ("scripts/page_blocks.py",)
"""Programs that read their arguments as they work."""


@pytest.fixture
def folder(small_model, tmp_path, monkeypatch):
    """A folder with the files that a command reads before its work."""
    for name in ("pins.toml", "network.toml"):
        (tmp_path / name).write_text(pins_text(small_model))
    (tmp_path / "keys").write_text("k" * 20 + "\n")
    monkeypatch.chdir(tmp_path)
    for path in PAGES:
        for line in re.findall(
            r"^printf .*\.toml$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            subprocess.run(["bash", "-c", line], env={"DIGEST": "0" * 64}, check=True)
    return tmp_path


@pytest.mark.slow
def test_every_command_line_is_read_by_its_program(folder):
    lines = [words for path in PAGES for words in shown(path.read_text(encoding="utf-8"))]
    assert len(lines) > 60
    for words in lines:
        assert "…" not in " ".join(words)
        assert words[0] == "assay" or (ROOT / words[1]).is_file(), words
    assert refused([words for words in lines if words[1] not in NO_PARSER], folder) == {}


@pytest.mark.slow
def test_every_example_of_a_help_text_is_read_by_its_program(folder):
    texts = (f"{command.help}\n{command.epilog}" for _, command in leaves(app))
    found = [
        line.split() for text in texts for line in re.findall(r"Example: (assay [^\n]+)", text)
    ]
    assert len(found) >= len(FROZEN)
    assert refused([[VARIABLES.get(word, word) for word in words] for words in found], folder) == {}


def test_the_pins_file_of_a_page_is_complete():
    (example,) = re.findall(
        r"```toml\n(.*?)```", (ROOT / "docs/pins.md").read_text(encoding="utf-8"), re.DOTALL
    )[:1]
    network = NetworkPins.of(tomllib.loads(example), "docs/pins.md")
    (model,) = network.models
    assert (len(network.nodes), len(model.builds), len(model.calibrations)) == (3, 2, 1)
    pins = network.for_round(block_hash="b", public_key="node_B", node_id=1)
    assert (pins.node_id, pins.node_count, pins.strength, len(pins.builds)) == (1, 2, 256, 1)
    assert len(network.for_round(block_hash="b", public_key="node_A").builds) == 2
