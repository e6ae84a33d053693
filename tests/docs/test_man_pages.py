"""Every command has a man page, which groff formats without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

from assay.cli import app
from tests.cli.test_app import FROZEN

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import man_pages

PAGES = dict(man_pages.pages(app))


def formatted(source):
    command = ["groff", "-k", "-Tutf8", "-P-c", "-man", "-ww"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


def test_every_command_has_a_page():
    assert {f"assay-{name.replace(' ', '-')}" for name in FROZEN} | {
        "assay",
        "assay-poc",
    } <= PAGES.keys()


@pytest.mark.needs("groff")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_formatted_without_a_warning(name):
    done = formatted(PAGES[name])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.needs("groff")
def test_a_page_of_nonsense_is_warned_of():
    assert formatted(".nonsense").stderr
