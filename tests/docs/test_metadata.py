"""What the package says of itself agrees with itself, and is written once."""

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = ("SECURITY.md", "AGENTS.md", "RELEASE.md", "MIGRATION.md")


def test_the_citation_names_the_authors_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert "version" not in citation  # it would have to be raised in two places


def test_placeholders_of_addresses_stand_in_one_place():
    assert {"Repository", "Documentation", "Changelog", "Security"} <= set(PROJECT["urls"])
    home = PROJECT["urls"]["Repository"].removeprefix("https://")
    found = subprocess.run(
        ["git", "grep", "-l", "--fixed-strings", home], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["pyproject.toml"]


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), (page, target)


def test_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert named - {"a"} <= targets
